"""Mixed precision: cheap gradients, and no verdict that a rounding made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from feint.attacks import apgd, fab, feature_bpda, fgsm, mi_fgsm, pgd, reparameterized, transfer
from feint.core import random
from feint.core.errors import ConfigError
from feint.core.gradients import Estimate, backprop, eot, nes, spsa
from feint.core.losses import cross_entropy, margin
from feint.core.mixed import declare_margin, mixed
from tests.tiny import Counting, LinearModel, StochasticLinear, TinyConv, images, predicted

SHAPE = (3, 2, 2)


class Cancelling(nn.Module):
    """Two classes: 1 + sign·2⁻¹⁰·Σ of half of the values against 1 + `bar`.

    The weights are 1 + 2⁻¹⁰ and −1, and the image has the same values in both halves. bf16 rounds
    the first to 1: there the score is exactly 0, whatever the image.
    """

    def __init__(self, bar: float, sign: int = 1) -> None:
        super().__init__()
        self.bar = bar
        half = torch.full((6,), float(sign))
        self.weight = nn.Parameter(torch.cat([half * (1 + 2.0**-10), -half])[None])

    def forward(self, x: Tensor) -> Tensor:
        score = nn.functional.linear(x.flatten(1), self.weight)[:, 0].float()
        return 1 + torch.stack([score, torch.full_like(score, self.bar)], 1)


X = torch.full((3, *SHAPE), 0.5)
Y = torch.zeros(3, dtype=torch.int64)
TRUE = 2.0**-10 * 3
"""The score of `X` in float32, above 1."""


def naive(
    model: Any, x: Tensor, y: Tensor, loss: Any, keys: Tensor, *, forward_only: bool = False
) -> Estimate:
    """Autocast without a second look."""
    with torch.autocast("cpu", torch.bfloat16):
        return backprop(model, x, y, loss, keys, forward_only=forward_only)


def told(loss: Any = margin) -> Any:
    return declare_margin(lambda logits, y: loss(logits, y), margin)


# --- decisions that rounding flips ----------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1], ids=["seen as fallen", "seen as safe"])
@pytest.mark.parametrize("declared", [True, False])
def test_what_decides_is_float32(sign: int, declared: bool) -> None:
    # Oracle: closed form. The score is ±2⁻¹⁰·3, and 0 in bf16; the bar is halfway between.
    model, keys = Cancelling(sign * TRUE / 2, sign), random.keys(0, 3)
    rough = naive(model, X, Y, margin, keys)
    loss = told() if declared else (lambda logits, y: margin(logits, y))
    found = mixed()(model, X, Y, loss, keys)
    exact = backprop(model, X, Y, margin, keys)
    assert not bool((rough.logits.argmax(-1) == exact.logits.argmax(-1)).any())
    assert torch.equal(found.logits, exact.logits)
    assert torch.equal(found.loss, exact.loss)


def test_a_rounding_is_no_success() -> None:
    # Oracle: closed form. Within 1e-5 no image of class 0 leaves it; naively all have left it.
    model = Cancelling(TRUE / 2)
    seen: dict[str, int] = {}
    for name, gradient in (("naive", naive), ("mixed", mixed())):
        steps: list[int] = []
        pgd(
            model, X, Y, eps=1e-5, steps=4, gradient=gradient, random_start=False,
            trace=lambda step, *rest, steps=steps: steps.append(step),
        )  # fmt: skip
        seen[name] = len(steps)
    assert seen == {"naive": 1, "mixed": 5}


def test_a_success_that_half_precision_misses_is_kept() -> None:
    # Oracle: closed form: all images are class 1 in float32 to begin with, so one look is enough.
    model = Cancelling(-TRUE / 2, -1)
    steps: list[int] = []
    kwargs: dict[str, Any] = {"eps": 1e-5, "steps": 3, "random_start": False}
    pgd(model, X, Y, gradient=mixed(), trace=lambda step, *rest: steps.append(step), **kwargs)
    assert steps == [0]


# --- every gradient attack ------------------------------------------------------------------------


def rebuilt(model: Any, x: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
    return reparameterized(
        model, x, y, decoder=torch.sigmoid, encoder=lambda x: torch.logit(x, 1e-3), **kwargs
    )


ATTACKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "fgsm": (fgsm, {}),
    "mi_fgsm": (mi_fgsm, {}),
    "pgd": (pgd, {"restarts": 2}),
    "apgd": (apgd, {"steps": 20}),
    "apgd targets": (apgd, {"steps": 20, "targets": 2, "loss": "dlr"}),
    "fab": (fab, {"steps": 10}),
    "fab targets": (fab, {"steps": 10, "targets": 2}),
    "transfer": (transfer, {}),
    "feature": (feature_bpda, {"steps": 10}),
    "reparameterized": (rebuilt, {"steps": 10, "step_size": 0.5}),
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("draws", [None, 2])
def test_every_success_seen_is_one_and_verdicts_stay(name: str, draws: int | None) -> None:
    # Oracle: the float32 model at the points traced, and the verdicts of runs in float32 with
    # budgets 10 % smaller and larger, between which those of a heuristic search must lie.
    attack, kwargs = ATTACKS[name]
    model = TinyConv(dtype=torch.float32)
    x = images(12, (3, 6, 6))
    y = predicted(model, x)
    hits = 0

    def budget(factor: float) -> dict[str, Any]:
        return {} if attack is fab else {"eps": 0.03 * factor}

    def fell(x_adv: Tensor) -> Tensor:
        return predicted(model, x_adv) != y

    def trace(_: int, points: Tensor, logits: Tensor, loss: Tensor, active: Tensor) -> None:
        nonlocal hits
        hit = logits.argmax(-1) != y[active][:, None]
        assert bool((predicted(model, points)[:, None] != y[active][:, None])[hit.any(1)].all())
        hits += int(hit.sum())

    gradient = mixed() if draws is None else eot(draws, base=mixed())
    found = fell(attack(model, x, y, gradient=gradient, trace=trace, **kwargs, **budget(1)))
    plain = None if draws is None else eot(draws)
    less, more = (
        fell(attack(model, x, y, gradient=plain, **kwargs, **budget(f))) for f in (0.9, 1.1)
    )
    assert hits > 0
    assert bool(found.any())
    assert not bool((less & ~found).any())
    assert not bool((found & ~more).any())


def test_targets_are_reached_in_float32() -> None:
    # Oracle: the float32 model.
    model = TinyConv(dtype=torch.float32)
    x = images(8, (3, 6, 6))
    target = (predicted(model, x) + 1) % 5
    found = pgd(model, x, target, targeted=True, eps=0.1, gradient=mixed())
    plain = pgd(model, x, target, targeted=True, eps=0.1)
    assert torch.equal(predicted(model, found) == target, predicted(model, plain) == target)
    found = fab(model, x, target, targeted=True, steps=20, gradient=mixed())
    moved = (found != x).flatten(1).any(1)
    assert torch.equal(predicted(model, found)[moved], target[moved])


# --- the estimate ---------------------------------------------------------------------------------


def test_the_gradient_is_the_same_but_for_rounding() -> None:
    # Oracle: autograd in float32.
    model = TinyConv(dtype=torch.float32)
    x, keys = images(6, (3, 6, 6)), random.keys(0, 6)
    y = predicted(model, x)
    rough = mixed()(model, x, y, told(cross_entropy), keys)
    exact = backprop(model, x, y, cross_entropy, keys)
    assert rough.gradient.dtype == torch.float32
    assert not torch.equal(rough.gradient, exact.gradient)
    cosine = torch.cosine_similarity(rough.gradient.flatten(1), exact.gradient.flatten(1))
    assert bool((cosine > 0.99).all())


def test_only_rows_in_doubt_are_asked_again() -> None:
    # Oracle: counts. One of four images is adversarial, the others far from it.
    inner = LinearModel(scale=10.0)
    x, keys = images(4), random.keys(0, 4)
    y = predicted(inner, x)
    logits = inner(x).detach()
    rest = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    clear = (logits.amax(1) - rest) > 0.1 * logits.abs().amax(1)
    assert bool(clear[1:].all())
    y[0] = (y[0] + 1) % 5
    for loss, again in ((told(), 1), (margin, 4)):
        model = Counting(inner)
        mixed()(model, x, y, loss, keys)
        assert (model.forwards, model.backwards) == (4 + again, 4)
    model = Counting(inner)
    mixed()(model, x, y, told(), keys, forward_only=True)
    assert (model.forwards, model.backwards) == (4, 0)


def test_draws_are_the_same_when_asked_again() -> None:
    # Oracle: eot in float32 of a linear model: products summed in float32 do not know autocast.
    model = StochasticLinear()
    x, keys = images(5), random.keys(3, 5)
    y = predicted(LinearModel(), x)
    expected = eot(4)(model, x, y, margin, keys)
    for gradient in (eot(4, base=mixed()), mixed(base=eot(4))):
        found = gradient(model, x, y, told(), keys)
        torch.testing.assert_close(found.logits, expected.logits)
        torch.testing.assert_close(found.loss, expected.loss)
        torch.testing.assert_close(found.gradient, expected.gradient)


class Dice(nn.Module):
    """Three known draws, of which each shifts the bar."""

    stochastic = True

    def __init__(self) -> None:
        super().__init__()
        self.inner = Cancelling(TRUE / 2)

    def draws(self, shape: torch.Size) -> int:
        return 3

    def forward(self, x: Tensor, keys: Tensor | None = None, draw: Tensor | None = None) -> Tensor:
        if draw is None:
            draw = random.integers(random.entropy_keys(len(x)) if keys is None else keys, 0, 3)
        logits = self.inner(x)
        bar = TRUE / 2 * torch.tensor([-40.0, 1.0, 4.0])[draw]
        return torch.stack([logits[:, 0], 1 + bar], 1)


def test_known_draws_are_taken_once_each() -> None:
    # Oracle: closed form: bars at −20, ½ and 2 times the score: one draw of three is adversarial.
    found = eot(8, base=mixed())(Dice(), X, Y, told(), random.keys(0, 3))
    assert found.logits.shape == (3, 3, 2)
    assert (found.logits.argmax(-1) == 1).tolist() == [[False, False, True]] * 3
    both = mixed(base=eot(8))(Dice(), X, Y, told(), random.keys(0, 3))
    assert torch.equal(both.logits.argmax(-1), found.logits.argmax(-1))


def test_autocast_around_it_reaches_no_verdict() -> None:
    # Oracle: the estimate outside of that region.
    model, keys = Cancelling(TRUE / 2), random.keys(0, 3)
    expected = backprop(model, X, Y, margin, keys).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixed()(model, X, Y, told(), keys).logits, expected)
        last = mixed()(model, X, Y, told(), keys, forward_only=True)
    assert torch.equal(last.logits, expected)


def test_an_empty_batch() -> None:
    found = mixed()(LinearModel(), images(0), Y[:0], told(), random.keys(0, 0))
    assert found.logits.shape == (0, 1, 5)
    assert found.gradient.shape == (0, 3, 4, 4)


@pytest.mark.parametrize("base", [spsa(4), nes(4), eot(2, base=spsa(4))])
def test_differences_of_scores_are_refused(base: Any) -> None:
    with pytest.raises(ConfigError, match="rounds away"):
        mixed(base=base)


def test_other_types_are_refused() -> None:
    with pytest.raises(ConfigError, match="'bf16'"):
        mixed("fp16")
