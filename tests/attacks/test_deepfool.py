from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from feint.attacks import deepfool
from feint.core.errors import RangeError
from feint.core.gradients import eot
from feint.core.norms import distance
from tests.attacks.minimal import MinimalContract
from tests.tiny import Counting, LinearModel, TinyConv, images, predicted


class TestDeepFool(MinimalContract):
    attack = staticmethod(deepfool)
    kwargs: ClassVar = {"steps": 40}
    boxed = 1.02


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("targeted", [False, True])
def test_any_estimator_gives_the_jacobian(norm: str, targeted: bool) -> None:
    # Oracle: autograd. On a deterministic model all draws are the same.
    model = TinyConv()
    x = images(4, (3, 6, 6)).double()
    y = (predicted(model, x) + targeted) % 5
    direct = deepfool(model, x, y, norm=norm, targeted=targeted, steps=8)
    drawn = deepfool(model, x, y, norm=norm, targeted=targeted, steps=8, gradient=eot(3))
    torch.testing.assert_close(drawn, direct, rtol=0, atol=1e-9)
    for classes in (2, 3):
        direct = deepfool(model, x, y, norm=norm, targeted=targeted, steps=8, classes=classes)
        drawn = deepfool(
            model, x, y, norm=norm, targeted=targeted, steps=8, classes=classes, gradient=eot(2)
        )
        torch.testing.assert_close(drawn, direct, rtol=0, atol=1e-9)


def test_passes_are_those_documented() -> None:
    # Oracle: closed form. On a linear model one step crosses: K − 1 = 4 backward passes and two
    # forward ones, then one to move back. Those who never stop follow one rival from then on, or
    # more.
    inner = LinearModel(dtype=torch.float64)
    x = images(6, low=0.45, high=0.55).double()
    y = predicted(inner, x)
    on = {"stop": "never", "steps": 3, "refine": 0}
    for kwargs, backwards, forwards in (
        ({}, 4, 3),
        ({"classes": 3}, 2, 3),
        ({"refine": 0}, 4, 2),
        ({"refine": 4}, 4, 6),
        (on, 4 + 2 * 1, 4),
        ({**on, "follow": 2}, 4 + 2 * 2, 4),
        ({**on, "follow": 9}, 4 + 2 * 4, 4),
        ({**on, "classes": 2}, 1 + 2 * 1, 4),
    ):
        model = Counting(inner)
        deepfool(model, x, y, **kwargs)
        assert (model.backwards, model.forwards) == (6 * backwards, 6 * forwards), kwargs


def test_only_the_likeliest_classes_are_looked_at() -> None:
    # Oracle: closed form: with two classes, the distance to the runner-up's boundary.
    model = LinearModel(dtype=torch.float64)
    x = images(12, low=0.45, high=0.55).double()
    y = predicted(model, x)
    with torch.no_grad():
        second = model(x).scatter(1, y[:, None], -torch.inf).argmax(1)
    true = model.distances(x, y, "l2").gather(1, second[:, None])[:, 0]
    nearest = model.distance(x, y, "l2")
    assert bool((true > 1.05 * nearest).any())  # the runner-up is not always the nearest
    size = distance(deepfool(model, x, y, classes=2), x, "l2")
    # Another class may be met on the way there.
    assert bool((size <= 1.01 * true).all())
    assert bool((size[true == nearest] >= nearest[true == nearest]).all())
    full = distance(deepfool(model, x, y, classes="all"), x, "l2")
    assert bool((full <= 1.01 * nearest).all())


def test_refining_only_brings_it_nearer() -> None:
    # Oracle: the same run without; a large overshoot is taken back almost wholly.
    model = LinearModel(dtype=torch.float64)
    x = images(6, low=0.4, high=0.6).double()
    y = predicted(model, x)
    true = model.distance(x, y, "l2")
    far = distance(deepfool(model, x, y, overshoot=0.5, refine=0), x, "l2") / true
    near = distance(deepfool(model, x, y, overshoot=0.5, refine=2), x, "l2") / true
    assert bool(((far > 1.4) & (far < 1.6)).all())
    assert bool(((near >= 1) & (near < 1.01)).all())


@pytest.mark.parametrize("preset", ["original", "ace", "qiu"])
def test_presets_run_and_stay_in_the_box(preset: str) -> None:
    # Oracle: property, and the closed form within an overshoot.
    model = LinearModel(dtype=torch.float64)
    x = images(6, low=0.4, high=0.6).double()
    y = predicted(model, x)
    x_adv = deepfool(model, x, y, preset=preset)
    assert bool((predicted(model, x_adv) != y).all())
    assert bool((distance(x_adv, x, "l2") <= 1.021 * model.distance(x, y, "l2")).all())


@pytest.mark.parametrize(
    "bad", [{"classes": 1}, {"classes": "few"}, {"follow": 0}, {"refine": -1}, {"overshoot": -0.1}]
)
def test_bad_settings_are_refused(bad: dict) -> None:
    x = images(2)
    with pytest.raises(RangeError, match="expected"):
        deepfool(LinearModel(), x, torch.tensor([0, 1]), **bad)
