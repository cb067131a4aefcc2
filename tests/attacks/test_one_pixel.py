from __future__ import annotations

import itertools
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from feint.attacks import one_pixel
from feint.attacks.one_pixel import _State, _three, _trial
from feint.core import random
from feint.core.errors import RangeError
from feint.core.norms import distance
from tests.contracts.attack import AttackContract
from tests.contracts.attack_harness import HostSyncs
from tests.tiny import Counting, LinearModel, Round, behind, images, predicted

SMALL = (3, 3, 3)


class TestOnePixel(AttackContract):
    attack = staticmethod(one_pixel)
    kwargs: ClassVar = {"popsize": 24, "generations": 4}
    random = True


def log_odds(model: LinearModel, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x).detach()
    own = logits.gather(1, y[:, None])
    return logits.scatter(1, y[:, None], -torch.inf).logsumexp(1) - own[:, 0]


def every_pixel(model: LinearModel, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """The largest log odds that one pixel of a color in {0, 1}³ can reach, by trying all."""
    found = log_odds(model, x, y)
    for row, column in itertools.product(range(x.shape[2]), range(x.shape[3])):
        if mask is not None and not bool(mask[0, 0, row, column]):
            continue
        for color in itertools.product((0.0, 1.0), repeat=3):
            tried = x.clone()
            tried[:, :, row, column] = torch.tensor(color, dtype=x.dtype)
            found = torch.maximum(found, log_odds(model, tried, y))
    return found


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("strategy", ["rand1bin", "best1bin"])
def test_finds_the_best_pixel_of_all(strategy: str, masked: bool) -> None:
    # Oracle: brute force over all 9·8 (masked: 4·8) candidates.
    model = LinearModel(shape=SMALL, dtype=torch.float64)
    x = images(6, SMALL).double()
    y = predicted(model, x)
    mask = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 1]], dtype=torch.bool)[None, None]
    mask = mask if masked else None
    x_adv = one_pixel(
        model, x, y, popsize=150, generations=12, levels=2, start="uniform", strategy=strategy,
        mask=mask, stop="never",
    )  # fmt: skip
    best = every_pixel(model, x, y, mask)
    torch.testing.assert_close(log_odds(model, x_adv, y), best, rtol=0, atol=1e-12)
    fell = predicted(model, x_adv) != y
    assert torch.equal(fell, best > 0) or bool(fell.any())
    assert bool((distance(x_adv, x, "l0") <= 1).all())


def test_more_pixels_do_more() -> None:
    # Oracle: closed form: a linear score's gain is the sum of its pixels' gains, so that the best
    # two pixels are the best and the second best one. Evolution finds 90 % of it.
    model = LinearModel(classes=2, shape=SMALL, dtype=torch.float64)
    x = images(6, SMALL).double()
    y = predicted(model, x)
    slope = (model.weight[1 - y] - model.weight[y]).detach()
    gain = torch.where(slope > 0, slope * (1 - x), -slope * x).sum(1).flatten(1)
    two = gain.topk(2, dim=1).values.sum(1)
    x_adv = one_pixel(
        model, x, y, pixels=2, popsize=100, generations=30, levels=2, start="uniform", stop="never"
    )
    found = log_odds(model, x_adv, y) - log_odds(model, x, y)
    assert bool((found <= two + 1e-9).all())
    assert bool((found >= 0.9 * two).all())
    assert bool((distance(x_adv, x, "l0") <= 2).all())


@given(size=st.integers(4, 40), seed=st.integers(0, 2**32))
def test_the_three_members_differ(size: int, seed: int) -> None:
    # Oracle: property.
    own = torch.arange(size).expand(2, size)
    four = torch.stack([own, *_three(random.keys(seed, 2), size)])
    assert bool(((four >= 0) & (four < size)).all())
    for i, j in itertools.combinations(range(4), 2):
        assert bool((four[i] != four[j]).all())


def test_the_three_members_are_uniform() -> None:
    # Oracle: scipy's χ² test: each of the ordered triples of the others is equally likely.
    a, b, c = _three(random.keys(0, 6000), 5)
    code = (a * 25 + b * 5 + c)[:, 2]
    counts = code.bincount(minlength=125)
    counts = counts[counts > 0]
    assert len(counts) == 4 * 3 * 2
    assert stats.chisquare(counts.numpy()).pvalue > 0.01


def test_places_in_a_mask_are_all_reached_evenly_by_row() -> None:
    # Oracle: closed form: a row of the mask is drawn evenly, then a pixel in it.
    mask = torch.zeros(1, 1, 4, 5, dtype=torch.bool)
    mask[0, 0, 1, [0, 4]] = True
    mask[0, 0, 3, 2] = True
    x = torch.full((1, 3, 4, 5), 0.5)
    seen: list[Tensor] = []
    one_pixel(
        LinearModel(shape=(3, 4, 5)), x, torch.tensor([0]), popsize=4000, generations=1, mask=mask,
        chunk=4000,
        trace=lambda step, points, *rest: seen.append(points), stop="never",
    )  # fmt: skip
    changed = (seen[1] != 0.5).any(1).sum(0)
    assert int(changed.sum()) == 4000
    observed = changed[mask[0, 0]]
    assert stats.chisquare(observed.numpy(), [1000, 1000, 2000]).pvalue > 0.01


def test_colors_are_those_of_8_bit_images() -> None:
    # Oracle: property: a changed value is a whole multiple of 1/255, 0 and 255 among them.
    x = torch.full((1, 3, 4, 4), 0.501)
    seen: list[Tensor] = []
    one_pixel(
        LinearModel(), x, torch.tensor([0]), popsize=2000, generations=1, stop="never",
        trace=lambda step, points, *rest: seen.append(points),
    )  # fmt: skip
    values = seen[1][seen[1] != x.expand_as(seen[1])].double() * 255
    assert bool(((values - values.round()).abs() < 1e-4).all())
    assert float(values.min()) == 0
    assert float(values.max()) == pytest.approx(255)
    # N(128, 127) cut off at its ends: about 16 % of the values at each of them.
    assert stats.binomtest(int((values < 0.5).sum()), len(values), 0.16).pvalue > 1e-3


def test_passes_and_waits_are_those_documented() -> None:
    # Oracle: counts. Rounding has no gradient, and none is asked for.
    inner = behind(Round(64), LinearModel())
    model = Counting(inner)
    x = images(3)
    y = predicted(inner, x)
    one_pixel(model, x, y, popsize=10, generations=7, stop="never")
    assert (model.forwards, model.backwards) == (3 * (1 + 10 * 8), 0)
    # An image that is adversarial as it is costs one pass and stays.
    model.forwards = 0
    wrong = (y + 1) % 5
    assert torch.equal(one_pixel(model, x, wrong, popsize=10), x)
    assert model.forwards == 3

    def waits(generations: int, stop: str) -> int:
        hard = LinearModel()
        with torch.no_grad():
            hard.bias[0] += 1e3
        with HostSyncs() as syncs:
            one_pixel(hard, x, y * 0, popsize=6, generations=generations, stop=stop)
        return syncs.count

    assert waits(12, "never") == waits(2, "never")
    assert waits(12, "success") - waits(2, "success") == 10


def test_chunks_change_nothing() -> None:
    # Oracle: the run in one piece, bit by bit.
    model, x = LinearModel(), images(4)
    y = predicted(model, x)
    kwargs = {"popsize": 20, "generations": 5, "stop": "never"}
    whole = one_pixel(model, x, y, **kwargs)
    assert torch.equal(one_pixel(model, x, y, chunk=7, **kwargs), whole)


@pytest.mark.parametrize("preset", ["original", "ace", "keras"])
def test_presets_run(preset: str) -> None:
    # Oracle: property: one pixel at most, and never worse than the clean image.
    model, x = LinearModel(), images(2)
    y = predicted(model, x)
    x_adv = one_pixel(model, x, y, preset=preset, popsize=20, generations=2)
    assert bool((distance(x_adv, x, "l0") <= 1).all())
    assert bool((log_odds(model, x_adv, y) >= log_odds(model, x, y)).all())


@pytest.mark.parametrize("strategy", ["rand1bin", "best1bin"])
def test_trials_are_mutants_crossed_with_their_parents(strategy: str) -> None:
    # Oracle: closed form. CR = 0 leaves the one gene that is forced; with CR = 1 a trial is
    # base + F·(b − c) of other members wherever that lies in the unit cube.
    keys = random.keys(0, 3)
    genes = random.uniform(keys, (7, 2, 5))
    state = _State(torch.arange(3), genes, random.uniform(random.fold(keys, "worth"), (7,)))
    changed = (_trial(state, keys, strategy, 0.5, 0.5, 0.0) != genes).flatten(2).sum(2)
    assert bool((changed == 1).all())
    trial = _trial(state, keys, strategy, 0.25, 0.25, 1.0)
    base = genes[torch.arange(3), state.worth.argmax(1)]
    for row in range(3):
        for member in range(7):
            others = [m for m in range(7) if m != member]
            fitting = []
            for a, b, c in itertools.permutations(others, 3):
                start = base[row] if strategy == "best1bin" else genes[row, a]
                mutant = start + 0.25 * (genes[row, b] - genes[row, c])
                inside = (mutant >= 0) & (mutant < 1)
                fitting.append(bool((mutant == trial[row, member])[inside].all()))
            assert any(fitting)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"popsize": 3}, "popsize"),
        ({"pixels": 3, "eps": 2}, "more than the budget"),
        ({"pixels": 0}, "pixels"),
        ({"eps": -1}, "≥ 0"),
        ({"scale": (0.9, 0.5)}, "scale"),
        ({"crossover": 1.5}, "crossover"),
        ({"levels": 1}, "levels"),
    ],
)
def test_bad_options(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(RangeError, match=message):
        one_pixel(LinearModel(), images(1), torch.tensor([0]), **kwargs)
