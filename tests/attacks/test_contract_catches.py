"""The attack contract can fail: each broken attack below is caught by the test meant for it.

Oracle: the defect that we put in (each of them has been seen in a published library).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from feint.attacks import pgd
from feint.core.errors import GradientError
from feint.core.norms import norm_of
from feint.core.registry import ATTACKS, AttackInfo
from tests.contracts.attack import AttackContract
from tests.tiny import LinearModel, Round


def returns_the_last_point(model: Any, x: Tensor, y: Tensor, **kw: Any) -> Tensor:
    last = x.clone()
    given = kw.pop("trace", None)

    def trace(step: int, points: Tensor, logits: Tensor, loss: Tensor, active: Tensor) -> None:
        last[active] = points
        if given is not None:
            given(step, points, logits, loss, active)

    pgd(model, x, y, trace=trace, **kw)
    return last


def leaves_the_ball_by_a_millionth(model: Any, x: Tensor, y: Tensor, **kw: Any) -> Tensor:
    return (x + (pgd(model, x, y, **kw) - x) * (1 + 3e-6)).clamp(0, 1)


def writes_x(model: Any, x: Tensor, y: Tensor, **kw: Any) -> Tensor:
    x.clamp_(0, 1)
    return pgd(model, x, y, **kw)


def uses_the_global_generator(model: Any, x: Tensor, y: Tensor, **kw: Any) -> Tensor:
    torch.rand(1)
    return pgd(model, x, y, **kw)


def fills_the_parameters_gradients(model: Any, x: Tensor, y: Tensor, **kw: Any) -> Tensor:
    model(x).sum().backward()
    return pgd(model, x, y, **kw)


def changes_the_mode(model: Any, x: Tensor, y: Tensor, **kw: Any) -> Tensor:
    model.eval()
    return pgd(model, x, y, **kw)


def draws_by_position(model: Any, x: Tensor, y: Tensor, **kw: Any) -> Tensor:
    return pgd(model, x, y, **{**kw, "seed": 0})


def couples_the_batch(model: Any, x: Tensor, y: Tensor, **kw: Any) -> Tensor:
    size = float(x.mean()) * 0.05 if x.numel() else 0.1
    return pgd(model, x, y, **{**kw, "step_size": size})


def does_not_evaluate_the_last_step(model: Any, x: Tensor, y: Tensor, **kw: Any) -> Tensor:
    steps = kw.pop("steps", 5)
    return pgd(model, x, y, steps=steps - 1, **kw) if steps > 1 else x.clone()


def ignores_the_mask(model: Any, x: Tensor, y: Tensor, **kw: Any) -> Tensor:
    return pgd(model, x, y, **{**kw, "mask": None})


def hides_a_lost_gradient(model: Any, x: Tensor, y: Tensor, **kw: Any) -> Tensor:
    try:
        return pgd(model, x, y, **kw)
    except GradientError:
        return x.clone()


def never_stops(model: Any, x: Tensor, y: Tensor, **kw: Any) -> Tensor:
    return pgd(model, x, y, **{**kw, "stop": "never"})


def clamps_what_it_gets(model: Any, x: Tensor, y: Tensor, **kw: Any) -> Tensor:
    return pgd(model, x.clamp(0, 1), y, **kw)


def waits_for_the_loss(model: Any, x: Tensor, y: Tensor, **kw: Any) -> Tensor:
    return pgd(model, x, y, trace=lambda *seen: float(seen[3].sum()), **kw)


def loops_over_samples(model: Any, x: Tensor, y: Tensor, **kw: Any) -> Tensor:
    return torch.cat([pgd(model, x[i : i + 1], y[i : i + 1], **kw) for i in range(len(x))])


def is_stuck_at_the_ends(model: Any, x: Tensor, y: Tensor, **kw: Any) -> Tensor:
    inner = (x > 0) & (x < 1)
    return pgd(model, x, y, **{**kw, "mask": inner})


def weighs_by_raw_logits(model: Any, x: Tensor, y: Tensor, **kw: Any) -> Tensor:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return -(logits**2).gather(-1, labels[:, None])[:, 0]

    return pgd(model, x, y, **{**kw, "loss": loss})


def forgets_the_targets(model: Any, x: Tensor, y: Tensor, **kw: Any) -> Tensor:
    return pgd(model, x, y, **{**kw, "targeted": False})


BALL = {
    "channels": 3, "height": 4, "width": 4, "batch": 4, "share": 0.4, "seed": 1, "double": False,
    "kind": "inner", "never": True,
}  # fmt: skip
BATCH = {"batch": 4, "cut": 2, "seed": 1, "share": 1.0}
MASK = {"seed": 1, "per_channel": False, "shared": False}

CASES: list[tuple[Callable[..., Tensor], str, tuple[Any, ...]]] = [
    (returns_the_last_point, "test_an_early_success_is_not_lost", ("linf",)),
    (returns_the_last_point, "test_returns_the_best_evaluated_point", ("linf",)),
    (leaves_the_ball_by_a_millionth, "test_stays_in_the_box_and_the_ball", ("linf", BALL)),
    (leaves_the_ball_by_a_millionth, "test_stays_in_the_box_and_the_ball", ("l2", BALL)),
    (writes_x, "test_leaves_no_trace", ("linf",)),
    (uses_the_global_generator, "test_leaves_no_trace", ("linf",)),
    (fills_the_parameters_gradients, "test_leaves_no_trace", ("linf",)),
    (changes_the_mode, "test_leaves_no_trace", ("linf",)),
    (draws_by_position, "test_independent_of_the_batch_on_a_linear_model", ("linf", BATCH)),
    (draws_by_position, "test_another_seed_differs_if_the_attack_is_random", ("linf",)),
    (couples_the_batch, "test_independent_of_the_batch_on_a_linear_model", ("linf", BATCH)),
    (couples_the_batch, "test_independent_of_the_batch_on_a_network", ("l2", False)),
    (does_not_evaluate_the_last_step, "test_a_single_step_moves_and_is_evaluated", ("l2", "never")),
    (ignores_the_mask, "test_mask_is_respected", ("linf", MASK)),
    (ignores_the_mask, "test_a_mask_of_nothing_returns_x", ("linf", torch.float32)),
    (hides_a_lost_gradient, "test_a_structural_zero_gradient_is_an_error", ("linf", "round")),
    (never_stops, "test_stop_success_saves_passes_and_loses_nothing", ("linf",)),
    (clamps_what_it_gets, "test_bad_input_names_the_fix", ("images in 0…255",)),
    (waits_for_the_loss, "test_no_host_synchronisation_within_a_step", ("linf",)),
    (loops_over_samples, "test_calls_do_not_grow_with_the_batch", ("linf",)),
    (is_stuck_at_the_ends, "test_pixels_at_the_ends_move_inwards", ("linf",)),
    (weighs_by_raw_logits, "test_a_shift_of_the_logits_changes_nothing", ("l2", 50.0, False)),
    (forgets_the_targets, "test_with_two_classes_targeted_is_untargeted", ("linf",)),
]


def contract_of(attack: Callable[..., Tensor], **attributes: Any) -> AttackContract:
    """An instance of the contract for an attack that nobody registered."""
    space = {"info": ATTACKS["pgd"], "kwargs": {"steps": 5}, "random": True, **attributes}
    return type("Mutant", (AttackContract,), {"attack": staticmethod(attack), **space})()


def check(contract: AttackContract, test: str, arguments: tuple[Any, ...]) -> None:
    """Run one test of the contract: fixtures by hand, and a property at one chosen example."""
    if test == "test_a_mask_of_nothing_returns_x":
        arguments = (arguments[0], LinearModel(dtype=arguments[1]))
    if test == "test_a_structural_zero_gradient_is_an_error":
        arguments = (arguments[0], Round())
    method = getattr(contract, test)
    if isinstance(arguments[-1], dict):
        method.hypothesis.inner_test(contract, *arguments[:-1], **arguments[-1])
    else:
        method(*arguments)


@pytest.mark.parametrize(
    ("attack", "test", "arguments"),
    CASES,
    ids=[f"{attack.__name__}-{i}" for i, (attack, _, _) in enumerate(CASES)],
)
def test_a_broken_attack_is_caught(
    attack: Callable[..., Tensor], test: str, arguments: tuple[Any, ...]
) -> None:
    check(contract_of(pgd), test, arguments)  # the sound attack passes
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(contract_of(attack), test, arguments)


# --- parts of the contract for attacks of another kind --------------------------------------------


def bisect(
    model: Any, x: Tensor, y: Tensor, *, norm: str = "l2", targeted: bool = False,
    mask: Tensor | None = None, seed: Any = 0, stop: Any = None, trace: Any = None,
    slack: float = 1.0,
) -> Tensor:  # fmt: skip
    """A minimal-norm attack: along the margin's gradient to the boundary, by bisection."""
    leaf = x.detach().requires_grad_()
    logits = model(leaf)
    own = logits.gather(1, y[:, None])[:, 0]
    gaps = own[:, None] - logits
    best, nearest = x.clone(), torch.full((len(x),), torch.inf, dtype=x.dtype)
    ones = [1] * (x.ndim - 1)
    for j in range(logits.shape[1]):
        (g,) = torch.autograd.grad(-gaps[:, j].sum(), leaf, retain_graph=True)
        unit = g.sign() if norm == "linf" else g / norm_of(g, "l2").clamp_min(1e-30).view(-1, *ones)
        low, high = torch.zeros_like(nearest), torch.full_like(nearest, 2.0)
        for _ in range(40):
            middle = (low + high) / 2
            point = (x + middle.view(-1, *ones) * unit).clamp(0, 1)
            over = model(point).argmax(1) != y
            low, high = torch.where(over, low, middle), torch.where(over, middle, high)
        point = (x + (high * slack).view(-1, *ones) * unit).clamp(0, 1)
        better = (model(point).argmax(1) != y) & (high < nearest)
        nearest = torch.where(better, high, nearest)
        best = torch.where(better.view(-1, *ones), point, best)
    return best.detach()


MINIMAL = AttackInfo("bisect", bisect, "test", 1, {}, "minimal", "gradient", ("l2", "linf"))


@pytest.mark.parametrize("norm", MINIMAL.norms)
def test_the_contract_of_minimal_attacks(norm: str) -> None:
    sound = contract_of(bisect, info=MINIMAL, kwargs={})
    wasteful = contract_of(bisect, info=MINIMAL, kwargs={"slack": 1.4})
    sound.test_finds_the_least_distance_on_a_linear_model(norm)
    with pytest.raises(AssertionError):
        wasteful.test_finds_the_least_distance_on_a_linear_model(norm)
    sound.test_returns_x_where_nothing_is_adversarial(norm)
    # What asks for a budget or for steps is not part of such an attack's contract.
    assert sound.test_eps_zero_returns_x is None
    assert sound.test_a_single_step_moves_and_is_evaluated is None
    assert contract_of(pgd).test_finds_the_least_distance_on_a_linear_model is None


def test_the_contract_of_score_attacks() -> None:
    info = AttackInfo("coin", pgd, "test", 1, {}, "budget", "score", ("linf",))
    score = contract_of(pgd, info=info)
    assert score.test_a_structural_zero_gradient_is_an_error is None
    assert score.test_eps_zero_returns_x is not None
