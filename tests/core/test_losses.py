"""Losses against their formulas in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax
from torch import Tensor

from feint.core import random
from feint.core.errors import ConfigError, UnknownNameError
from feint.core.losses import (
    LOSSES,
    adversarial,
    cross_entropy,
    dlr,
    get_loss,
    margin,
    success_share,
    targeted_dlr,
)


def logits(count: int = 7, classes: int = 6, seed: int = 0) -> Tensor:
    return 3 * random.normal(random.keys(seed, count), (classes,), torch.float64)


def labels(count: int = 7, classes: int = 6) -> Tensor:
    return random.integers(random.keys(9, count), 0, classes)


def numpy_margin(z: np.ndarray, y: int) -> float:
    return float(np.delete(z, y).max() - z[y])


def numpy_dlr(z: np.ndarray, y: int) -> float:
    # Croce & Hein 2020, eq. (7), its sign as printed: −(z_y − max_{j≠y} z_j) / (z_π1 − z_π3).
    top = np.sort(z)[::-1]
    return -(z[y] - np.delete(z, y).max()) / (top[0] - top[2])


def numpy_targeted_dlr(z: np.ndarray, t: int, y: int) -> float:
    # Eq. (8), to be maximised: −(z_y − z_t) / (z_π1 − (z_π3 + z_π4)/2).
    top = np.sort(z)[::-1]
    return -(z[y] - z[t]) / (top[0] - (top[2] + top[3]) / 2)


ORACLES: dict[str, Callable[[np.ndarray, int], float]] = {
    "cross_entropy": lambda z, y: float(-log_softmax(z)[y]),
    "margin": numpy_margin,
    "dlr": numpy_dlr,
}


def test_every_loss_has_an_oracle() -> None:
    assert set(ORACLES) == set(LOSSES)


@pytest.mark.parametrize("name", list(LOSSES))
def test_values(name: str) -> None:
    z, y = logits(), labels()
    expected = [ORACLES[name](a, int(b)) for a, b in zip(z.numpy(), y, strict=True)]
    got = get_loss(name)(z, y)
    assert got.shape == (7,)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("name", ["cross_entropy", "margin"])
def test_targeted_forms_turn_the_sign(name: str) -> None:
    z, y = logits(), labels()
    assert torch.equal(get_loss(name, targeted=True)(z, y), -get_loss(name)(z, y))


def test_targeted_dlr() -> None:
    z, t = logits(), labels()
    y = (t + 2) % 6
    expected = [
        numpy_targeted_dlr(a, int(b), int(c)) for a, b, c in zip(z.numpy(), t, y, strict=True)
    ]
    np.testing.assert_allclose(targeted_dlr(z, t, y).numpy(), expected, rtol=1e-10)
    # Without the true class: the likeliest class other than the target stands in for it.
    rival = z.scatter(1, t[:, None], -torch.inf).argmax(1)
    torch.testing.assert_close(get_loss("dlr", targeted=True)(z, t), targeted_dlr(z, t, rival))


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("name", list(LOSSES))
@given(shift=st.floats(-50, 50), seed=st.integers(0, 2**32))
def test_a_constant_on_every_logit_changes_nothing(
    name: str, targeted: bool, shift: float, seed: int
) -> None:
    # Oracle: property.
    z, y = logits(seed=seed), labels()
    loss = get_loss(name, targeted)
    torch.testing.assert_close(loss(z + shift, y), loss(z, y), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_dlr_does_not_depend_on_the_scale(factor: float) -> None:
    # Oracle: property: that is what DLR is for.
    z, y = logits(), labels()
    torch.testing.assert_close(dlr(factor * z, y), dlr(z, y), rtol=1e-8, atol=0)
    torch.testing.assert_close(targeted_dlr(factor * z, y), targeted_dlr(z, y), rtol=1e-8, atol=0)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("name", list(LOSSES))
def test_gradients(name: str, targeted: bool) -> None:
    # Oracle: finite differences (torch.autograd.gradcheck, float64).
    loss, y = get_loss(name, targeted), labels()
    assert torch.autograd.gradcheck(lambda z: loss(z, y), logits().requires_grad_())


@pytest.mark.parametrize("name", list(LOSSES))
def test_draws_broadcast(name: str) -> None:
    z, y = logits(12).view(4, 3, 6), labels(4)
    got = get_loss(name)(z, y)
    assert got.shape == (4, 3)
    for d in range(3):
        torch.testing.assert_close(got[:, d], get_loss(name)(z[:, d], y))


def test_extreme_logits_stay_finite() -> None:
    # Oracle: closed form. A saturated softmax gives the gap itself, not log 0.
    z = torch.tensor([[0.0, 1000.0, 0.0, 0.0]])
    assert cross_entropy(z, torch.tensor([0])).item() == 1000.0
    assert margin(z, torch.tensor([1])).item() == -1000.0
    flat = torch.zeros(1, 4)
    assert dlr(flat, torch.tensor([0])).item() == 0.0
    assert targeted_dlr(flat, torch.tensor([0])).item() == 0.0


def test_own_functions_pass_through() -> None:
    def mine(z: Tensor, y: Tensor) -> Tensor:
        return z.sum(-1)

    assert get_loss(mine) is mine
    assert get_loss(mine, targeted=True) is mine


def test_errors_name_the_fix() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'margin'"):
        get_loss("margn")
    with pytest.raises(ConfigError, match="'dlr' needs at least 3 classes; the model gives 2; use"):
        dlr(logits(classes=2), labels(classes=2))
    with pytest.raises(ConfigError, match="at least 4 classes"):
        targeted_dlr(logits(classes=3), labels(classes=3))


# --- who is adversarial ---------------------------------------------------------------------------


def test_adversarial_by_hand() -> None:
    z = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0], [torch.nan, 0.0], [0.0, torch.nan]])
    y = torch.zeros(5, dtype=torch.int64)
    # A tie goes to the first class; NaN is nobody's success, targeted or not.
    assert adversarial(z, y).tolist() == [True, False, False, False, False]
    assert adversarial(z, y, targeted=True).tolist() == [False, True, True, False, False]


def test_margin_is_positive_exactly_where_the_prediction_differs() -> None:
    z, y = logits(200), labels(200)
    assert torch.equal(margin(z, y) > 0, adversarial(z, y))


def test_success_share_is_the_mean_over_draws() -> None:
    z: Any = torch.tensor([[[1.0, 2.0], [2.0, 1.0], [0.0, 3.0], [0.0, 1.0]]])
    assert success_share(z, torch.tensor([0])).tolist() == [0.75]
    assert success_share(z[:, 0], torch.tensor([0])).tolist() == [1.0]
