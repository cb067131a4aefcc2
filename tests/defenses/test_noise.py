"""Noise. Oracles: scipy's distributions, closed forms of variance and gradient."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from feint.core import random
from feint.core.errors import ConfigError, RangeError
from feint.defenses import Noise
from tests.contracts.defense import DefenseContract, images


class TestNoise(DefenseContract):
    cls = Noise
    configs = (
        {},
        {"kind": "uniform", "scale": 0.05},
        {"kind": "sign", "scale": 0.01},
        {"scale": 0.0},
    )
    batch_atol = 0.0


def _noise(kind: str, scale: float) -> torch.Tensor:
    x = torch.full((4, 3, 50, 50), 0.5, dtype=torch.float64)
    return (Noise(kind=kind, scale=scale)(x, random.keys(0, 4)) - x) / scale


@pytest.mark.parametrize(
    ("kind", "cdf"), [("gaussian", stats.norm.cdf), ("uniform", stats.uniform(-1, 2).cdf)]
)
def test_distribution(kind: str, cdf) -> None:
    # Oracle: scipy's Kolmogorov-Smirnov test.
    assert stats.kstest(_noise(kind, 0.05).flatten().numpy(), cdf).pvalue > 0.01


def test_sign_noise_is_a_fair_coin_per_value() -> None:
    z = _noise("sign", 0.05)
    assert torch.allclose(z.abs(), torch.ones_like(z))
    heads = int((z > 0).sum())
    assert stats.binomtest(heads, z.numel()).pvalue > 0.01
    # neighbors, channels and samples do not repeat one another
    for a, b in ((z[..., 1:], z[..., :-1]), (z[:, 1:], z[:, :-1]), (z[1:], z[:-1])):
        assert abs(float((a * b).mean())) < 4 / a.numel() ** 0.5


def test_values_are_clipped_and_the_gradient_with_them() -> None:
    # Closed form: slope 1 where x + noise is inside of (0, 1), 0 where it is not.
    noise, keys = Noise(scale=0.5), random.keys(1, 2)
    x = images(0, 2, 3, 9, 9).requires_grad_()
    y = noise(x, keys)
    (g,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(g, ((y > 0) & (y < 1)).float())
    assert 0 < float(g.mean()) < 1


def test_bad_configurations_are_refused() -> None:
    with pytest.raises(ConfigError, match="gaussian"):
        Noise(kind="salt")  # type: ignore[arg-type]
    with pytest.raises(RangeError, match="scale"):
        Noise(scale=-0.1)
