"""Region-based classification. Oracles: the uniform law (scipy), a plain count of votes, and the
closed form of the vote of a linear classifier on one pixel."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from feint.core import random
from feint.core.errors import ConfigError, RangeError
from feint.defenses import RegionBased
from feint.evaluation import Pipeline
from tests.contracts.defense import DefenseContract, images


class TestRegionBased(DefenseContract):
    cls = RegionBased
    configs = ({}, {"preset": "ace"}, {"radius": 0.3}, {"radius": 0.2, "edge": "clip"})
    batch_atol = 0.0


@pytest.mark.parametrize("value", [0.0, 0.05, 0.5, 0.93, 1.0])
def test_points_are_uniform_on_the_cut_hypercube(value: float) -> None:
    """Oracle: Kolmogorov–Smirnov (scipy) against U(max(0, x − r), min(1, x + r))."""
    x = torch.full((40, 3, 10, 10), value, dtype=torch.float64)
    y = RegionBased(radius=0.2)(x, random.keys(0, 40)).flatten().numpy()
    low, high = max(0.0, value - 0.2), min(1.0, value + 0.2)
    assert low <= y.min()
    assert y.max() <= high
    assert stats.kstest(y, stats.uniform(low, high - low).cdf).pvalue > 1e-3


def test_clipped_points_pile_up_at_the_ends() -> None:
    """Oracle: half of U(−r, r) lies below zero."""
    x = torch.zeros(40, 3, 10, 10)
    y = RegionBased(radius=0.2, edge="clip")(x, random.keys(0, 40))
    assert float((y == 0).double().mean()) == pytest.approx(0.5, abs=5 * 0.5 / 12000**0.5)


class Threshold(nn.Module):
    """Class 1 above a threshold of the first pixel."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        z = x[:, 0, 0, 0] - self.threshold
        return torch.stack([-z, z], 1)


def test_majority_vote_is_a_count_and_follows_the_volume() -> None:
    """Oracles: counting draw by draw; the share of the hypercube beyond the plane,
    (x + r − t) / 2r."""
    r, votes, shares = 0.1, 400, (0.1, 0.45, 0.7)
    x = torch.full((3, 1, 2, 2), 0.5)
    for i, share in enumerate(shares):
        x[i, 0, 0, 0] = 0.5 + r * (2 * share - 1)
    model, defense, keys = Threshold(0.5), RegionBased(radius=r), random.keys(7, 3)
    pipeline = Pipeline(model, defense, votes=votes, combine="majority")
    logits = pipeline(x, keys)
    assert logits.argmax(1).tolist() == [0, 0, 1]
    draws = random.fold(keys, "vote", 0, torch.arange(votes))
    counted = torch.stack(
        [model(defense(x, random.fold(draws[:, v], "defense"))).argmax(1) for v in range(votes)]
    )
    share = counted.double().mean(0)
    spread = 5 * (0.25 / votes) ** 0.5
    torch.testing.assert_close(share, torch.tensor(shares).double(), rtol=0, atol=spread)
    torch.testing.assert_close(logits[:, 1].double(), share, rtol=0, atol=1 / votes)


def test_no_radius_is_the_identity() -> None:
    x = images(0, 2, 3, 5, 5)
    defense = RegionBased(radius=0)
    assert not defense.stochastic
    assert torch.equal(defense(x), x)


@pytest.mark.parametrize("radius", [-0.1, 1.1, 5.1, float("nan")])
def test_bad_radius(radius: float) -> None:
    with pytest.raises(RangeError, match="in image units"):
        RegionBased(radius=radius)


def test_bad_edge() -> None:
    with pytest.raises(ConfigError, match="'cut' or 'clip'"):
        RegionBased(edge="wrap")  # type: ignore[arg-type]
