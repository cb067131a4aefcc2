"""Keyed randomness: known answers, laws, independence of the place in a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from feint.core import random
from feint.core.errors import DtypeError, RangeError, ShapeError

ONES = 0xFFFFFFFF
FROZEN = {
    "keys": [1389609246023119845, 5840119000542174179],
    "fold": [6768079489910389617, -4152772372649893953],
    "words": [[931225460, 2519902570, 2457478355], [1147546170, 898237331, 2582687013]],
}


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter: tuple, key: tuple, expected: tuple) -> None:
    # Oracle: the known-answer vectors of Random123 (kat_vectors, philox4x32 with 10 rounds).
    words = random._philox(*(torch.tensor([v]) for v in (*counter, *key)))
    assert tuple(int(w) for w in words) == expected


@given(st.lists(st.integers(0, ONES), min_size=6, max_size=6))
def test_philox_equals_big_integer_arithmetic(v: list[int]) -> None:
    # Oracle: the rounds written with Python's unbounded integers.
    c, k = v[:4], v[4:]
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & ONES, p0 >> 32 ^ c[3] ^ k[1], p0 & ONES]
        k = [k[0] + 0x9E3779B9 & ONES, k[1] + 0xBB67AE85 & ONES]
    assert [int(w) for w in random._philox(*(torch.tensor([x]) for x in v))] == c


def test_frozen_stream() -> None:
    # Frozen: printed by this call itself at version 0.1.0. It must not change: stored runs name
    # their draws by seed and index alone.
    keys = random.keys(0, [0, 1])
    assert keys.tolist() == FROZEN["keys"]
    assert random.fold(keys, "start", 2, 3).tolist() == FROZEN["fold"]
    assert random.words(keys, 3).tolist() == FROZEN["words"]


# --- laws (fixed keys, so that the p-values are constants; each is far from 0.01) -----------------

KEYS = random.keys(1, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_is_uniform(dtype: torch.dtype) -> None:
    # Oracle: scipy's Kolmogorov–Smirnov test.
    u = random.uniform(KEYS, (500,), dtype=dtype)
    assert u.dtype == dtype
    assert u.shape == (64, 500)
    assert bool(((u >= 0) & (u < 1)).all())
    assert stats.kstest(u.numpy().ravel(), "uniform").pvalue > 0.01
    assert stats.kstest(u[:, 0].numpy(), "uniform").pvalue > 0.01  # across keys, too


def test_uniform_in_float64_has_53_bits() -> None:
    u = random.uniform(KEYS, (100,), dtype=torch.float64)
    scaled = u * 2.0**53
    assert torch.equal(scaled, scaled.round())
    assert bool((scaled.long() % 2**29 != 0).any())  # more than the 24 bits of a float32


def test_uniform_between_ends() -> None:
    u = random.uniform(KEYS, (100,), -2.0, 3.0)
    assert stats.kstest(u.numpy().ravel(), "uniform", (-2, 5)).pvalue > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_is_normal(dtype: torch.dtype) -> None:
    # Oracle: scipy. Odd count: the last pair is cut.
    z = random.normal(KEYS, (501,), dtype)
    assert z.dtype == dtype
    assert stats.kstest(z.numpy().ravel(), "norm").pvalue > 0.01
    assert abs(np.corrcoef(z[:, 0], z[:, 1])[0, 1]) < 0.3  # the two of a Box–Muller pair


@pytest.mark.parametrize(("low", "high"), [(0, 2), (-3, 4), (0, 1000), (5, 6)])
def test_integers_are_uniform(low: int, high: int) -> None:
    # Oracle: scipy's chi-square test.
    drawn = random.integers(KEYS, low, high, (500,)).numpy().ravel()
    counts = np.bincount(drawn - low, minlength=high - low)
    assert len(counts) == high - low
    assert high - low == 1 or stats.chisquare(counts).pvalue > 0.01


def test_integers_span_31_bits() -> None:
    drawn = random.integers(KEYS, 0, 1 << 31, (100,))
    assert int(drawn.min()) < 1 << 22
    assert int(drawn.max()) > (1 << 31) - (1 << 22)


def test_permutations_are_uniform() -> None:
    # Oracle: scipy's chi-square test over all 24 permutations of four.
    drawn = random.permutation(random.keys(2, 4800), 4)
    assert torch.equal(drawn.sort(1).values, torch.arange(4).expand(4800, 4))
    code = (drawn * torch.tensor([64, 16, 4, 1])).sum(1)
    counts = np.unique(code.numpy(), return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 0.01


def test_permutation_of_none_and_one() -> None:
    assert random.permutation(KEYS, 0).shape == (64, 0)
    assert torch.equal(random.permutation(KEYS, 1), torch.zeros(64, 1, dtype=torch.int64))


# --- independence ---------------------------------------------------------------------------------


def test_purposes_steps_and_draws_are_independent() -> None:
    # Oracle: scipy's chi-square test of independence on an 8×8 table, and no collisions.
    keys = random.keys(0, 4000)
    families = [
        keys,
        random.fold(keys, "a"),
        random.fold(keys, "b"),
        random.fold(keys, "a", 1),
        random.fold(keys, "a", 0, 1),
        random.keys(1, 4000),
    ]
    assert len(torch.cat(families).unique()) == 6 * 4000
    cells = [(random.uniform(k) * 8).long() for k in families]
    for i, one in enumerate(cells):
        for other in cells[i + 1 :]:
            table = np.bincount((one * 8 + other).numpy(), minlength=64).reshape(8, 8)
            assert stats.chi2_contingency(table).pvalue > 0.001


def test_fold_takes_a_tensor_of_draws() -> None:
    keys = random.keys(0, 3)
    wide = random.fold(keys, "eot", 2, torch.tensor([0, 5]))
    assert wide.shape == (3, 2)
    assert torch.equal(wide[:, 0], random.fold(keys, "eot", 2, 0))
    assert torch.equal(wide[:, 1], random.fold(keys, "eot", 2, 5))


@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    index=st.lists(st.integers(0, 2**40), min_size=2, max_size=6, unique=True),
)
def test_draws_do_not_depend_on_the_place_in_a_batch(seed: int, index: list[int]) -> None:
    keys = random.keys(seed, index)
    assert keys.unique().numel() == len(index)
    back = random.keys(seed, index[::-1]).flip(0)
    assert torch.equal(keys, back)
    for draw in (
        lambda k: random.uniform(k, (3, 2)),
        lambda k: random.normal(k, (3,)),
        lambda k: random.integers(k, 0, 9, (2,)),
        lambda k: random.permutation(k, 5),
        lambda k: random.fold(k, "x", 1, 2),
    ):
        whole = draw(keys)
        assert torch.equal(torch.cat([draw(keys[i : i + 1]) for i in range(len(keys))]), whole)


def test_seeds_count_with_64_bits() -> None:
    seeds = [0, 1, -1, 2**32, 2**63, 2**64 - 2]
    assert len({int(random.keys(s, 1)) for s in seeds}) == len(seeds)
    assert torch.equal(random.keys(-1, 1), random.keys(2**64 - 1, 1))


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    assert torch.equal(random.words(KEYS, 9)[:, :5], random.words(KEYS, 5))


def test_scalar_and_empty_draws() -> None:
    assert random.uniform(KEYS).shape == (64,)
    assert random.uniform(random.keys(0, 0), (3,)).shape == (0, 3)
    assert random.normal(random.keys(0, []), (2,)).shape == (0, 2)
    assert random.entropy_keys(0).shape == (0,)


def test_entropy_keys_differ() -> None:
    drawn = torch.cat([random.entropy_keys(50), random.entropy_keys(50)])
    assert drawn.dtype == torch.int64
    assert drawn.unique().numel() == 100


def test_errors() -> None:
    with pytest.raises(DtypeError, match=r"random\.keys"):
        random.uniform(torch.zeros(2))
    with pytest.raises(RangeError, match="1 to 2\\^31"):
        random.integers(KEYS, 3, 3)
    with pytest.raises(RangeError, match="1 to 2\\^31"):
        random.integers(KEYS, 0, 2**31 + 1)
    with pytest.raises(ShapeError, match="n ≥ 0"):
        random.permutation(KEYS, -1)


@pytest.mark.gpu
def test_words_are_the_same_on_a_gpu() -> None:
    keys = random.keys(0, torch.arange(5, device="cuda"))
    assert torch.equal(keys.cpu(), random.keys(0, 5))
    assert torch.equal(random.words(keys, 100).cpu(), random.words(random.keys(0, 5), 100))


def test_numbers_do_not_hang_on_the_pieces(monkeypatch) -> None:
    """Property: words and normal numbers are the same, made at once or a few counters at a time."""
    keys = random.keys(3, 5)
    whole = random.words(keys, 39), random.normal(keys, (3, 13))
    monkeypatch.setattr(random, "_LANES", 12)
    assert torch.equal(random.words(keys, 39), whole[0])
    assert torch.equal(random.normal(keys, (3, 13)), whole[1])
