"""Checks of cells: each fires on its planted defect, and not on an honest attack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from feint.evaluation import Evaluation, Finding, evaluate
from feint.evaluation.checklist import CHECKS, COSTLY
from tests.evaluation.planted import (
    Coin,
    Flipped,
    Jitter,
    Through,
    greedy,
    outside,
    plant,
    restless,
    stuck,
)
from tests.tiny import LinearModel, StochasticLinear, TinyConv, behind, images, predicted

MODEL = LinearModel()
MANY = images(600)
LABELS = predicted(MODEL, MANY)
DISTANCE = MODEL.distance(MANY, LABELS, "linf")


def near(low: float, high: float, count: int = 40) -> tuple[Tensor, Tensor]:
    """Images whose distance to the boundary is known to lie in an interval."""
    pick = ((low < DISTANCE) & (high > DISTANCE)).nonzero()[:count, 0]
    assert len(pick) >= 10
    return MANY[pick], LABELS[pick]


def run(
    attack: str, x: Tensor, y: Tensor, model: nn.Module = MODEL, **more: Any
) -> tuple[Evaluation, dict[str, list[Finding]]]:
    options = {"attacks": [attack], "scenarios": ["white-box"], "eps": 0.05, "judge_draws": 16}
    found = evaluate(model.eval(), x, y, **{**options, **more})
    grouped: dict[str, list[Finding]] = {}
    for finding in found.findings:
        grouped.setdefault(finding.check, []).append(finding)
    return found, grouped


def status(found: dict[str, list[Finding]], check: str) -> str:
    """The gravest status of a check, which must be there."""
    order = ["pass", "warn", "fail"]
    return max((f.status for f in found[check]), key=order.index)


def test_an_honest_evaluation_passes_everything() -> None:
    """A linear model, some samples of which stand: grade A, with every check run."""
    found, checks = run("pgd(steps=20)", *near(0.0, 0.2))
    assert {f.status for f in found.findings} == {"pass"}
    assert found.verdict.grade == "A"
    assert not found.verdict.withheld
    other = {  # for random, defended or surrogate-attacked pipelines, several cells, or a store
        "undeclared-randomness",
        "unkeyed-randomness",
        "stand-in-fidelity",
        "eot-signal",
        "single-draw-luck",
        "transfer-failure",
        "votes",
        "judged-on-fresh-draws",
        "undefended-falls",
        "white-box-is-strongest",
        "knowledge-helps",
        "monotone-in-eps",
        "invariance",
        "one-environment",
    }
    assert set(checks) == set(CHECKS) - set(COSTLY) - other
    assert all(f.threshold and f.source for f in found.findings)


@pytest.mark.parametrize(
    ("model", "defense"),
    [(TinyConv(), None), (StochasticLinear(), None), (LinearModel(), Jitter())],
)
def test_other_honest_evaluations_have_no_failure(model: nn.Module, defense: Any) -> None:
    x = MANY[:32].to(next(model.parameters()).dtype)
    y = predicted(LinearModel(), MANY[:32])
    found, _ = run("pgd(steps=12)", x, y, model, defense=defense, eps=0.03)
    assert [f for f in found.findings if f.status == "fail"] == []


# --- the attack ----------------------------------------------------------------------------------


def test_an_attack_that_does_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    name = plant(monkeypatch, "stuck", stuck)
    found, checks = run(name, *near(0.01, 0.2))
    assert status(checks, "attack-moves") == "fail"
    assert "0 % of the images were changed" in checks["attack-moves"][0].evidence
    assert found.verdict.withheld
    assert found.verdict.text.startswith("Not trustworthy: attack-moves")


def test_images_that_need_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is misclassified without any change needs none, trace or not."""
    x, y = near(0.01, 0.2)
    _, checks = run(plant(monkeypatch, "stuck", stuck), x, (y + 1) % 5)
    assert status(checks, "attack-moves") == "pass"


def test_no_budget_no_move(monkeypatch: pytest.MonkeyPatch) -> None:
    _, checks = run("pgd(steps=2)", *near(0.01, 0.2), eps=0.0)
    assert status(checks, "attack-moves") == "pass"


def test_a_minimal_attack_that_never_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be broken, or the budget too small: a warning. One that moves some passes."""
    name = plant(monkeypatch, "nearest", stuck, goal="minimal")
    _, checks = run(name, *near(0.01, 0.2))
    assert status(checks, "attack-moves") == "warn"

    def some(model: Any, x: Tensor, y: Tensor, *, eps: float = 0.0, seed: Any = 0) -> Tensor:
        first = torch.arange(len(x)).view(-1, 1, 1, 1) == 0
        return torch.where(first, (x - 0.01).clamp(0, 1), x)

    _, checks = run(plant(monkeypatch, "some", some, goal="minimal"), *near(0.01, 0.2))
    assert status(checks, "attack-moves") == "pass"


def test_minimal_attacks_beyond_the_budget_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A nearest image that is too far is no attack within the budget."""
    name = plant(monkeypatch, "far", greedy, goal="minimal")
    found, checks = run(name, *near(0.06, 0.2))
    assert found.results[1].accuracy.value == 1.0
    assert found.results[1].rows["unchanged"].all()
    assert status(checks, "budget-and-box") == "pass"


def test_a_budget_that_is_exceeded(monkeypatch: pytest.MonkeyPatch) -> None:
    _, checks = run(plant(monkeypatch, "greedy", greedy), *near(0.01, 0.2))
    assert status(checks, "budget-and-box") == "fail"
    assert "0.1" in checks["budget-and-box"][0].evidence


def test_a_box_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    _, checks = run(plant(monkeypatch, "outside", outside), *near(0.01, 0.2))
    assert status(checks, "budget-and-box") == "fail"
    assert "leave [0, 1] by at most 0.0" in checks["budget-and-box"][0].evidence


def test_a_perturbation_below_half_a_level_does_not_survive_8_bits() -> None:
    """Oracle: eps = 0.4/255 rounds back to the image; samples are known to be that near."""
    x8 = (images(3000, seed=5) * 255).round() / 255
    y8 = predicted(MODEL, x8)
    pick = (MODEL.distance(x8, y8, "linf") < 0.3 / 255).nonzero()[:40, 0]
    assert len(pick) >= 5
    found, checks = run("pgd(steps=20)", x8[pick], y8[pick], eps=0.4 / 255)
    white = found.results[1]
    assert white.accuracy.value == 0
    assert white.accuracy_8bit.value == 1
    assert white.rows["size_8bit"].max() == 0
    assert status(checks, "survives-8-bit") == "warn"


# --- chance, and the end of the road -------------------------------------------------------------


def test_single_draw_luck() -> None:
    x, y = images(40, (3, 2, 2)), torch.zeros(40, dtype=torch.int64)
    _, checks = run("pgd(steps=6, gradient=eot(2))", x, y, Coin(0.8))
    assert status(checks, "single-draw-luck") == "warn"
    assert "would overstate" in checks["single-draw-luck"][0].evidence


def test_no_luck_where_the_attack_holds_on_all_draws() -> None:
    _, checks = run("pgd(steps=12)", *near(0.0, 0.02), StochasticLinear(sigma=0.01), eps=0.2)
    assert status(checks, "single-draw-luck") == "pass"


def test_luck_is_not_what_a_gray_box_attack_has() -> None:
    """Its first hits are on the bare model, which is not judged."""
    x, y = near(0.0, 0.1)
    _, checks = run("pgd(steps=3)", x, y, defense=Jitter(sigma=0.5), scenarios=["gray-box"])
    assert "single-draw-luck" not in checks


def test_a_loss_that_still_rises() -> None:
    """A tenth of the way in ten equal steps: the last tenth of the steps is a tenth of the rise."""
    x, y = near(0.06, 0.3)
    slow = "pgd(steps=10, step_size=0.0005, random_start=False)"
    _, checks = run(slow, x, y)
    assert status(checks, "loss-has-settled") == "warn"
    _, checks = run("pgd(steps=40)", x, y)
    assert status(checks, "loss-has-settled") == "pass"


def test_single_steps_cannot_settle() -> None:
    _, checks = run("fgsm", *near(0.06, 0.3))
    assert "loss-has-settled" not in checks
    assert "more-steps-do-not-help" not in checks


def test_more_steps_that_help() -> None:
    """Oracle: samples between two and four steps of 0.01 away, with two steps and then four."""
    weak = "pgd(steps=2, step_size=0.01, random_start=False)"
    _, checks = run(weak, *near(0.021, 0.039), eps=0.1)
    assert status(checks, "more-steps-do-not-help") == "fail"
    assert "4 steps instead of 2" in checks["more-steps-do-not-help"][0].evidence


def test_more_steps_on_a_coin_are_no_news() -> None:
    """Samples right on 17 of 32 draws fall to 15 by chance; that is no success of more steps."""
    x, y = images(64, (3, 2, 2)), torch.zeros(64, dtype=torch.int64)
    _, checks = run("pgd(steps=2, gradient=eot(2))", x, y, Coin(0.55))
    for check in ("more-steps-do-not-help", "random-does-not-win"):
        assert status(checks, check) == "pass"


def test_nothing_stands() -> None:
    _, checks = run("pgd(steps=20)", *near(0.0, 0.02), eps=0.3)
    assert "no sample" in checks["more-steps-do-not-help"][0].evidence


# --- blind controls ------------------------------------------------------------------------------


def test_an_attack_that_moves_without_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    name = plant(monkeypatch, "restless", restless)
    _, checks = run(name, *near(0.01, 0.2), eps=0.1)
    assert status(checks, "zero-budget") == "fail"


def test_a_typed_budget_is_set_to_zero_too() -> None:
    _, checks = run("pgd(steps=3, eps=0.02)", *near(0.01, 0.2))
    assert status(checks, "zero-budget") == "pass"
    assert "changes 0 of 16 images, and 0 are judged" in checks["zero-budget"][0].evidence


def test_a_pipeline_that_changed_since_its_clean_cell() -> None:
    """The clean images are judged otherwise than before: the pipeline is not what it was."""
    x, y = near(0.0, 0.2)

    class Tired(LinearModel):
        asked = 0

        def forward(self, x: Tensor) -> Tensor:
            Tired.asked += len(x)
            return super().forward(x) * (1 if Tired.asked < 250 else -1)

    _, checks = run("pgd(steps=1)", x, y, Tired())
    assert status(checks, "zero-budget") == "fail"


def test_random_points_that_beat_a_masked_gradient() -> None:
    """A turned gradient leaves samples standing at a budget where blind points break some."""
    x, y = near(0.0, 0.02)
    masked = behind(Flipped(), LinearModel())
    found, checks = run("pgd(steps=10, random_start=False)", x, y, masked, eps=0.1)
    assert status(checks, "random-does-not-win") == "fail"
    assert found.verdict.withheld
    _, honest = run("pgd(steps=10)", x, y, eps=0.1)
    assert status(honest, "random-does-not-win") == "pass"


def test_scores_that_beat_a_masked_gradient() -> None:
    """SPSA sees through a turned gradient; on the honest model it does not beat PGD."""
    x, y = near(0.0, 0.1)
    attacks = ["pgd(steps=8, random_start=False)", "pgd(steps=8, gradient=spsa(64))"]
    masked = behind(Flipped(), LinearModel())
    _, checks = run("", x, y, masked, attacks=attacks, eps=0.1)
    assert status(checks, "white-box-is-strongest") == "fail"
    _, honest = run("", x, y, attacks=attacks, eps=0.1)
    assert status(honest, "white-box-is-strongest") == "pass"


def test_gray_box_that_beats_a_masked_white_box() -> None:
    """A defense whose rule misleads: who does not know of it attacks better."""
    from tests.evaluation.planted import Steps

    x, y = near(0.0, 0.1)
    _, checks = run(
        "pgd(steps=8, random_start=False)",
        x,
        y,
        defense=Steps(levels=255),
        backward="backwards",
        scenarios=["gray-box", "white-box"],
        eps=0.12,
    )
    assert status(checks, "white-box-is-strongest") == "fail"
    _, honest = run(
        "pgd(steps=8)", x, y, defense=Through(), scenarios=["gray-box", "white-box"], eps=0.12
    )
    assert status(honest, "white-box-is-strongest") == "pass"


def test_random_points_stay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the same finding, drawn a few numbers at a time."""
    from feint.evaluation.health import together

    x, y = near(0.0, 0.02)
    masked = behind(Flipped(), LinearModel())
    first = run("pgd(steps=3, random_start=False)", x, y, masked, eps=0.1)[1]
    monkeypatch.setattr(together, "NUMBERS", 2000)
    second = run("pgd(steps=3, random_start=False)", x, y, masked, eps=0.1)[1]
    assert first["random-does-not-win"] == second["random-does-not-win"]
