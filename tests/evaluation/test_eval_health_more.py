"""The newer checks: each fires on a planted defect, and is silent without it."""

from __future__ import annotations

import random as python_random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.quantise import quantise
from feint.defenses import parse
from feint.evaluation import Cell, CellResult, Finding, evaluate
from feint.evaluation.health import across, cells
from feint.evaluation.health.across import check_across
from feint.evaluation.health.cells import check_cell
from feint.evaluation.health.coin import coin_control
from feint.evaluation.health.differentiable import _fidelity, lost_parts
from feint.evaluation.health.words import attack_words, card, cell_words
from feint.evaluation.metrics import Rate
from feint.evaluation.shard import COLUMNS
from feint.evaluation.verdict import bounds
from feint.store.record import Record
from tests.evaluation.planted import Hot, Jitter, Through, plant
from tests.tiny import Detach, LinearModel, Round, Shifted, TinyConv, behind, images, predicted

MODEL = LinearModel()
MANY = images(600)
LABELS = predicted(MODEL, MANY)
DISTANCE = MODEL.distance(MANY, LABELS, "linf")


def near(low: float, high: float, count: int = 24) -> tuple[Tensor, Tensor]:
    """Images whose distance to the boundary is known to lie in an interval."""
    pick = ((low < DISTANCE) & (high > DISTANCE)).nonzero()[:count, 0]
    assert len(pick) >= 10
    return MANY[pick], LABELS[pick]


def run(
    model: nn.Module, x: Tensor, y: Tensor, attack: str = "pgd(steps=12)", **more: Any
) -> dict[str, Finding]:
    """The gravest finding of each check."""
    options = {"scenarios": ["white-box"], "eps": 0.05, "judge_draws": 16}
    found = evaluate(model.eval(), x, y, attacks=[attack], **{**options, **more})
    order = ["pass", "warn", "fail"]
    gravest: dict[str, Finding] = {}
    for f in sorted(found.findings, key=lambda f: order.index(f.status)):
        gravest[f.check] = f
    return gravest


def made(
    scenario: str = "white-box",
    shares: Any = (1, 0, 1, 0),
    *,
    draws: int = 1,
    attack: str | None = None,
    first_hit: Any = None,
    label: Any = (0, 1, 2, 0),
    index: Any = None,
    **cell: Any,
) -> CellResult:
    """A cell whose rows are written by hand."""
    shares = np.asarray(shares, float)
    n = len(shares)
    attack = attack or ("none" if scenario == "none" else "pgd")
    rows: dict[str, Any] = {name: np.zeros(n) for name in COLUMNS}
    rows |= {
        "index": np.arange(n) if index is None else np.asarray(index),
        "label": np.resize(label, n),
        "draws": np.full(n, draws),
        "correct": np.rint(shares * draws).astype(int),
        "correct_even": shares,
        "correct_odd": shares,
        "correct_8bit": np.rint(shares * draws).astype(int),
        "first_hit": np.full(n, -1) if first_hit is None else np.asarray(first_hit),
        "unchanged": np.zeros(n, bool),
    }
    fields = {"model": "m", "attack": attack, "source": "s" if scenario == "transfer" else ""}
    return CellResult(Cell(scenario, **{**fields, **cell}), "k", rows, "e")


def status(found: Any, check: str) -> list[str]:
    return [f.status for f in found if f.check == check]


# --- the pipeline ------------------------------------------------------------------------------


class Draws(nn.Module):
    """The model itself, which draws a number that it does not use."""

    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.model, self._draw = LinearModel(), draw

    def forward(self, x: Tensor) -> Tensor:
        self._draw()
        return self.model(x)


class Optimises(nn.Module):
    """The model itself, which asks for a gradient that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.model = LinearModel()

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            torch.autograd.grad(self.model(leaf).sum(), leaf)
        return self.model(x)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Draws(lambda: torch.rand(1)), "torch"),
        (Draws(lambda: np.random.rand()), "numpy"),  # noqa: NPY002 (that is the defect)
        (Draws(python_random.random), "python"),
        (Optimises(), "optimises while it answers"),
    ],
)
def test_a_pipeline_that_uses_what_it_should_not(model: nn.Module, words: str) -> None:
    found = run(model, *near(0.0, 0.2), attack="pgd(steps=2)")["static-process"]
    assert found.status == "warn"
    assert words in found.evidence


def test_images_outside_of_the_box_and_a_dropout_that_is_on() -> None:
    from feint.evaluation.health.pipelines import _input

    good, model = MANY[:4], nn.Sequential(nn.Dropout(), LinearModel()).eval()
    assert _input(model, good, "m").status == "pass"
    for bad in (good + 1, good - 0.5, torch.full_like(good, torch.nan), good.long()):
        assert _input(model, bad, "m").status == "fail"
    model[0].train()
    assert "first: 0" in _input(model, good, "m").evidence
    assert _input(model, good, "m").status == "fail"


def test_the_map_of_parts_without_a_gradient() -> None:
    """Oracle: what is planted, by name; nothing in honest networks."""

    class NotANumber(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0 * (x - x.detach()).abs().sqrt()

    x, keys = images(3).double(), torch.arange(3)
    for front, what in (
        (Detach(), "cuts the graph"),
        (Round(), "passes zeros"),
        (NotANumber(), "passes NaN or infinity"),
    ):
        assert lost_parts(behind(front, TinyConv()), x, keys) == {"front": what}
    assert lost_parts(TinyConv(batch_norm=True), x, keys) == {}
    relu = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 3))
    assert lost_parts(relu.double(), x, keys) == {}


def test_an_unstable_loss() -> None:
    """A ripple of ±1 in the logits every 1e-4 of a pixel; the plain model has none."""

    class Ripple(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = LinearModel()

        def forward(self, x: Tensor) -> Tensor:
            wave = torch.sin(6e4 * x.flatten(1).sum(1, keepdim=True))
            return self.model(x) * (1 + 0.9 * wave)

    x, y = near(0.05, 0.2)
    assert run(Ripple(), x, y)["stable-loss"].status == "warn"
    assert run(LinearModel(), x, y)["stable-loss"].status == "pass"


def test_slopes_by_size() -> None:
    """Oracle: a gradient multiplied by a known factor, unseen in the value."""

    class Times(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.model, self.factor = LinearModel(), factor

        def forward(self, x: Tensor) -> Tensor:
            z = self.model(x)
            return self.factor * z + ((1 - self.factor) * z).detach()

    x, y = near(0.0, 0.2)
    for factor, expected in ((1.0, "pass"), (30.0, "warn"), (1e-3, "fail"), (1e3, "fail")):
        found = run(Times(factor), x, y)["gradient-foretells"]
        assert found.status == expected, found
    assert "correlate with 1.00" in found.evidence


# --- experiments ---------------------------------------------------------------------------------


def test_a_temperature_comes_to_light() -> None:
    x, y = near(0.02, 0.04)
    hot = run(Hot(LinearModel()), x, y)
    assert hot["logit-scale"].status == "fail"
    assert hot["loss-is-alive"].status == "fail"
    cool = run(LinearModel(), x, y)
    assert cool["logit-scale"].status == cool["loss-is-alive"].status == "pass"


def test_an_attack_that_sees_a_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    """The known error of some Carlini–Wagner codes: the masked class counts as a logit of zero."""

    def masked(model: Any, x: Tensor, y: Tensor, *, eps: float = 0.1, seed: Any = 0) -> Tensor:
        leaf = x.clone().requires_grad_()
        logits = model(leaf)
        one = nn.functional.one_hot(y, logits.shape[1])
        other = (logits * (1 - one)).amax(1)
        loss = (other - (logits * one).sum(1)).clamp(max=20)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        return (x + eps * gradient.sign()).clamp(0, 1)

    x, y = near(0.02, 0.1)
    found = run(LinearModel(), x, y, plant(monkeypatch, "masked", masked), eps=0.12)
    assert found["logit-shift"].status == "fail"
    assert run(Shifted(LinearModel(), 30.0), x, y, eps=0.12)["logit-shift"].status == "pass"


def test_an_attack_that_sees_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def mean(model: Any, x: Tensor, y: Tensor, *, eps: float = 0.1, seed: Any = 0) -> Tensor:
        return (x + eps * (x - x.mean(0)).sign()).clamp(0, 1)

    found = run(LinearModel(), *near(0.0, 0.2), plant(monkeypatch, "mean", mean))
    assert found["attack-batch-invariance"].status == "fail"


def test_rounding_is_no_batch_mate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of gradients that nearly vanish hang on the size of the batch, but not in float64."""

    def rounded(model: Any, x: Tensor, y: Tensor, *, eps: float = 0.1, seed: Any = 0) -> Tensor:
        lost = x.dtype == torch.float32 and len(x) == 1
        return (x - eps if lost else x + eps).clamp(0, 1)

    found = run(LinearModel(), *near(0.0, 0.2), plant(monkeypatch, "rounded", rounded))
    assert found["attack-batch-invariance"].status == "pass"
    assert "in float64 0 %" in found["attack-batch-invariance"].evidence


def test_one_step_that_beats_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps far too small: the single step of the whole budget wins."""
    x, y = near(0.02, 0.04)
    slow = "pgd(steps=3, step_size=0.0001, random_start=False)"
    assert run(LinearModel(), x, y, slow)["iterative-beats-single"].status == "fail"
    assert run(LinearModel(), x, y)["iterative-beats-single"].status == "pass"


def test_a_budget_without_limits() -> None:
    """A turned gradient breaks nothing with the whole box; a coin cannot be broken by anything."""
    from tests.evaluation.planted import Coin, Flipped

    x, y = near(0.0, 0.2)
    masked = run(behind(Flipped(), LinearModel()), x, y, "pgd(steps=12, random_start=False)")
    assert masked["large-budget-breaks"].status == "fail"
    assert run(LinearModel(), x, y)["large-budget-breaks"].status == "pass"
    coin = Coin(0.8, shape=(3, 4, 4))
    assert run(coin, x, torch.zeros_like(y))["large-budget-breaks"].status == "pass"


def test_gradients_that_vanish_on_the_way() -> None:
    """There are gradients at 8-bit images only, and an attack leaves these with its first step."""

    class OnTheGrid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = LinearModel()

        def forward(self, x: Tensor) -> Tensor:
            logits, levels = self.model(x), 255 * x
            off = (levels - levels.round()).abs().flatten(1).amax(1) > 1e-3
            return torch.where(off[:, None], logits.detach() + 0 * logits, logits)

    x, y = near(0.03, 0.2)
    x = quantise(x)
    attack, check = "pgd(steps=4, step_size=0.003, random_start=False)", "gradients-along-the-path"
    found = run(OnTheGrid(), x, y, attack)
    assert found["zero-gradient"].status == "pass"
    assert found[check].status == "fail"
    assert run(LinearModel(), x, y, attack)[check].status == "pass"


# --- rows ----------------------------------------------------------------------------------------


def test_silent_successes() -> None:
    """Seen by the attack at step 3, and right when judged."""
    hit = made(shares=[1, 1, 0, 0], first_hit=[3, -1, 3, 0])
    assert status(check_cell(hit), "silent-success") == ["fail"]
    held = made(shares=[1, 1, 0, 0], first_hit=[-1, -1, 3, 0])
    assert status(check_cell(held), "silent-success") == ["pass"]
    target = made(shares=[0, 0], first_hit=[1, 1], targeted=True)
    assert status(check_cell(target), "silent-success") == ["fail"]


def test_surrogates_that_fall_in_vain() -> None:
    vain = made("gray-box", [1, 1, 1, 0], first_hit=[1, 1, 1, 1], defense="d")
    assert status(check_cell(vain), "transfer-failure") == ["warn"]
    assert status(check_cell(vain, answered=True), "transfer-failure") == ["pass"]
    fine = made("gray-box", [0, 0, 1, 0], first_hit=[1, 1, 1, 1], defense="d")
    assert status(check_cell(fine), "transfer-failure") == ["pass"]


def test_successes_that_still_come() -> None:
    """Oracle: of 40 rounds the last four are the last tenth."""
    late = made(shares=[0] * 10, first_hit=[*range(9), 38])
    (found,) = [f for f in check_cell(late) if f.check == "successes-have-settled"]
    assert found.status == "warn"
    assert "half of all by round 4" in found.evidence
    early = made(shares=[0] * 9 + [1], first_hit=[*range(9), -1])
    (found,) = [f for f in check_cell(early) if f.check == "successes-have-settled"]
    assert found.status == "pass"
    assert "the other 1 are censored" in found.evidence


def test_what_votes_would_change() -> None:
    """Oracle: three of four draws right: 3 draws of them have a majority in all 4 of 4 ways."""
    result = made(shares=[0.75] * 4, draws=4)
    (found,) = [f for f in check_cell(result) if f.check == "votes"]
    assert found.status == "warn"
    assert "1: 75.0 %, 3: 100.0 %" in found.evidence
    assert status(check_cell(made(shares=[1.0, 0.0], draws=4)), "votes") == ["pass"]


def test_a_random_pipeline_needs_several_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    check = "judged-on-fresh-draws"
    assert status(check_cell(made(draws=16)), check) == ["pass"]
    assert status(check_cell(made(draws=1), stochastic=True), check) == ["fail"]
    assert status(check_cell(made(draws=1)), check) == []
    monkeypatch.setattr(cells, "coin_control", lambda draws: (Rate(0.54, 0.5, 0.58, 256), 0.8))
    assert status(check_cell(made(draws=16)), check) == ["fail"]


@pytest.mark.parametrize("draws", [2, 16, 32])
def test_the_coin_control_comes_out_at_its_probability(draws: int) -> None:
    found, truth = coin_control(draws)
    assert found.low <= truth <= found.high


def test_a_card_without_a_budget() -> None:
    assert status(check_cell(made(eps=0.0)), "threat-model-card") == ["warn"]
    assert status(check_cell(made()), "threat-model-card") == ["pass"]
    words = card(made(draws=4).cell, stochastic=True)
    for part in ("any wrong class", "linf 8/255", "40 steps", "draws of his own", "8 per gradient"):
        assert part in words


def test_cells_in_words() -> None:
    cell = made(attack="pgd(preset='ace', step_size=0.2257, steps=100)", defense="d").cell
    assert cell_words(cell) == (
        "m + d, white-box, pgd, as in ace, 100 steps, step 0.2257, linf 8/255"
    )
    assert attack_words("pgd(loss='margin')") == "pgd, margin loss"
    assert attack_words("pgd(gradient=eot(30), eps=0.0078431372549019607843)") == (
        "pgd, gradient eot(30), eps 2/255"
    )


# --- cells against each other --------------------------------------------------------------------


def test_other_samples() -> None:
    first, other = made("none"), made(index=[0, 1, 2, 4])
    assert status(check_across([first, other]), "same-samples") == ["fail"]
    assert status(check_across([first, made()]), "same-samples") == ["pass"]


def test_a_bound_that_is_a_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    results = [made("none", [1] * 40), made(shares=[0] * 40), made(shares=[1] * 40, attack="apgd")]
    assert status(check_across(results), "worst-case-per-sample") == ["pass"]
    mean = Rate(0.5, 0.4, 0.6, 40)
    wrong = [replace(b, worst=mean) for b in bounds(results)]
    monkeypatch.setattr(across, "bounds", lambda _: wrong)
    assert status(check_across(results), "worst-case-per-sample") == ["fail"]


def test_another_machine() -> None:
    """Units from two kinds of machines are named; those from one are fine."""
    one, other = {"cpu": "a", "torch": "2"}, {"cpu": "b", "torch": "2"}
    alike, mixed = (
        Record.one_environment(SimpleNamespace(info={"environments": e}))  # type: ignore[arg-type]
        for e in ([one], [one, other])
    )
    assert (alike.check, alike.status, mixed.status) == ("one-environment", "pass", "warn")
    assert "cpu: 'a' there, 'b' given" in mixed.evidence


def test_clean_accuracy() -> None:
    assert status(check_across([made()]), "clean-accuracy") == ["warn"]
    bad = made("none", [1, 0, 0, 0] * 5)
    assert status(check_across([bad]), "clean-accuracy") == ["warn"]
    good = [made("none", [1] * 20), made("none", [1] * 18 + [0] * 2, defense="d")]
    found = list(check_across(good))
    assert status(found, "clean-accuracy") == ["pass", "pass"]
    assert "McNemar p = 0.5" in found[-1].evidence


def test_an_attack_too_weak_for_the_bare_model() -> None:
    clean, d = made("none", [1] * 20), {"defense": "d"}
    strong, weak = made(shares=[0] * 20), made(shares=[1] * 20)
    defended = [made("none", [1] * 20, **d), made(shares=[1] * 20, **d)]
    assert status(check_across([clean, weak, *defended]), "undefended-falls") == ["warn"]
    assert status(check_across([clean, strong, *defended]), "undefended-falls") == ["pass"]


def test_knowledge_that_does_not_help() -> None:
    d = {"defense": "d"}
    gray, white = [0] * 20, [1] * 10 + [0] * 10
    worse = [made("none", [1] * 20, **d), made("gray-box", gray, **d), made(shares=white, **d)]
    assert status(check_across(worse), "knowledge-helps") == ["warn"]
    fine = [made("none", [1] * 20, **d), made("gray-box", white, **d), made(shares=gray, **d)]
    assert status(check_across(fine), "knowledge-helps") == ["pass"]


def test_a_defense_that_nobody_notices() -> None:
    """It costs nothing without an attacker, and gains 50 points: too good."""
    d = {"defense": "d", "draws": 4}
    bare = [made("none", [1] * 20), made(shares=[0] * 20)]
    good = [*bare, made("none", [1] * 20, **d), made(shares=[1] * 10 + [0] * 10, **d)]
    assert status(check_across(good), "invariance") == ["warn"]
    fair = [*bare, made("none", [1] * 20, **d), made(shares=[1] + [0] * 19, **d)]
    assert status(check_across(fair), "invariance") == ["pass"]


def test_noise_that_drowns_the_gradient_only_matters_where_something_stands() -> None:
    from feint.evaluation.health.gradients import _signal

    first, second = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), None
    second = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert _signal(first, second, "m", left=0.5).status == "warn"
    assert _signal(first, second, "m", left=0.0).status == "pass"
    assert _signal(first, first, "m", left=0.5).status == "pass"
    assert _signal(0 * first, first, "m", left=0.5).status == "pass"


def test_rules_part_by_part() -> None:
    """Oracle: of a chain, one rule for all parts is the same rule named for each of them."""
    x, _ = near(0.0, 0.2)
    chain = parse("median + median(size=3)")
    found = []
    for backward in ("identity", "identity + identity", "identity + default"):
        cell = Cell("white-box", "m", defense="d", attack="pgd(steps=2)", backward=backward)
        keys = random.keys(0, len(x))
        found.append(_fidelity(chain, cell, x, keys, "m").evidence)
    assert found[0] == found[1] != found[2]


def test_stand_ins() -> None:
    """A defense that needs none has none; its noise is differentiated exactly."""
    x, y = near(0.0, 0.2)
    for defense in (Through(), Jitter()):
        assert "stand-in-fidelity" not in run(LinearModel(), x, y, "pgd(steps=2)", defense=defense)
