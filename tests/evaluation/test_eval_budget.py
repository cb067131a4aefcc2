"""The budget of the checks: what it allows, what it leaves out, and that it says so."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from feint.core.errors import ConfigError
from feint.evaluation import Finding, evaluate
from feint.evaluation.asked import SHARE, budget_of, chosen
from feint.evaluation.checklist import CHECKS, COSTLY
from feint.evaluation.evaluate import Memory
from feint.evaluation.findings import NOT_RUN
from feint.evaluation.health import budget, plan
from feint.evaluation.health.budget import Active, Spending, make, operations
from feint.evaluation.recorder import Passes
from feint.evaluation.verdict import conclude
from tests.evaluation.planted import Jitter
from tests.tiny import LinearModel, TinyConv, images, predicted

X = images(24)
Y = predicted(LinearModel(), X)


def run(checks: str = "quick", **more: Any) -> Any:
    options = {"attacks": ["pgd(steps=12)"], "scenarios": ["white-box"], "eps": 0.02}
    return evaluate(LinearModel().eval(), X, Y, checks=checks, **{**options, **more})


# --- what an option says ------------------------------------------------------------------------


def test_budgets_are_read() -> None:
    assert budget_of(chosen("quick")) == budget_of(chosen(f"budget={SHARE}")) == SHARE
    assert chosen("quick, budget=2") == ("budget=2",)
    assert budget_of(chosen("budget=2, binarisation")) == 2
    assert chosen("all,budget=none") == (*COSTLY, "budget=inf")
    assert budget_of(chosen("all,budget=none")) == math.inf
    for bad in ("budget=0", "budget=-1", "budget=lots", "budget=nan", "budget="):
        with pytest.raises(ConfigError, match="above 0"):
            chosen(bad)
    with pytest.raises(ConfigError, match="2 budgets"):
        chosen("budget=1, budget=2")


# --- how it is shared out -----------------------------------------------------------------------


class Shop:
    """Checks with written prices, which cost what they say or something else."""

    def __init__(self, limit: float, **prices: tuple[float, int, int]) -> None:
        self.spending = Spending(limit, Passes(), basis=100.0)
        self.took: dict[str, int] = {}
        self.actives = [self._active(name, *what) for name, what in prices.items()]
        self.true: dict[str, float] = {}

    def _active(self, name: str, price: float, least: int, full: int) -> Active:
        def made(count: int) -> Iterator[Finding]:
            self.took[name] = count
            self.spending.passes.forwards += round(self.true.get(name, price) * count)
            yield Finding(name, "pass", "s", f"{count}")

        return Active((name,), "s", lambda m: price * m, least, full, made)

    def make(self) -> list[Finding]:
        return [f for found in make(self.actives, self.spending) for f in found]


def test_all_is_made_where_all_fits() -> None:
    shop = Shop(100, a=(2, 1, 10), b=(8, 1, 10))
    assert [f.evidence for f in shop.make()] == ["10", "10"]
    assert shop.spending.spent == 100


def test_each_takes_its_share() -> None:
    """Oracle: half of the price is there, so half of the samples are."""
    shop = Shop(50, a=(2, 1, 10), b=(8, 1, 10))
    first, second = shop.make()
    assert shop.took == {"a": 5, "b": 5}
    assert first.evidence == "5; on 5 samples instead of 10, within the budget of the checks"
    assert (first.status, second.status) == ("pass", "pass")


def test_what_one_leaves_goes_to_the_next() -> None:
    shop = Shop(50, a=(2, 1, 10), b=(8, 1, 10))
    shop.true["a"] = 0.0
    shop.make()
    assert shop.took == {"a": 5, "b": 6}


def test_the_least_is_made_before_those_that_come_later() -> None:
    """Nine of ten passes go to the first, which says nothing on fewer than three samples."""
    shop = Shop(10, a=(3, 3, 10), b=(3, 1, 10))
    first, second = shop.make()
    assert shop.took == {"a": 3}
    assert first.made
    assert not second.made
    assert second.status == "warn"
    assert second.evidence.startswith(NOT_RUN)
    assert "3 forward passes, and 1 are left" in second.evidence
    assert "budget=none" in second.evidence


def test_a_backward_pass_counts_as_two() -> None:
    spending = Spending(10, Passes(3, 2), basis=14)
    assert spending.spent == 7
    assert spending.finding().status == "pass"
    assert "3 forward and 2 backward passes, 50 % of what the cells took" in (
        spending.finding().evidence
    )
    assert Spending(10, Passes(16, 0), basis=14).finding().status == "warn"


def test_limits() -> None:
    """The largest of a share, of so many passes a pipeline, and of so many operations."""
    assert budget.limit(0.5, 10_000, 2, dearest=1e12) == 5000
    assert budget.limit(0.5, 100, 2, dearest=1e12) == 2 * budget.LEAST
    assert budget.limit(0.5, 100, 2, dearest=1e6) == budget.FREE / 1e6
    assert budget.limit(math.inf, 100, 2, dearest=1e12) == math.inf


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(48, 3, bias=False)),
        TinyConv(),
        TinyConv(batch_norm=True),
    ],
)
def test_operations_are_counted(model: nn.Module) -> None:
    """Oracle: torch's own counter, on one image."""
    x = images(3).to(next(model.parameters()).dtype)
    with FlopCounterMode(display=False) as counter:
        model.eval()(x[:1])
    assert operations(model, x) == counter.get_total_flops() > 0


def test_operations_of_what_cannot_be_watched() -> None:
    """Two for every weight."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(5))

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :5] * self.weight

    assert operations(Hidden(), X) == 10


# --- in an evaluation ---------------------------------------------------------------------------


@pytest.fixture
def dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is small enough to be checked for nothing."""
    monkeypatch.setattr(budget, "FREE", 0.0)
    monkeypatch.setattr(budget, "LEAST", 4.0)


def unmade(result: Any) -> set[str]:
    return {f.check for f in result.findings if not f.made}


def spent(result: Any) -> Finding:
    return next(f for f in result.findings if f.check == "cost-of-checks")


def test_small_models_are_checked_in_full() -> None:
    found = run()
    assert unmade(found) == set()
    assert not any("instead of" in f.evidence for f in found.findings if "samples in" in f.evidence)
    assert spent(found).status == "pass"


@pytest.mark.usefixtures("dear")
def test_a_dear_model_is_checked_within_its_budget() -> None:
    """Fewer samples for all, and then none for some; what is not made is said, and costs an A."""
    free = run("budget=none")
    assert unmade(free) == set()
    assert free.verdict.grade == "A"
    usual, tight = run("budget=0.5"), run("budget=0.02")
    some = [f for f in usual.findings if "within the budget of the checks" in f.evidence]
    assert some
    assert unmade(tight) > unmade(usual)
    assert {"more-steps-do-not-help", "gradients-along-the-path"} <= unmade(tight)
    assert tight.verdict.grade == "C"
    # Nothing is passed in silence: every check of the free run is there, made or not.
    assert {f.check for f in tight.findings} == {f.check for f in free.findings}
    costs = [_passes(spent(found)) for found in (tight, usual, free)]
    assert costs == sorted(costs)
    assert spent(usual).status == "pass"


def _passes(found: Finding) -> int:
    forwards, _, _, backwards = found.evidence.split()[:4]
    return int(forwards) + 2 * int(backwards)


@pytest.mark.usefixtures("dear")
def test_a_random_pipeline_within_its_budget() -> None:
    found = run("budget=0.3", defense=Jitter(), judge_draws=8)
    cost = sum(map(budget.cost_of, found.results))
    limit = max(0.3 * cost, 2 * budget.LEAST)
    assert _passes(spent(found)) <= budget.OVERDRAWN * limit
    assert spent(found).status == "pass"


def test_a_cell_costs_its_attack_and_its_judge() -> None:
    """Oracle: counted by hand, 24 samples: clean once; as floats and rounded, and the attack."""
    clean, white = run(scenarios=["none", "white-box"]).results
    assert budget.cost_of(clean) == 24
    assert budget.cost_of(white) == white.forwards + 2 * white.backwards + 48
    assert white.backwards > 0


@pytest.mark.usefixtures("dear")
def test_the_budget_is_the_same_when_the_cells_come_from_a_cache() -> None:
    cache = Memory()
    first, again = run(cache=cache), run(cache=cache)
    assert [f.as_dict() for f in again.findings] == [f.as_dict() for f in first.findings]


def test_a_price_that_is_far_too_low_is_noticed(
    monkeypatch: pytest.MonkeyPatch, dear: None
) -> None:
    monkeypatch.setattr(plan, "gradient_passes", lambda *_: 1e-3)
    monkeypatch.setattr(plan, "of_pipeline", lambda *_: [])
    monkeypatch.setattr("feint.evaluation.health.run.of_pipeline", lambda *_: [])
    real = plan.of_case

    def cheap(case: Any) -> list[Active]:
        return [
            Active(a.checks, a.subject, lambda m: 0.0, a.least, a.full, a.run) for a in real(case)
        ]

    monkeypatch.setattr("feint.evaluation.health.run.of_case", cheap)
    assert spent(run("budget=0.01")).status == "warn"


def test_what_was_not_made_counts_once_for_each_check() -> None:
    """Oracle: the rule. One check that two pipelines lack is one `warn`: grade B, three are C."""
    base = run()
    fine = [f for f in base.findings if f.status == "pass"]

    def grade(*names: str) -> str:
        lacking = [Finding(n, "warn", s, f"{NOT_RUN}: 0 left") for n in names for s in "ab"]
        return conclude(base.results, [*fine, *lacking]).grade

    assert grade() == "A"
    assert grade("zero-budget") == "B"
    assert grade("zero-budget", "logit-shift") == "B"
    assert grade("zero-budget", "logit-shift", "logit-scale") == "C"
    assert set(CHECKS) >= {"zero-budget", "logit-shift", "logit-scale"}
