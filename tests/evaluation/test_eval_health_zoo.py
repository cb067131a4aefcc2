"""The zoo of masked gradients: every one is flagged and broken; honest defenses are neither.

Oracle: the classifier behind every mask is linear, and all samples lie closer to its boundary than
the budget, so that an attack that sees through the mask leaves nothing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from feint.core.errors import GradientError
from feint.evaluation import Batch, Cell, Evaluation, Finding, Subject, evaluate
from feint.evaluation.health import check_pipeline
from tests.evaluation.planted import ZOO
from tests.tiny import LinearModel, images, predicted

MODEL = LinearModel()
MANY = images(1500)
LABELS = predicted(MODEL, MANY)
DISTANCE = MODEL.distance(MANY, LABELS, "linf")
NEAR = ((DISTANCE > 0.01) & (DISTANCE < 0.03)).nonzero()[:32, 0]
X, Y = MANY[NEAR], LABELS[NEAR]
EPS = 0.06
NAIVE = "pgd(steps=20)"


def run(name: str, *rungs: tuple[str, str, str]) -> list[Evaluation]:
    """An evaluation for each rung."""
    found = []
    for scenario, attack, backward in rungs:
        model, defense = ZOO[name].build(LinearModel())
        options: dict[str, Any] = {"backward": backward} if scenario == "white-box" else {}
        if name == "misleading rule" and attack == NAIVE and backward == "default":
            options["backward"] = "backwards"
        if scenario == "transfer":
            options["source"] = LinearModel().eval()
        found.append(
            evaluate(
                model.eval() if name != "train and eval coupled" else model,
                X,
                Y,
                defense=defense,
                attacks=[attack],
                scenarios=[scenario],
                eps=EPS,
                judge_draws=16,
                **options,
            )
        )
    return found


def flagged(name: str) -> dict[str, Finding]:
    """What does not pass under an attack that knows nothing of the mask."""
    try:
        findings: list[Finding] = run(name, ("white-box", NAIVE, "default"))[0].findings
    except GradientError:
        # The attack itself refuses, and names the module; the checks must say so, too.
        model, defense = ZOO[name].build(LinearModel())
        cell = Cell("white-box", "m", attack=NAIVE, eps=EPS, defense="d" if defense else "none")
        batch = Batch(X[:16], Y[:16], torch.arange(16))
        findings = list(check_pipeline(Subject(model, defense), cell, batch))
    return {f.check: f for f in findings if f.status != "pass"}


def test_the_zoo_is_large_enough() -> None:
    assert len(ZOO) >= 10


@pytest.mark.parametrize("name", ZOO)
def test_every_mask_is_flagged(name: str) -> None:
    found = flagged(name)
    missing = set(ZOO[name].flags) - set(found)
    assert not missing, f"{name}: {missing} passed; {sorted(found)} did not"


@pytest.mark.parametrize("name", ZOO)
def test_every_mask_is_broken(name: str) -> None:
    """By every rung that its entry names; at least two for each."""
    rungs = ZOO[name].breaks
    assert len(rungs) >= 2
    for rung, found in zip(rungs, run(name, *rungs), strict=True):
        broken = [r for r in found.results if r.cell.attack != "none"][-1]
        assert broken.cell.scenario == rung[0]
        assert broken.accuracy.value <= 0.05, f"{name}: {rung} leaves {broken.accuracy}"


def test_masks_look_strong_to_who_knows_nothing() -> None:
    """They would be no masks otherwise: these leave most samples to the naive attack."""
    for name in ("shattered", "hidden quantisation", "flipped", "temperature", "stochastic"):
        found = run(name, ("white-box", NAIVE, "default"))[0]
        assert found.results[-1].accuracy.value > 0.3, name
        assert found.verdict.grade != "A", name
