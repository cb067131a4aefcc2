from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from feint.attacks import carlini_wagner
from feint.core.errors import RangeError
from feint.core.losses import margin
from tests.attacks.minimal import MinimalContract
from tests.tiny import Counting, LinearModel, TinyConv, images, predicted

QUICK = {"search_steps": 4, "steps": 60, "step_size": 0.1, "initial_const": 0.1}


class TestCarliniWagner(MinimalContract):
    attack = staticmethod(carlini_wagner)
    kwargs: ClassVar = QUICK
    precise: ClassVar = {"search_steps": 6, "steps": 600, "step_size": 0.01}


@pytest.mark.parametrize("kappa", [0.5, 2.0])
@pytest.mark.parametrize("targeted", [False, True])
def test_kappa_is_reached_and_not_overdone(kappa: float, targeted: bool) -> None:
    # Oracle: closed form for two classes: the distance grows in proportion to margin + κ.
    model = LinearModel(classes=2, dtype=torch.float64)
    x = images(6, low=0.45, high=0.55).double()
    y = predicted(model, x)
    goal = 1 - y if targeted else y
    x_adv = carlini_wagner(
        model, x, goal, search_steps=6, steps=300, kappa=kappa, targeted=targeted
    )
    with torch.no_grad():
        before, after = margin(model(x), y), margin(model(x_adv), y)
    assert bool((after >= kappa).all())
    true = model.distance(x, y, "l2") * (kappa - before) / -before
    size = (x_adv - x).flatten(1).norm(dim=1)
    assert bool((size <= 1.03 * true).all())


def test_samples_leave_one_by_one() -> None:
    # Oracle: counts. The passes of a batch are the sum of those of its samples run alone, but for
    # the rows that wait for the next compaction, ten steps at most.
    inner = TinyConv()
    x = images(5, (3, 6, 6)).double()
    y = predicted(inner, x)

    def passes(rows: slice) -> int:
        model = Counting(inner)
        carlini_wagner(model, x[rows], y[rows], **QUICK)
        return model.forwards

    alone = [passes(slice(i, i + 1)) for i in range(5)]
    assert len(set(alone)) > 1
    assert passes(slice(0, 5)) == sum(alone)


def test_one_round_takes_the_constant_as_given() -> None:
    # Oracle: closed form on a linear model with two classes: the minimum of ‖δ‖² − c·w·δ is at
    # distance c‖w‖/2, which falls short of the boundary for a small c, so nothing is found.
    model = LinearModel(classes=2, dtype=torch.float64)
    slope = (model.weight[0] - model.weight[1]).detach()
    x = (0.5 + 0.2 * slope.sign())[None]
    y = torch.tensor([0])
    gap = float(model.distance(x, y, "l2"))
    kw = {"search_steps": 1, "steps": 300}
    short = carlini_wagner(model, x, y, initial_const=0.2 * gap / float(slope.norm()), **kw)
    assert torch.equal(short, x)
    there = carlini_wagner(model, x, y, initial_const=4 * gap / float(slope.norm()), **kw)
    assert predicted(model, there).tolist() == [1]
    assert float((there - x).norm()) <= 1.02 * gap


@pytest.mark.parametrize("preset", ["ace", "qiu"])
def test_presets_run(preset: str) -> None:
    # Oracle: the settings named: S1's is targeted with κ = 10.
    model = LinearModel(dtype=torch.float64, scale=3.0)
    x = images(3, low=0.45, high=0.55).double()
    y = predicted(model, x)
    goal = (y + 1) % 5 if preset == "qiu" else y
    x_adv = carlini_wagner(model, x, goal, preset=preset, steps=100)
    now = predicted(model, x_adv)
    if preset == "qiu":
        with torch.no_grad():
            assert bool((-margin(model(x_adv), goal) >= 10).all())
        assert torch.equal(now, goal)
    else:
        assert bool((now != y).all())


@pytest.mark.parametrize(
    "bad", [{"search_steps": 0}, {"kappa": -1.0}, {"initial_const": float("nan")}]
)
def test_bad_settings_are_refused(bad: dict) -> None:
    x = images(2)
    with pytest.raises(RangeError, match="expected"):
        carlini_wagner(LinearModel(), x, torch.tensor([0, 1]), **bad)
