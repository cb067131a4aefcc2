from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch
from scipy.optimize import fmin_l_bfgs_b
from torch import Tensor, nn

from feint.attacks import lbfgs
from tests.attacks.minimal import MinimalContract
from tests.tiny import SHAPE, LinearModel, TinyConv, images, predicted


class TestLBFGS(MinimalContract):
    attack = staticmethod(lbfgs)
    kwargs: ClassVar = {"search_steps": 5, "steps": 40, "initial_const": 0.1}
    precise: ClassVar = {"search_steps": 12, "steps": 100}
    scale = 30.0  # cross-entropy is then the margin; else it also flees from unlikely classes


def objective(model: nn.Module, x: Tensor, target: Tensor, c: float, point: Tensor) -> Tensor:
    loss = nn.functional.cross_entropy(model(point), target, reduction="none")
    return (point - x).square().flatten(1).sum(1) + c * loss


def least_by_scipy(model: nn.Module, x: Tensor, target: Tensor, c: float) -> float:
    """The minimum that scipy's L-BFGS-B finds for one image."""

    def fun(flat: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.from_numpy(flat).view(x.shape).requires_grad_()
        value = objective(model, x, target, c, point).sum()
        (gradient,) = torch.autograd.grad(value, point)
        return value.item(), gradient.numpy().ravel().copy()

    start = x.numpy().ravel()
    return float(fmin_l_bfgs_b(fun, start, bounds=[(0.0, 1.0)] * x.numel(), maxiter=1000)[1])


@pytest.mark.parametrize("binary", [False, True], ids=["inside", "at the ends"])
@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_minimum_is_that_of_scipy(c: float, binary: bool) -> None:
    # Oracle: scipy's L-BFGS-B on the same convex problem, in the box.
    model = LinearModel(dtype=torch.float64)
    x = images(4).double()
    x = x.round() if binary else x
    target = (predicted(model, x) + 1) % 5
    found = torch.full((4,), torch.inf, dtype=torch.float64)

    def trace(_: int, points: Tensor, logits: Tensor, loss: Tensor, rows: Tensor) -> None:
        with torch.no_grad():
            value = objective(model, x[rows], target[rows], c, points)
        found[rows] = torch.minimum(found[rows], value)

    lbfgs(model, x, target, targeted=True, search_steps=1, steps=300, initial_const=c, trace=trace)
    for i in range(4):
        best = least_by_scipy(model, x[i : i + 1], target[i : i + 1], c)
        assert float(found[i]) == pytest.approx(best, rel=0.01)


def test_minimum_on_a_network_is_about_that_of_scipy() -> None:
    # Oracle: scipy; the problem is hardly curved at this c, so there is one minimum to find.
    model = TinyConv()
    x = images(3, (3, 6, 6)).double()
    target = (predicted(model, x) + 1) % 5
    found = torch.full((3,), torch.inf, dtype=torch.float64)

    def trace(_: int, points: Tensor, logits: Tensor, loss: Tensor, rows: Tensor) -> None:
        with torch.no_grad():
            value = objective(model, x[rows], target[rows], 0.1, points)
        found[rows] = torch.minimum(found[rows], value)

    lbfgs(
        model, x, target, targeted=True, search_steps=1, steps=200, initial_const=0.1, trace=trace
    )
    for i in range(3):
        best = least_by_scipy(model, x[i : i + 1], target[i : i + 1], 0.1)
        assert float(found[i]) == pytest.approx(best, rel=0.01)


def test_preset_is_targeted() -> None:
    # Oracle: S1's own setting.
    model = LinearModel(dtype=torch.float64)
    x = images(3, SHAPE).double()
    target = (predicted(model, x) + 1) % 5
    x_adv = lbfgs(model, x, target, preset="qiu", initial_const=1.0, steps=60)
    assert torch.equal(predicted(model, x_adv), target)
