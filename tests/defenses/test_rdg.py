"""RDG. Oracles: a plain numpy loop per image and axis, closed forms, FACTS' goldens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from feint.core import random
from feint.core.errors import RangeError, ShapeError
from feint.defenses import RDG
from feint.defenses.rdg import distortion_map
from tests.contracts.defense import DefenseContract, images


class TestRDG(DefenseContract):
    cls = RDG
    configs = ({}, {"preset": "paper"}, {"delta": 0.9}, {"delta": 0.5, "random_corner": True})
    min_side = 10
    max_side = 24
    batch_atol = 0.0


class TestWideStrips(DefenseContract):
    cls = RDG
    configs = ({"strips": 3}, {"strips": 3, "delta": 0.0})
    min_side = 3
    batch_atol = 0.0


def by_hand(factors: np.ndarray, n: int, strips: int) -> np.ndarray:
    """One axis, strip by strip, from the description of the original: linspace, round, clamp."""
    width = n // strips
    out = np.zeros(n)
    start = 0.0
    for k, first in enumerate(range(0, n, width)):
        stop = start + width * factors[k]
        end = first + width
        if end > n:
            end, stop = n, float(n)
        out[first:end] = np.linspace(start, stop, end - first)
        start = stop
    return np.minimum(np.round(out).astype(int), n - 1)


@given(data=st.data())
def test_map_equals_the_plain_loop(data: st.DataObject) -> None:
    strips = data.draw(st.integers(1, 12))
    n = data.draw(st.integers(strips, 120))
    count = -(-n // (n // strips))
    factors = data.draw(
        st.lists(st.floats(0, 2), min_size=count, max_size=count).map(np.array), "factors"
    )
    got = distortion_map(torch.tensor(factors)[None], n, n // strips)[0]
    assert got.tolist() == by_hand(factors, n, strips).tolist()


@pytest.mark.parametrize("n", [299, 300, 32, 39, 19])
def test_drawn_maps_equal_the_plain_loop(n: int) -> None:
    # Oracle: the same keyed factors through the plain loop, for whole and partial last strips.
    keys = random.keys(1, 5)
    drawn = RDG(delta=0.25).draw(keys, torch.Size((5, 3, n, n + 8)))
    for name, side in (("rows", n), ("columns", n + 8)):
        count = -(-side // (side // 10))
        u = random.uniform(random.fold(keys, name), (count,), -0.25, 0.25, torch.float64)
        for got, row in zip(drawn[name].numpy(), 1 + u.numpy(), strict=True):
            np.testing.assert_array_equal(got, by_hand(row, side, 10))


def test_output_equals_the_pixelwise_loop() -> None:
    rdg, x, keys = RDG(), images(2, 2, 3, 12, 15), random.keys(0, 2)
    params = rdg.draw(keys, x.shape)
    y = rdg(x, keys)
    for b in range(2):
        for i in range(12):
            for j in range(15):
                source = x[b, :, params["rows"][b, i], params["columns"][b, j]]
                assert torch.equal(y[b, :, i, j], source)


def test_without_distortion_it_is_not_the_identity() -> None:
    """Closed form: FACTS §10.3; 299 px, δ = 0: 11 repeats, displacement 0 or 1."""
    source = distortion_map(torch.ones(1, 11, dtype=torch.float64), 299, 29)[0]
    displacement = source - torch.arange(299)
    assert set(displacement.tolist()) == {0, 1}
    assert 299 - len(source.unique()) == 11
    assert source.tolist() == by_hand(np.ones(11), 299, 10).tolist()


def test_small_images() -> None:
    # Closed form: 32 px make ten strips of 3 px and one of 2, which ends at 32, clamped to 31.
    source = distortion_map(torch.ones(1, 11, dtype=torch.float64), 32, 3)[0]
    assert source.tolist()[:6] == [0, 2, 3, 3, 4, 6]
    assert source.tolist()[-2:] == [30, 31]
    with pytest.raises(ShapeError, match="strips=10"):
        RDG()(images(0, 1, 3, 9, 40))


def test_a_random_corner_mirrors_the_map() -> None:
    # Closed form: starting right, out[x] reads n−1−m[n−1−x]; each corner has probability ½.
    keys = random.keys(4, 400)
    shape = torch.Size((400, 1, 30, 33))
    plain = RDG(random_corner=False).draw(keys, shape)
    mirrored = RDG(random_corner=True).draw(keys, shape)
    flips = []
    for name, n in (("rows", 30), ("columns", 33)):
        flipped = n - 1 - plain[name].flip(1)
        is_plain = (mirrored[name] == plain[name]).all(1)
        is_flipped = (mirrored[name] == flipped).all(1)
        assert bool((is_plain | is_flipped).all())
        flips.append(is_flipped & ~is_plain)
    both = flips[0] & flips[1]
    for share, p in ((flips[0], 0.5), (flips[1], 0.5), (both, 0.25)):
        sigma = (p * (1 - p) / 400) ** 0.5
        assert abs(share.double().mean().item() - p) < 4 * sigma


@pytest.mark.parametrize(("delta", "mean", "most"), [(0.15, 4.1, 9.2), (0.25, 7.0, 15.2)])
def test_displacement(delta: float, mean: float, most: float) -> None:
    """Frozen values of FACTS §10.3 for the original: mean and mean maximum |displacement|."""
    rows = RDG(delta=delta).draw(random.keys(0, 4000), torch.Size((4000, 3, 299, 299)))["rows"]
    moved = (rows - torch.arange(299)).abs().double()
    assert moved.mean().item() == pytest.approx(mean, rel=0.05)
    assert moved.amax(1).mean().item() == pytest.approx(most, rel=0.05)


def test_gradient_goes_to_the_sampled_pixels() -> None:
    # Closed form: the derivative of Σ out with respect to a pixel is how often it is sampled.
    rdg, keys = RDG(), random.keys(0, 1)
    x = images(0, 1, 1, 20, 20).requires_grad_()
    (g,) = torch.autograd.grad(rdg(x, keys).sum(), x)
    params = rdg.draw(keys, x.shape)
    count = [torch.bincount(params[name][0], minlength=20) for name in ("rows", "columns")]
    assert torch.equal(g[0, 0], (count[0][:, None] * count[1][None]).float())


def test_presets_and_bad_configurations() -> None:
    assert RDG().config["delta"] == 0.25
    paper = RDG(preset="paper")
    assert (paper.delta, paper.random_corner) == (0.15, True)
    assert RDG(preset="paper", delta=0.2).delta == 0.2
    with pytest.raises(RangeError, match="delta"):
        RDG(delta=1.5)
    with pytest.raises(RangeError, match="strips"):
        RDG(strips=0)


@pytest.mark.reference
@pytest.mark.parametrize(
    ("config", "rms", "ssim"),
    [
        ({"delta": 0.0}, 0.0547, 0.811),
        ({"delta": 0.15}, 0.136, 0.446),
        ({"delta": 0.25}, 0.157, 0.399),
        ({"delta": 0.15, "random_corner": True}, 0.129, 0.463),
        ({"delta": 0.25, "random_corner": True}, 0.151, 0.416),
    ],
)
def test_golden_distances_on_natural_images(config, rms: float, ssim: float, natural) -> None:
    """Frozen values of FACTS §§9.2 and 10.3 (δ = 0: on other images of the same kind).

    Over 25 images one draw has a standard deviation of 3 % (rms), so eight are averaged.
    """
    draws = [natural.distances(RDG(**config), seed) for seed in range(8)]
    got_rms, got_ssim = np.mean(draws, 0)
    assert got_rms == pytest.approx(rms, rel=0.1)
    assert got_ssim == pytest.approx(ssim, rel=0.1)
