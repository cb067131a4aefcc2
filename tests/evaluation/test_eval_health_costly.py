"""The checks on request: each fires on a planted defect, and is silent without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.errors import UnknownNameError
from feint.defenses.base import Params
from feint.evaluation import Finding, evaluate
from feint.evaluation.health import controls
from tests.evaluation.planted import (
    FlippedMask,
    Hot,
    Jitter,
    Steps,
    StochasticMask,
    plant,
)
from tests.tiny import LinearModel, StochasticLinear, TinyConv, images, predicted

MODEL = LinearModel()
MANY = images(900)
LABELS = predicted(MODEL, MANY)
DISTANCE = MODEL.distance(MANY, LABELS, "linf")


def near(low: float, high: float, count: int = 24) -> tuple[Tensor, Tensor]:
    """Images whose distance to the boundary is known to lie in an interval."""
    pick = ((low < DISTANCE) & (high > DISTANCE)).nonzero()[:count, 0]
    assert len(pick) >= 10
    return MANY[pick], LABELS[pick]


def run(
    check: str,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: str = "pgd(steps=12)",
    **more: Any,
) -> Finding:
    """The gravest finding of a costly check."""
    options = {"scenarios": ["white-box"], "eps": 0.05, "judge_draws": 16}
    found = evaluate(model.eval(), x, y, attacks=[attack], checks=check, **{**options, **more})
    order = ["pass", "warn", "fail"]
    names = "defense" in more and more["defense"] is not None
    mine = [f for f in found.findings if f.check == check]
    mine = [f for f in mine if not names or "+" in f.subject] or mine
    return max(mine, key=lambda f: order.index(f.status))


def test_costly_checks_wait_until_they_are_asked_for() -> None:
    x, y = near(0.0, 0.1)
    quick = evaluate(LinearModel().eval(), x, y, attacks=["pgd(steps=3)"], eps=0.05)
    assert not {f.check for f in quick.findings} & {"binarisation", "known-broken-controls"}
    with pytest.raises(UnknownNameError, match="equal-budget"):
        evaluate(LinearModel().eval(), x, y, eps=0.05, checks="equal-budgets")


def test_more_restarts() -> None:
    """A single start in a random direction, of which each finds its way with chance."""
    check, (x, y) = "more-restarts-do-not-help", near(0.0, 0.1)

    class Walls(nn.Module):
        """Half of the starts, told apart by the first pixel, see no slope."""

        def __init__(self) -> None:
            super().__init__()
            self.model = LinearModel()

        def forward(self, z: Tensor) -> Tensor:
            logits = self.model(z)
            blind = (z[:, 0, 0, 0] * 997).frac() < 0.5
            return torch.where(blind[:, None], logits.detach() + 0 * logits, logits)

    assert run(check, Walls(), x, y, "pgd(steps=1, step_size=0.05)", eps=0.1).status != "pass"
    assert run(check, LinearModel(), x, y).status == "pass"
    assert "no restarts" in run(check, LinearModel(), x, y, "fgsm").evidence


def test_more_draws() -> None:
    """Noise that two draws do not resolve."""
    check, (x, y) = "more-draws-do-not-help", near(0.01, 0.03)
    weak = "pgd(steps=1, step_size=0.05, random_start=False, gradient=eot(2))"
    many = "pgd(steps=8, gradient=eot(256))"

    class Loud(StochasticMask):
        def transform(self, x: Tensor, params: Params) -> Tensor:
            noise = params["noise"].to(x.dtype)
            return x + 1e-4 * noise + 3 * noise * (x - x.detach())

    few = run(check, LinearModel(), x, y, weak, defense=Loud())
    assert "4 draws per gradient instead of 2" in few.evidence
    assert few.status != "pass"
    assert run(check, LinearModel(), x, y, many, defense=Loud()).status == "pass"
    assert "0 draws" in run(check, LinearModel(), x, y).evidence


def test_losses_that_disagree() -> None:
    check, (x, y) = "loss-disagreement", near(0.02, 0.04)
    assert run(check, Hot(LinearModel()), x, y).status == "fail"
    assert run(check, LinearModel(), x, y).status == "pass"


def test_a_black_box_that_wins() -> None:
    check, (x, y) = "black-box-does-not-win", near(0.01, 0.03)
    attack = "pgd(steps=6, random_start=False)"
    assert run(check, LinearModel(), x, y, attack, defense=FlippedMask()).status == "fail"
    assert run(check, LinearModel(), x, y).status == "pass"


class Slopes(nn.Module):
    """Two classes whose boundary tilts at random around the middle of the box, keyed."""

    stochastic = True

    def __init__(self, tilt: float) -> None:
        super().__init__()
        self.linear, self.tilt = LinearModel(classes=2), tilt

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        keys = random.entropy_keys(len(x), x.device) if keys is None else keys
        slope = self.tilt * random.normal(keys, x.shape[1:], x.dtype)
        tilted = ((x - 0.5) * slope).flatten(1).sum(1)
        return self.linear(x) + torch.stack([torch.zeros_like(tilted), tilted], 1)


def test_frozen_randomness() -> None:
    """Samples 0.04 from the mean boundary, out of reach for 0.03; a known tilt is within reach."""
    linear, y = LinearModel(classes=2), torch.arange(24) % 2
    away = (linear.weight[1] - linear.weight[0]).detach().sign()
    side = (2.0 * y - 1).view(-1, 1, 1, 1)
    x = 0.5 + 0.04 * side * away + images(24, low=-1e-3, high=1e-3)
    check = "frozen-randomness"
    wild = run(check, Slopes(2.8), x, y, eps=0.03)
    assert wild.status == "warn", wild
    assert run(check, Slopes(0.05), x, y, eps=0.03).status == "pass"
    assert "0 draws to freeze" in run(check, linear, x, y, eps=0.03).evidence


def test_equal_budget() -> None:
    """Two steps of a sixth of the way: sixteen with one draw each arrive, two with eight do not."""
    check, (x, y) = "equal-budget", near(0.03, 0.04)
    short = "pgd(steps=2, step_size=0.008, random_start=False)"
    calm = Jitter(sigma=0.002)
    assert run(check, LinearModel(), x, y, short, defense=calm, eps=0.06).status == "fail"
    assert run(check, LinearModel(), x, y, defense=calm, eps=0.06).status == "pass"


def test_a_stand_in_that_does_not_attack_the_bare_model() -> None:
    check, (x, y) = "stand-in-on-undefended", near(0.01, 0.03)
    good = run(check, LinearModel(), x, y, defense=Steps(levels=64))
    bad = run(
        check,
        LinearModel(),
        x,
        y,
        "pgd(steps=12, random_start=False)",
        defense=Steps(levels=64),
        backward="backwards",
    )
    assert (good.status, bad.status) == ("pass", "fail")
    assert "0 stand-ins" in run(check, LinearModel(), x, y).evidence


@pytest.mark.parametrize("model", [LinearModel(), TinyConv(), StochasticLinear(sigma=0.002)])
def test_binarisation_is_passed_by_an_honest_attack(model: nn.Module) -> None:
    """Oracle: the planted example exists, and the attack has a true gradient."""
    x, y = near(0.0, 0.2)
    found = run("binarisation", model, x.to(next(model.parameters()).dtype), y)
    assert found.status == "pass", found


def test_binarisation_catches_a_masked_gradient() -> None:
    x, y = near(0.0, 0.2)
    attack = "pgd(steps=12, random_start=False)"
    found = run("binarisation", LinearModel(), x, y, attack, defense=FlippedMask())
    assert found.status == "fail", found


def test_a_rerun_that_comes_out_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attack that works the first time only."""
    times: list[int] = []

    def once(model: Any, x: Tensor, y: Tensor, *, eps: float = 0.1, seed: Any = 0) -> Tensor:
        times.append(1)
        weight = MODEL.weight.detach()
        other = model(x).scatter(1, y[:, None], -torch.inf).argmax(1)
        step = eps * (weight[other] - weight[y]).sign()
        return (x + (step if len(times) == 1 else 0 * step)).clamp(0, 1)

    x, y = near(0.01, 0.03)
    check = "rerun-agrees"
    assert run(check, LinearModel(), x, y, plant(monkeypatch, "once", once)).status == "fail"
    assert run(check, LinearModel(), x, y).status == "pass"


def test_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: shares written by hand for what the attack leaves of each control."""
    check, (x, y) = "known-broken-controls", near(0.0, 0.1)
    left: dict[str, Any] = {}

    def known(cell: Any, model: str, defense: str, batch_size: int) -> Any:
        name = "standing" if model.endswith("-at") else defense
        return left.get(name, np.full(32, 1.0 if name == "standing" else 0.0))

    monkeypatch.setattr(controls, "_left", known)
    monkeypatch.setattr(controls, "AUTOATTACK", (1, 3, 5, 7))
    assert run(check, LinearModel(), x, y).status == "pass"
    half = np.r_[np.ones(16), np.zeros(16)]
    for name, shares in (("none", half), ("jpeg(quality=75)", half), ("standing", 0 * half)):
        left[name] = shares
        found = run(check, LinearModel(), x, y)
        assert found.status == "fail", (name, found)
        left.pop(name)


@pytest.mark.slow
def test_controls_on_the_bundled_models() -> None:
    """Real images: PGD breaks what is known to be broken, and not the adversarially trained one."""
    x, y = near(0.0, 0.1)
    found = run("known-broken-controls", LinearModel(), x, y, "pgd(steps=20)", eps=8 / 255)
    assert found.status == "pass", found
