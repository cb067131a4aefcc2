"""ME-Net. Oracles: numpy's SVD as in the original procedure, autograd through torch's SVD where no
two singular values are near, finite differences, the optimality conditions of the nuclear norm."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from feint.core import random
from feint.core.errors import ConfigError, RangeError
from feint.defenses import MENet
from feint.defenses._spectral import soft_threshold, truncate
from tests.contracts.defense import DefenseContract, images


class TestMENet(DefenseContract):
    cls = MENet
    configs = (
        {},
        {"preset": "robust", "channels": "separate"},
        {"keep": 0.5, "method": "nuclear", "steps": 4},
        {"keep": 1.0, "rank": 0.3},
    )


def matrices(seed: int, *shape: int) -> Tensor:
    return images(seed, *shape).double() - 0.5


def estimate(image: np.ndarray, mask: np.ndarray, rank: int) -> np.ndarray:
    """USVT of one matrix in [−1, 1], step by step."""
    u, s, v = np.linalg.svd(image * mask, full_matrices=False)
    s[rank:] = 0
    return np.clip((u * s) @ v / mask.mean(), -1, 1)


@pytest.mark.parametrize(("height", "width"), [(12, 12), (20, 9), (7, 30), (1, 4), (30, 2)])
@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_usvt_is_numpys(height: int, width: int, keep: float) -> None:
    x, keys = images(0, 4, 3, height, width).double(), random.keys(1, 4)
    for channels in ("concat", "separate"):
        defense = MENet(keep=keep, channels=channels)  # type: ignore[arg-type]
        mask, got = defense.sample(x, keys)["mask"], defense(x, keys)
        mask = mask.expand_as(x).numpy().astype(float)
        for i in range(4):
            a, m = 2 * x[i].numpy() - 1, mask[i]
            rank = max(1, int(0.8 * height))
            if channels == "concat":
                whole = estimate(np.concatenate(a, 1), np.concatenate(m, 1), rank)
                expected = np.stack(np.split(whole, 3, 1))
            else:
                expected = np.stack([estimate(*pair, rank) for pair in zip(a, m, strict=True)])
            np.testing.assert_allclose(got[i].numpy(), (expected + 1) / 2, rtol=0, atol=1e-7)


def test_entries_are_dropped_as_often_as_said() -> None:
    """Oracle: counting, within five standard deviations; a pixel's channels together or not."""
    shape = torch.Size((20, 3, 32, 32))
    for keep in (0.5, 0.9):
        mask = MENet(keep=keep).draw(random.keys(0, 20), shape)["mask"]
        assert mask.shape == shape
        spread = 5 * (keep * (1 - keep) / mask.numel()) ** 0.5
        assert abs(float(mask.double().mean()) - keep) < spread
    assert MENet(channels="separate").draw(random.keys(0, 20), shape)["mask"].shape[1] == 1


@pytest.mark.parametrize("shape", [(6, 6), (5, 9), (9, 5), (1, 4)])
def test_gradients_are_those_of_torchs_svd(shape: tuple[int, int]) -> None:
    """Oracle: autograd through torch.linalg.svd in float64, on matrices without near ties."""
    cotangent = matrices(9, 3, *shape)
    for number, function in (
        (0, lambda a: truncate(a, 2)),
        (1, lambda a: soft_threshold(a, 0.6)),
    ):
        a = matrices(number, 3, *shape).requires_grad_()
        u, s, v = torch.linalg.svd(a, full_matrices=False)
        s = s * (torch.arange(s.shape[-1]) < 2) if number == 0 else (s - 0.6).clamp_min(0)
        expected = (u * s[:, None]) @ v
        got = function(a)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
        (g,) = torch.autograd.grad(got, a, cotangent)
        (h,) = torch.autograd.grad(expected, a, cotangent)
        torch.testing.assert_close(g, h, rtol=1e-6, atol=1e-8)


def test_ties_do_not_break_the_gradient() -> None:
    """Oracle: finite differences at a multiple of an orthogonal matrix, whose singular values are
    all equal and where torch's own SVD gives NaN; finite values at zero."""
    q = torch.linalg.qr(matrices(0, 1, 5, 5))[0]
    a = (2 * q).requires_grad_()
    cotangent, direction = matrices(1, 1, 5, 5), matrices(2, 1, 5, 5)
    (g,) = torch.autograd.grad(soft_threshold(a, 0.5), a, cotangent)
    h = 1e-6
    up, down = (soft_threshold(a.detach() + s * h * direction, 0.5) for s in (1, -1))
    expected = ((up - down) * cotangent).sum() / (2 * h)
    assert float((g * direction).sum()) == pytest.approx(float(expected), rel=1e-5)
    zero = torch.zeros(1, 4, 6, dtype=torch.float64, requires_grad=True)
    for function in (lambda z: truncate(z, 2), lambda z: soft_threshold(z, 0.5)):
        assert bool(torch.autograd.grad(function(zero).sum(), zero)[0].isfinite().all())


def test_nuclear_norm_of_a_fully_observed_matrix() -> None:
    """Closed form: singular values lowered by μ/2."""
    x = images(3, 2, 1, 8, 10).double()
    got = MENet(keep=1.0, method="nuclear", mu=1.4, steps=3)(x)
    for i in range(2):
        u, s, v = np.linalg.svd(2 * x[i, 0].numpy() - 1, full_matrices=False)
        expected = np.clip((u * np.maximum(s - 0.7, 0)) @ v, -1, 1)
        np.testing.assert_allclose(got[i, 0].numpy(), (expected + 1) / 2, rtol=0, atol=1e-9)


def test_nuclear_norm_reaches_its_minimum() -> None:
    """Oracle: at the minimum G = (2/μ)·mask·(A − W) is a subgradient of the nuclear norm: its
    largest singular value is 1, and ⟨G, W⟩ is the nuclear norm of W."""
    a = matrices(4, 2, 10, 14)
    mask = (images(5, 2, 10, 14) < 0.6).double()
    w = MENet(method="nuclear", mu=1.0, steps=2000)._estimate(a, mask)
    g = 2 * mask * (a - w)
    assert bool((torch.linalg.matrix_norm(g, 2) <= 1 + 1e-6).all())
    nuclear = torch.linalg.matrix_norm(w, "nuc")
    torch.testing.assert_close((g * w).sum((1, 2)), nuclear, rtol=1e-6, atol=1e-8)
    assert bool((nuclear > 0.1).all())

    def energy(z: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(z, "nuc") + (mask * (z - a)).square().sum((1, 2))

    few = MENet(method="nuclear", steps=100)._estimate(a, mask)
    torch.testing.assert_close(energy(few), energy(w), rtol=1e-4, atol=0)


def test_a_low_rank_image_is_filled_in() -> None:
    """Closed form: a rank-1 matrix of which 70 % is observed is recovered as μ → 0."""
    column, row = images(6, 1, 20, 1).double(), images(7, 1, 1, 20).double()
    a = 0.3 + 0.6 * column * row
    mask = (images(8, 1, 20, 20) < 0.7).double()
    w = MENet(method="nuclear", mu=1e-3, steps=600)._estimate(a, mask)
    assert float((w - a).abs().max()) < 5e-3
    assert float((a * (1 - mask)).abs().max()) > 0.3


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        ({"keep": 0.0}, RangeError, "keep is 0.0; expected a share"),
        ({"keep": 1.2}, RangeError, "keep is 1.2"),
        ({"rank": 0.0}, RangeError, "rank is 0.0"),
        ({"mu": 0.0}, RangeError, "μ > 0"),
        ({"steps": 0}, RangeError, "whole number ≥ 1"),
        ({"method": "svd"}, ConfigError, "'usvt' or 'nuclear'"),
        ({"channels": "all"}, ConfigError, "'concat' or 'separate'"),
    ],
)
def test_bad_arguments(config: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        MENet(**config)  # type: ignore[arg-type]
