"""Norms, projections, steps and random points against numpy, scipy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats
from torch import Tensor

from feint.core import random
from feint.core.errors import ConfigError
from feint.core.norms import (
    NORMS,
    check_norm,
    distance,
    norm_of,
    project,
    random_in_ball,
    steepest_ascent,
)

SHAPE = (3, 4, 5)
ORDER = {"linf": np.inf, "l2": 2, "l1": 1}


def deltas(count: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return random.normal(random.keys(seed, count), SHAPE, dtype)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_norms_equal_numpy(norm: str, dtype: torch.dtype) -> None:
    delta = deltas(dtype=dtype)
    expected = np.linalg.norm(delta.double().numpy().reshape(6, -1), ORDER[norm], axis=1)
    np.testing.assert_allclose(norm_of(delta, norm).numpy(), expected, rtol=1e-6)


def test_l0_counts_changed_pixels() -> None:
    # Oracle: by hand. Two channels of one pixel are one change.
    delta = torch.zeros(2, *SHAPE)
    delta[0, 0, 1, 1] = delta[0, 2, 1, 1] = delta[0, 1, 3, 4] = 1e-9
    assert norm_of(delta, "l0").tolist() == [2, 0]
    assert norm_of(torch.tensor([[0.0, 1.0, -2.0]]), "l0").tolist() == [2]


def test_distance_is_measured_in_float64() -> None:
    # Oracle: by hand. In float32, 3072 differences of one part in 2²³ would round.
    x = torch.full((1, 3, 32, 32), 0.5)
    x_adv = torch.nextafter(x, torch.ones(()))
    step = 2.0**-24
    assert distance(x_adv, x, "linf").item() == step
    assert distance(x_adv, x, "l1").item() == 3072 * step
    assert distance(x_adv, x, "l2").item() == pytest.approx(3072**0.5 * step, rel=1e-14)
    assert distance(x_adv, x, "l0").item() == 1024


@pytest.mark.parametrize("norm", NORMS)
def test_norms_of_empty_batches_and_images(norm: str) -> None:
    assert norm_of(torch.zeros(0, *SHAPE), norm).shape == (0,)
    assert norm_of(torch.zeros(2, 3, 0, 5), norm).tolist() == [0, 0]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("radius", [0.0, 0.3, 100.0])
def test_linf_and_l2_projections(norm: str, radius: float) -> None:
    # Oracle: closed form, in numpy.
    delta = deltas()
    flat = delta.numpy().reshape(6, -1)
    if norm == "linf":
        expected = np.clip(flat, -radius, radius)
    else:
        expected = flat * np.minimum(1, radius / np.linalg.norm(flat, axis=1, keepdims=True))
    got = project(delta, norm, radius).numpy().reshape(6, -1)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-14)


def l1_by_bisection(v: np.ndarray, radius: float) -> np.ndarray:
    """The soft threshold at which ‖v‖₁ becomes the radius, by scipy's root finder."""
    if np.abs(v).sum() <= radius:
        return v

    def excess(t: float) -> float:
        return np.maximum(np.abs(v) - t, 0).sum() - radius

    t = optimize.brentq(excess, 0, np.abs(v).max(), xtol=1e-15)
    return np.sign(v) * np.maximum(np.abs(v) - t, 0)


@given(radius=st.floats(0.01, 60), seed=st.integers(0, 2**32))
def test_l1_projection_equals_bisection(radius: float, seed: int) -> None:
    # Oracle: scipy.
    delta = deltas(4, seed)
    expected = [l1_by_bisection(v, radius) for v in delta.numpy().reshape(4, -1)]
    got = project(delta, "l1", radius).numpy().reshape(4, -1)
    np.testing.assert_allclose(got, np.stack(expected), rtol=0, atol=1e-9)


def test_l1_projection_solves_the_quadratic_program() -> None:
    # Oracle: scipy's SLSQP on min ‖u − v‖² with u = p − q, p, q ≥ 0, Σ(p + q) ≤ r.
    v = deltas(1)[0].flatten()[:6].numpy()
    n, r = len(v), 1.2
    solved = optimize.minimize(
        lambda z: float(((z[:n] - z[n:] - v) ** 2).sum()),
        np.zeros(2 * n),
        bounds=[(0, None)] * (2 * n),
        constraints={"type": "ineq", "fun": lambda z: r - z.sum()},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    got = project(torch.tensor(v)[None], "l1", r)[0].numpy()
    np.testing.assert_allclose(got, solved.x[:n] - solved.x[n:], rtol=0, atol=1e-6)


def test_l1_projection_of_ties_and_zeros() -> None:
    # Oracle: by hand.
    delta = torch.tensor([[1.0, -1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    got = project(delta, "l1", 1.5)
    assert torch.equal(got, torch.tensor([[0.5, -0.5, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]]))


def test_l1_projection_reaches_its_radius_in_float32() -> None:
    # Oracle: closed form, over as many values as an ImageNet image has.
    delta = random.normal(random.keys(0, 2), (3, 224, 224))
    size = norm_of(project(delta, "l1", 12.0).double(), "l1")
    torch.testing.assert_close(size, torch.full((2,), 12.0).double(), rtol=1e-6, atol=0)


def test_l0_projection_keeps_the_largest_pixels() -> None:
    # Oracle: numpy's sort of the pixels' energies.
    delta = deltas()
    got = project(delta, "l0", 4)
    energy = delta.square().sum(1).flatten(1).numpy()
    for row, kept in zip(energy, (got != 0).any(1).flatten(1).numpy(), strict=True):
        assert set(np.flatnonzero(kept)) == set(np.argsort(-row)[:4])
    assert bool(((got == delta) | (got == 0)).all())


@pytest.mark.parametrize("norm", NORMS)
@given(radius=st.floats(0, 80), seed=st.integers(0, 2**32))
def test_projections_are_idempotent_and_inside(norm: str, radius: float, seed: int) -> None:
    # Oracle: property.
    delta = deltas(3, seed)
    once = project(delta, norm, radius)
    assert bool((norm_of(once, norm) <= np.ceil(radius) + 1e-9 if norm == "l0" else
                 norm_of(once, norm) <= radius * (1 + 1e-12) + 1e-12).all())  # fmt: skip
    torch.testing.assert_close(project(once, norm, radius), once, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_a_radius_per_sample(norm: str) -> None:
    delta = deltas(3)
    radii = torch.tensor([1.0, 3.0, 7.0], dtype=torch.float64)
    each = [project(delta[i : i + 1], norm, float(r)) for i, r in enumerate(radii)]
    assert torch.equal(project(delta, norm, radii), torch.cat(each))


# --- steps ----------------------------------------------------------------------------------------


def test_linf_and_l2_steps() -> None:
    # Oracle: closed form. They maximise ⟨g, u⟩ over the unit ball: the dual norm.
    g = deltas()
    for norm, dual in (("linf", "l1"), ("l2", "l2")):
        u = steepest_ascent(g, norm)
        gain = (g * u).flatten(1).sum(1)
        torch.testing.assert_close(gain, norm_of(g, dual), rtol=1e-12, atol=0)
        torch.testing.assert_close(norm_of(u, norm), torch.ones(6).double())


def test_l1_step_is_the_largest_values_in_proportion() -> None:
    # Oracle: by hand. 60 values: 5 % are three of them.
    g = torch.zeros(1, 60)
    g[0, [3, 10, 20, 30]] = torch.tensor([4.0, -3.0, 1.0, 0.5])
    expected = torch.zeros(1, 60)
    expected[0, [3, 10, 20]] = torch.tensor([0.5, -0.375, 0.125])
    torch.testing.assert_close(steepest_ascent(g, "l1"), expected)
    assert torch.equal(steepest_ascent(g[:, :11], "l1")[0, [3, 10]], torch.tensor([1.0, 0.0]))


def test_l0_step_takes_whole_pixels() -> None:
    g = deltas()
    u = steepest_ascent(g, "l0")
    assert norm_of(u, "l0").tolist() == [1] * 6  # 5 % of 20 pixels
    pixel = g.abs().sum(1).flatten(1).argmax(1)[:, None, None].expand(-1, 3, 1)
    moved, slope = (t.flatten(2).gather(2, pixel)[..., 0] for t in (u, g))
    torch.testing.assert_close(moved, slope / slope.abs().amax(1, keepdim=True))


@pytest.mark.parametrize("norm", NORMS)
def test_steps_of_zero_tiny_and_huge_gradients(norm: str, dtype: torch.dtype) -> None:
    # Oracle: property: the direction does not depend on the length; zero stays zero.
    g = deltas(dtype=dtype)
    unit = steepest_ascent(g, norm)
    for factor in (2.0**-100, 2.0**60):
        torch.testing.assert_close(steepest_ascent(g * factor, norm), unit, rtol=1e-5, atol=1e-7)
    assert torch.equal(steepest_ascent(g * 0, norm), g * 0)


# --- random points --------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_random_points_are_uniform_in_the_ball(norm: str) -> None:
    # Oracle: scipy. P(‖δ‖ ≤ t·r) = tⁿ; each coordinate is symmetric about 0.
    n, radius = 12, 0.7
    keys = random.keys(5, 3000)
    delta = random_in_ball(keys, torch.zeros(3000, 3, 2, 2, dtype=torch.float64), norm, radius)
    size = norm_of(delta, norm) / radius
    assert bool((size <= 1 + 1e-12).all())
    assert stats.kstest(size.numpy() ** n, "uniform").pvalue > 0.01
    first = delta[:, 0, 0, 0].numpy()
    assert stats.kstest(first, -first).pvalue > 0.01
    if norm == "l2":  # the marginal law of a uniform ball: x² is Beta(½, (n + 1)/2)
        law = stats.beta(0.5, (n + 1) / 2)
        assert stats.kstest((first / radius) ** 2, law.cdf).pvalue > 0.01
    if norm == "l1":  # |x| is Beta(1, n)
        assert stats.kstest(np.abs(first) / radius, stats.beta(1, n).cdf).pvalue > 0.01


def test_random_points_in_l0_change_that_many_pixels() -> None:
    delta = random_in_ball(random.keys(0, 200), torch.zeros(200, *SHAPE), "l0", 3)
    assert norm_of(delta, "l0").tolist() == [3] * 200
    hits = (delta != 0).any(1).flatten(1).sum(0).numpy()
    assert stats.chisquare(hits).pvalue > 0.01


@pytest.mark.parametrize("norm", NORMS)
def test_random_points_keep_shape_and_follow_keys(norm: str, dtype: torch.dtype) -> None:
    keys, like = random.keys(0, 4), torch.zeros(4, *SHAPE, dtype=dtype)
    delta = random_in_ball(keys, like, norm, 2.0)
    assert (delta.shape, delta.dtype) == (like.shape, dtype)
    assert torch.equal(random_in_ball(keys.flip(0), like, norm, 2.0).flip(0), delta)
    assert random_in_ball(keys[:0], like[:0], norm, 2.0).shape == (0, *SHAPE)
    assert torch.equal(random_in_ball(keys, like, norm, 0.0), like)


def test_unknown_norm() -> None:
    with pytest.raises(ConfigError, match="norm is 'l3'; expected one of linf, l2, l1, l0"):
        norm_of(deltas(), "l3")
    with pytest.raises(ConfigError, match="expected one of linf"):
        check_norm("l2", ("linf",))
