"""What a minimal-norm attack, and the one-pixel attack, does with input that makes little sense.

A clear error, or the result that its docstring states.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from feint.attacks import (
    carlini_wagner,
    ddn,
    deepfool,
    ead,
    fmn,
    jsma,
    lbfgs,
    one_pixel,
)
from feint.core.errors import FeintError, GradientError, ModelError, RangeError
from tests.tiny import LinearModel, behind, images, predicted

QUICK = {"search_steps": 3, "steps": 40, "initial_const": 0.1}
ATTACKS: dict[str, Callable[..., Tensor]] = {
    "carlini_wagner": partial(carlini_wagner, **QUICK),
    "ddn": partial(ddn, steps=30),
    "deepfool": partial(deepfool, steps=20),
    "ead": partial(ead, **QUICK),
    "fmn": partial(fmn, steps=30),
    "jsma": partial(jsma, gamma=1.0, both=True),
    "lbfgs": partial(lbfgs, **QUICK),
    "one_pixel": partial(one_pixel, popsize=20, generations=3),
}
GRADIENT = [name for name in ATTACKS if name != "one_pixel"]


@pytest.fixture(params=ATTACKS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


class Softmax(nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.inner = LinearModel(scale=scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).softmax(1)


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


class Outputs(nn.Module):
    """As many classes as wanted, of a batch that has another size, or no numbers."""

    def __init__(self, classes: int = 3, more: int = 0, value: float = 0.0) -> None:
        super().__init__()
        self.classes, self.more, self.value = classes, more, value

    def forward(self, x: Tensor) -> Tensor:
        logits = x.flatten(1)[:, : self.classes] + self.value
        return torch.cat([logits, logits[: self.more]]) if self.more else logits


def test_probabilities_are_attacked_as_they_are_and_told(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    # Oracle: the classes are those of the linear model behind the softmax.
    model = Softmax(scale=0.3)
    x = images(4, low=0.47, high=0.53)
    y = predicted(model, x)
    x_adv = ATTACKS[name](model, x, y)
    assert bool((predicted(model.inner, x_adv) != y).all())
    assert sum("softmax" in r.message for r in caplog.records) == (name != "one_pixel")
    caplog.clear()
    ATTACKS[name](model.inner, x, y)
    assert not caplog.records


@pytest.mark.parametrize("name", GRADIENT)
def test_a_saturated_softmax_is_an_error(name: str) -> None:
    # Oracle: the probabilities are 0 and 1 in float32, and none depends on the image any more.
    model = Softmax(scale=1e4)
    x = images(3)
    with pytest.raises(GradientError, match="identically zero"):
        ATTACKS[name](model, x, predicted(model, x))


def test_a_target_that_is_the_prediction_returns_x(name: str) -> None:
    # Oracle: closed form: nothing has to change.
    model = LinearModel()
    x = images(4)
    x_adv = ATTACKS[name](model, x, predicted(model, x), targeted=True)
    assert torch.equal(x_adv, x)


def test_a_mask_of_zeros_returns_x(name: str) -> None:
    # Oracle: closed form: nothing may change.
    model = LinearModel()
    x = images(4)
    mask = torch.zeros(4, 1, 4, 4, dtype=torch.bool)
    assert torch.equal(ATTACKS[name](model, x, predicted(model, x), mask=mask), x)


@pytest.mark.parametrize("name", GRADIENT)
def test_no_gradient_is_an_error_that_names_the_module(name: str) -> None:
    with pytest.raises(GradientError, match="module 'front'"):
        ATTACKS[name](behind(Detached(), LinearModel()), images(3), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Outputs(classes=1), "at least 2"),
        (Outputs(value=float("nan")), "NaN logits"),
        (Outputs(more=2), r"expected logits \(3, classes\)"),
    ],
    ids=["one class", "NaN", "another batch size"],
)
def test_outputs_that_are_no_logits_are_an_error(name: str, model: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ATTACKS[name](model, images(3), torch.zeros(3, dtype=torch.int64))


def test_a_label_beyond_the_classes_is_an_error(name: str) -> None:
    with pytest.raises(FeintError, match="classes"):
        ATTACKS[name](LinearModel(), images(3), torch.tensor([0, 1, 7]))


@pytest.mark.parametrize("popsize", [0, 3, 2.5])
def test_a_population_too_small_to_mutate_is_an_error(popsize: float) -> None:
    # Three members other than the one they are for.
    with pytest.raises(RangeError, match=r"popsize .* expected a whole number ≥ 4"):
        one_pixel(LinearModel(), images(3), torch.tensor([0, 1, 2]), popsize=popsize)
