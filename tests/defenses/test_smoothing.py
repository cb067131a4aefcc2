"""Smoothing. Oracles: scipy's binomial tests and intervals, the closed form of a linear classifier
(its smoothed decision, probability and true radius are known), a coin."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from feint.core import random
from feint.core.errors import RangeError, ShapeError
from feint.defenses import Smoothing
from feint.defenses.smoothing import ABSTAIN, certified_radius, lower_bound
from feint.evaluation import Pipeline
from tests.contracts.defense import DefenseContract, images


class TestSmoothing(DefenseContract):
    cls = Smoothing
    configs = ({}, {"sigma": 1.0}, {"sigma": 0.5, "clip": True}, {"sigma": 0})
    batch_atol = 0.0


class Plane(nn.Module):
    """Two classes on either side of a plane, logits ∓(w·x + b)."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = images(1, n).double() - 0.5
        self.bias = -0.5 * self.weight.sum()

    def forward(self, x: Tensor) -> Tensor:
        z = (x.double().flatten(1) * self.weight).sum(1) + self.bias
        return torch.stack([-z, z], 1)


class Coin(nn.Module):
    """Class 1 with probability p, whatever the image."""

    stochastic = True

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        heads = random.uniform(keys) < self.p
        return torch.stack([~heads, heads], 1).float()


def test_noise_is_normal() -> None:
    """Oracle: Kolmogorov–Smirnov (scipy); nothing is cut."""
    y = Smoothing(sigma=0.5)(torch.zeros(20, 3, 16, 16), random.keys(0, 20))
    assert stats.kstest(y.double().flatten().numpy(), stats.norm(0, 0.5).cdf).pvalue > 1e-3
    assert float(y.min()) < -1
    cut = Smoothing(sigma=0.5, clip=True)(torch.zeros(20, 3, 16, 16), random.keys(0, 20))
    assert torch.equal(cut, y.clamp(0, 1))


@pytest.mark.parametrize("n", [1, 10, 1000, 100_000])
@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.5])
def test_bound_is_clopper_pearson(n: int, alpha: float) -> None:
    """Oracles: scipy's exact one-sided interval, and its definition: at the bound, as many hits
    come with chance α."""
    hits = sorted({0, 1, n // 3, n // 2, n - 1, n})
    bounds = lower_bound(torch.tensor(hits), n, alpha).tolist()
    for k, bound in zip(hits, bounds, strict=True):
        interval = stats.binomtest(k, n, alternative="greater").proportion_ci(1 - alpha, "exact")
        assert bound == pytest.approx(interval.low, abs=1e-9)
        if k:
            assert stats.binom.sf(k - 1, n, bound) == pytest.approx(alpha, rel=1e-6)


def test_radius_is_the_normal_quantile() -> None:
    """Oracle: scipy's norm.ppf; equal votes give σ·Φ⁻¹(α^(1/n)) (Cohen et al. §3.2.2: about 4 σ at
    n = 100 000)."""
    p = torch.tensor([0.5, 0.6, 0.99, 0.99993], dtype=torch.float64)
    torch.testing.assert_close(certified_radius(p, 0.25), 0.25 * torch.tensor(stats.norm.ppf(p)))
    most = certified_radius(lower_bound(torch.tensor([100_000]), 100_000, 0.001), 1.0)
    assert float(most) == pytest.approx(stats.norm.ppf(0.001**1e-5), rel=1e-9)
    assert 3.8 < float(most) < 4


def test_radius_of_a_linear_classifier_is_the_distance_to_its_plane() -> None:
    """Closed form: P(class) = Φ(d/σ) with d the distance to the plane, so the certified radius at
    the exact probability is d; estimated from n draws it stays below d, but for α of all samples,
    and gets near to it."""
    model, x, sigma = Plane(48), images(0, 60, 3, 4, 4).double(), 0.25
    margin = model(x)[:, 1] / model.weight.norm()
    exact = torch.special.ndtr(margin.abs() / sigma)
    torch.testing.assert_close(certified_radius(exact, sigma), margin.abs())
    n, alpha = 4000, 0.001
    keys = random.keys(3, 60)
    found = Smoothing(sigma=sigma).certify(model, x, keys, n0=200, n=n, alpha=alpha)
    sure = found.prediction != ABSTAIN
    assert bool(sure.any())
    assert bool((~sure).any()), "no image near the plane: abstention is not tested"
    assert torch.equal(found.prediction[sure], (margin > 0).long()[sure])
    above = int((found.radius > margin.abs()).sum())
    assert above <= stats.binom.ppf(0.9999, 60, alpha)
    chosen = torch.where(found.prediction == ABSTAIN, found.hits / n > 0.5, True)
    share = torch.where(chosen, exact, 1 - exact)
    spread = 5 * (share * (1 - share) / n).sqrt() + 1e-3
    assert bool(((found.hits / n - share).abs() <= spread).all())
    # The bound costs about 3.1 standard errors of the probability, through Φ⁻¹.
    loss = (
        8.5
        * (exact * (1 - exact) / n).sqrt()
        / torch.special.ndtri(exact).square().mul(-0.5).exp()
        * math.sqrt(2 * math.pi)
    )
    near = margin.abs() / sigma < 2.5
    assert bool((found.radius >= margin.abs() - sigma * loss)[near].all())
    assert bool((found.radius[~sure] == 0).all())


def test_bounds_hold_as_often_as_they_say() -> None:
    """Oracle: the coin's own probability; 600 bounds at α = 0.05, violations within five standard
    deviations of what is allowed, and not none at all."""
    n, alpha, p = 200, 0.05, 0.7
    x, keys = torch.zeros(600, 1, 1, 1), random.keys(1, 600)
    found = Smoothing().certify(Coin(p), x, keys, n0=50, n=n, alpha=alpha)
    heads = found.hits > n // 2
    wrong = int((found.lower[heads] > p).sum())
    assert 0 < wrong <= 600 * alpha + 5 * math.sqrt(600 * alpha * (1 - alpha))


def test_a_fair_coin_makes_it_abstain() -> None:
    x, keys = torch.zeros(200, 1, 1, 1), random.keys(2, 200)
    found = Smoothing().certify(Coin(), x, keys, n0=20, n=500, alpha=0.001)
    assert int((found.prediction != ABSTAIN).sum()) <= 2
    assert int((Smoothing().predict(Coin(), x, keys, n=500) != ABSTAIN).sum()) <= 2


def test_prediction_is_scipys_binomial_test() -> None:
    defense, x, keys = Smoothing(), torch.zeros(100, 1, 1, 1), random.keys(4, 100)
    got = defense.predict(Coin(0.6), x, keys, n=150, alpha=0.05)
    found = defense.counts(Coin(0.6), x, random.fold(keys, "predict"), n=150)
    assert bool((found.sum(1) == 150).all())
    for row, prediction in zip(found.tolist(), got.tolist(), strict=True):
        test = stats.binomtest(max(row), sum(row), 0.5)
        assert prediction == (row.index(max(row)) if test.pvalue <= 0.05 else ABSTAIN)
    assert {ABSTAIN, 1} <= set(got.tolist())


def test_counts_hang_on_keys_alone() -> None:
    """Neither on the chunk nor on batch-mates nor on n for the draws that are shared."""
    model, x, keys = Plane(48), images(5, 6, 3, 4, 4), random.keys(6, 6)
    defense = Smoothing(sigma=0.5)
    whole = defense.counts(model, x, keys, n=50)
    for chunk in (1, 7, 50, 10_000):
        assert torch.equal(defense.counts(model, x, keys, n=50, chunk=chunk), whole)
    assert torch.equal(defense.counts(model, x[2:4], keys[2:4], n=50), whole[2:4])
    assert bool((defense.counts(model, x, keys, n=30) <= whole).all())


def test_vote_of_the_pipeline_is_the_smoothed_classifier() -> None:
    """Oracle: the sign of the margin, where it is clear."""
    model, x = Plane(48), images(7, 12, 3, 4, 4)
    z = model(x)[:, 1] / model.weight.norm()
    clear = z.abs() > 0.1
    logits = Pipeline(model, Smoothing(), votes=200, combine="majority")(x, random.keys(0, 12))
    assert torch.equal(logits.argmax(1)[clear], (z > 0).long()[clear])


def test_certified_is_right_and_far_enough() -> None:
    model, x = Plane(48), images(0, 20, 3, 4, 4)
    found = Smoothing().certify(model, x, random.keys(0, 20), n0=50, n=500)
    y = (model(x)[:, 1] > 0).long()
    assert torch.equal(found.certified(y, 0.1), found.radius >= 0.1)
    assert not found.certified(1 - y, 0.0)[found.prediction != ABSTAIN].any()


def test_empty_batch() -> None:
    x, keys = torch.zeros(0, 3, 4, 4), random.keys(0, 0)
    assert Smoothing().certify(Plane(48), x, keys, n0=2, n=5).radius.shape == (0,)
    assert Smoothing().predict(Plane(48), x, keys, n=5).shape == (0,)


@pytest.mark.parametrize("sigma", [-0.1, float("nan"), float("inf")])
def test_bad_sigma(sigma: float) -> None:
    with pytest.raises(RangeError, match="σ ≥ 0 in image units"):
        Smoothing(sigma=sigma)


def test_bad_arguments() -> None:
    model, x, keys = Plane(48), images(0, 2, 3, 4, 4), random.keys(0, 2)
    with pytest.raises(RangeError, match="between 0 and 1"):
        Smoothing().certify(model, x, keys, alpha=0)
    with pytest.raises(RangeError, match="between 0 and 1"):
        Smoothing().predict(model, x, keys, alpha=1)
    with pytest.raises(RangeError, match="at least 1 each"):
        Smoothing().counts(model, x, keys, n=0)
    with pytest.raises(RangeError, match="without noise"):
        Smoothing(sigma=0).certify(model, x, keys)
    with pytest.raises(RangeError, match="expected \\[0, 1\\]"):
        Smoothing().certify(model, x * 255, keys)
    with pytest.raises(ShapeError, match="keys are"):
        Smoothing().certify(model, x, keys[:1])
