"""Checks of pipelines and views: each fires on its planted defect, and not on an honest model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from feint.core.gradients import is_stochastic
from feint.defenses.base import Defense
from feint.evaluation import Batch, Cell, Finding, Pipeline, Subject
from feint.evaluation.health import Undeclared, check_pipeline, declare
from tests.evaluation.planted import (
    Adapting,
    Calm,
    Coin,
    Flipped,
    Jitter,
    NanGradient,
    Noisy,
    SecretCoin,
    SharedCoin,
    Softmaxed,
    Steps,
    Through,
    UnkeyedCoin,
)
from tests.tiny import LinearModel, Round, StochasticLinear, TinyConv, behind, images, predicted

X = images(16)


def findings(
    model: nn.Module,
    defense: Defense | None = None,
    x: Tensor = X,
    *,
    subject: Subject | None = None,
    **cell: Any,
) -> dict[str, Finding]:
    x = x.to(next(model.parameters()).dtype)
    with torch.no_grad():
        y = predicted(LinearModel(), X) if len(x) == 16 else torch.zeros(len(x)).long()
    fields = {"attack": "pgd(steps=3)", "eps": 0.05, "defense": "d" if defense else "none"}
    white = Cell("white-box", "m", **{**fields, **cell})
    batch = Batch(x, y, torch.arange(len(x)))
    subject = Subject(model, defense) if subject is None else subject
    return {f.check: f for f in check_pipeline(subject, white, batch)}


def failed(found: dict[str, Finding]) -> set[str]:
    return {name for name, f in found.items() if f.status != "pass"}


HONEST = {
    "linear": (LinearModel(), None),
    "linear float64": (LinearModel(dtype=torch.float64), Through()),
    "convolutions": (TinyConv(), None),
    "batch normalisation": (TinyConv(batch_norm=True), None),
    "stand-in": (LinearModel(), Steps(levels=64)),
    "random": (StochasticLinear(sigma=0.05), None),
    "random defense": (LinearModel(), Jitter()),
    "keyed coin": (Coin(0.8, shape=(3, 4, 4)), None),
    "coin without a gradient to follow": (Coin(0.8, tiny=0.0, shape=(3, 4, 4)), None),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_pipelines_pass(name: str) -> None:
    """Every check runs, none fires; each gives numbers."""
    model, defense = HONEST[name]
    spsa = name == "coin without a gradient to follow"
    found = findings(
        model.eval(), defense, attack="pgd(gradient=spsa(4))" if spsa else "pgd(steps=3)"
    )
    assert failed(found) == set()
    expected = {
        "input-and-mode",
        "outputs-are-logits",
        "declared-randomness",
        "batch-independence",
        "static-state",
        "static-process",
        "differentiable-parts",
        "view-is-exact",
        "stable-loss",
        "gradient-is-useful",
    }
    if not spsa:
        expected |= {"zero-gradient", "loss-is-alive", "gradient-foretells"}
    if isinstance(defense, Steps):
        expected.add("stand-in-fidelity")
    if is_stochastic(model) or is_stochastic(defense):
        expected.add("eot-signal")
    assert set(found) == expected
    assert all(any(c.isdigit() for c in f.evidence) for f in found.values())


def test_a_cell_without_attacker_has_no_view_to_check() -> None:
    subject, batch = Subject(LinearModel()), Batch(X, torch.zeros(16).long(), torch.arange(16))
    checks = {f.check for f in check_pipeline(subject, Cell("none", "m"), batch)}
    assert "zero-gradient" not in checks
    assert "outputs-are-logits" in checks


def test_probabilities() -> None:
    found = findings(Softmaxed(LinearModel()))
    assert found["outputs-are-logits"].status == "fail"
    assert "give the logits before it" in found["outputs-are-logits"].evidence


def test_log_probabilities_are_fine() -> None:
    model = nn.Sequential(LinearModel(), nn.LogSoftmax(1))
    assert findings(model)["outputs-are-logits"].status == "pass"


def test_undeclared_randomness_unwrapped() -> None:
    found = findings(Noisy(LinearModel()))["declared-randomness"]
    assert found.status == "fail"
    assert "declared deterministic" in found.evidence


def test_declared_but_not_random() -> None:
    found = findings(Calm())["declared-randomness"]
    assert found.status == "warn"
    assert "no randomness was seen" in found.evidence


def test_randomness_that_cannot_be_repeated() -> None:
    """A defense inside of a model draws from the operating system's entropy."""
    inner = nn.Sequential(Jitter(sigma=0.2), LinearModel()).eval()
    model, noted = declare(inner, X)
    assert isinstance(model, Undeclared)
    assert [f.status for f in noted] == ["warn"]
    found = findings(model)["declared-randomness"]
    assert found.status == "warn"
    assert "cannot be repeated" in found.evidence


def test_batch_normalisation_in_training_mode() -> None:
    """It couples samples and adapts; the pipeline keeps its mode for the checks to see."""
    model = TinyConv(batch_norm=True)
    model.norm.train()
    found = findings(model)
    assert found["batch-independence"].status == "fail"
    assert "batch normalisation" in found["batch-independence"].evidence
    assert found["static-state"].status == "fail"
    assert "model.norm." in found["static-state"].evidence
    assert model.norm.training


def test_a_model_that_refuses_single_samples() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, 5)).eval()
    model[1].train()
    found = findings(model, attack="pgd(steps=1)")["batch-independence"]
    assert found.status == "fail"
    assert "a sample alone is refused" in found.evidence


def test_a_model_that_adapts() -> None:
    found = findings(Adapting(LinearModel()).eval())
    assert failed(found) == {"static-state"}
    assert "model.seen" in found["static-state"].evidence


def test_nan_buffers_are_not_changes() -> None:
    model = LinearModel()
    model.register_buffer("empty", torch.full((2,), torch.nan))
    assert findings(model)["static-state"].status == "pass"


def test_a_gradient_of_zero_names_its_module() -> None:
    found = findings(behind(Round(), LinearModel()))["zero-gradient"]
    assert found.status == "fail"
    assert "100 % of the input gradients are zero" in found.evidence
    assert "'model.front'" in found.evidence


def test_a_cut_graph_names_its_module() -> None:
    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach().clone()

    found = findings(behind(Cut(), LinearModel()))["zero-gradient"]
    assert found.status == "fail"
    assert "'model.front'" in found.evidence


def test_some_zero_gradients_warn() -> None:
    """One sample of sixteen: below the threshold of 10 %."""

    class Dead(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first = (x == X[0]).flatten(1).all(1).view(-1, 1, 1, 1)
            return torch.where(first, x.detach(), x)

    found = findings(behind(Dead(), LinearModel()))["zero-gradient"]
    assert found.status == "warn"
    assert found.evidence.startswith("6 % of the input gradients are zero")


def test_a_nan_gradient_names_its_module() -> None:
    found = findings(behind(NanGradient(), LinearModel()))["zero-gradient"]
    assert found.status == "fail"
    assert "100 % not finite" in found.evidence
    assert "'model.front'" in found.evidence


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_misleading_gradient(norm: str) -> None:
    found = findings(behind(Flipped(), LinearModel()), norm=norm)
    assert failed(found) == {"gradient-is-useful", "gradient-foretells"}
    assert "correlate with -1.00" in found["gradient-foretells"].evidence
    assert found["gradient-is-useful"].status == "fail"


def test_a_misleading_rule() -> None:
    found = findings(LinearModel(), Steps(levels=64), backward="backwards")
    assert found["gradient-is-useful"].status == "fail"
    assert found["view-is-exact"].status == "pass"


def test_a_gradient_of_noise() -> None:
    """A gradient that knows nothing does as well as chance on half of the samples."""

    class Lost(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return torch.cos(1e4 * torch.arange(gradient.numel())).view_as(gradient)

    class Front(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Lost.apply(x)

    found = findings(behind(Front(), LinearModel()))["gradient-is-useful"]
    assert found.status != "pass"


def test_another_pipeline_is_attacked_than_judged() -> None:
    """A subject whose view is another model."""

    class Sly(Subject):
        def attacked(self, cell: Cell) -> nn.Module:
            return Pipeline(LinearModel(seed=8))

    found = findings(LinearModel(), subject=Sly(LinearModel()))
    assert found["view-is-exact"].status == "fail"


def test_the_gradient_check_keeps_to_the_batch_size() -> None:
    sizes: list[int] = []

    class Sized(LinearModel):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return super().forward(x)

    batch = Batch(X, torch.zeros(16).long(), torch.arange(16))
    cell = Cell("white-box", "m", "d", "pgd(steps=1)")
    list(check_pipeline(Subject(Sized(), Jitter()), cell, batch, batch_size=32))
    assert max(sizes) <= 32


# --- declare -----------------------------------------------------------------------------------

SMALL = images(8, (3, 2, 2))


@pytest.mark.parametrize("model", [LinearModel(), TinyConv(), StochasticLinear(), Coin(0.5)])
def test_what_is_declared_is_left_alone(model: nn.Module) -> None:
    x = SMALL if isinstance(model, Coin) else X
    x = x.to(next(model.parameters()).dtype)
    state = torch.random.get_rng_state()
    assert declare(model, x) == (model, [])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert declare(model, x[:0]) == (model, [])


def test_unkeyed_randomness() -> None:
    wrapped, noted = declare(UnkeyedCoin(0.5), SMALL)
    assert isinstance(wrapped, Undeclared)
    assert not wrapped.alone
    assert [(f.check, f.status) for f in noted] == [("unkeyed-randomness", "warn")]
    assert "takes no keys" in noted[0].evidence
    assert "not declared" not in noted[0].evidence
    _, noted = declare(SecretCoin(0.5), SMALL)
    assert "not declared" in noted[0].evidence


def test_keyed_randomness_that_is_not_declared() -> None:
    class Forgetful(Coin):
        stochastic = False

    wrapped, noted = declare(Forgetful(0.5), SMALL)
    assert isinstance(wrapped, Undeclared)
    assert wrapped.keyed
    assert [f.check for f in noted] == ["undeclared-randomness"]
    found = findings(wrapped, x=SMALL)
    assert found["declared-randomness"].status == "pass"
    assert found["batch-independence"].status == "pass"


def test_one_draw_for_a_whole_batch() -> None:
    wrapped, noted = declare(SharedCoin(0.5), SMALL)
    assert isinstance(wrapped, Undeclared)
    assert wrapped.alone
    assert "asked alone" in noted[0].evidence
    found = findings(wrapped, x=SMALL[:3])
    assert found["batch-independence"].status == "pass"


@pytest.mark.parametrize("p", [0.5, 0.95])
@pytest.mark.parametrize("coin", [UnkeyedCoin, SharedCoin])
def test_rare_tosses_are_told_apart(coin: type[Coin], p: float) -> None:
    """Eight copies often toss alike at p = 0.95, own tosses or not: one look is not enough."""
    wrapped, noted = declare(coin(p), SMALL)
    assert isinstance(wrapped, Undeclared)
    assert wrapped.alone == (coin is SharedCoin)
    assert [f.check for f in noted] == ["unkeyed-randomness"]


def test_unkeyed_randomness_cannot_show_coupling() -> None:
    wrapped, _ = declare(UnkeyedCoin(0.5), SMALL)
    found = findings(wrapped, x=SMALL)["batch-independence"]
    assert found.status == "warn"
    assert "cannot be told from luck" in found.evidence


def test_a_wrapped_model_repeats_and_leaves_no_trace() -> None:
    """Oracle: bit equality, and torch's own generator."""
    from feint.core import random

    wrapped = Undeclared(UnkeyedCoin(0.5))
    keys = random.keys(0, 8)
    state = torch.random.get_rng_state()
    first = wrapped(SMALL, keys)
    assert torch.equal(wrapped(SMALL, keys), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(wrapped(SMALL, random.fold(keys, "x")), first)
    assert not all(torch.equal(wrapped(SMALL), first) for _ in range(8))
    alone = Undeclared(SharedCoin(0.5), alone=True)
    whole = alone(SMALL, keys)
    assert torch.equal(alone(SMALL[3:5], keys[3:5]), whole[3:5])
