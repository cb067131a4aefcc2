"""Checks of the attacker's view: is it the pipeline that is judged, and does its gradient help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.errors import GradientError
from feint.core.gradients import (
    GradientEstimator,
    backprop,
    call,
    eot,
    find_gradient_loss,
    is_stochastic,
)
from feint.core.losses import LOSSES, Loss, get_loss, margin
from feint.evaluation.attackers import EOT_DRAWS, ParsedAttack
from feint.evaluation.cell import Cell
from feint.evaluation.findings import Finding, Status
from feint.evaluation.health.declare import Undeclared, unlike
from feint.evaluation.health.foretell import check_slopes, check_stability, inside
from feint.evaluation.recorder import counted
from feint.evaluation.shard import Batch, Subject

__all__ = ["check_gradient", "check_slope", "gradient_passes"]

STEP = 2 / 255
"""Step along the gradient, in image units; less if the budget is less."""
HELPFUL, USELESS = 0.8, 0.65
"""Share of samples on which the gradient must do no worse than chance: below the first a warning,
below the second a failure. A gradient of pure noise reaches about one half."""
SOME = 8
"""Samples whose gradients are estimated once more, where each costs a batch of draws."""
LOST = 0.1
"""Share of zero gradients above which nothing else of them is looked at."""
SIGNAL, STANDING = 0.1, 0.05
"""Cosine of two estimates below which draws resolve nothing, if more than this share stands."""


Slope = Callable[[GradientEstimator, Loss, Tensor, Tensor, Tensor], Tensor]


def _slopes(view: nn.Module, batch_size: int) -> Slope:
    """Gradients of a view, so many images at a time that the draws of each fit."""
    few = max(1, batch_size // EOT_DRAWS) if is_stochastic(view) else batch_size

    def slope(
        estimator: GradientEstimator, loss: Loss, y: Tensor, x: Tensor, drawn: Tensor
    ) -> Tensor:
        parts = [slice(i, i + few) for i in range(0, len(x), few)]
        found = [estimator(view, x[p], y[p], loss, drawn[p]).gradient for p in parts]
        return torch.cat(found)

    return slope


def _estimator(subject: Subject, cell: Cell, view: nn.Module) -> GradientEstimator | None:
    """What the cell's attack estimates gradients with; None if it asks for none."""
    attack = subject.attacker(cell)
    if attack.attack.info.knowledge != "gradient":
        return None
    used: GradientEstimator | None = attack.settings().get("gradient")
    if used is None:
        used = eot(EOT_DRAWS) if is_stochastic(view) else backprop
    return used


def gradient_passes(subject: Subject, cell: Cell, batch: Batch) -> float:
    """Forward passes that one gradient of the cell's attack takes, a backward pass counted as two.

    Args:
        subject: The cell's objects.
        cell: A white-box cell.
        batch: At least one sample.

    Cost: one gradient of one sample.
    """
    view = subject.attacked(cell)
    used = _estimator(subject, cell, view)
    if used is None:
        return 1.0
    one = batch.select(slice(0, 1))
    keys = random.keys(cell.seed, one.index).to(one.x.device)
    with counted(view) as passes, suppress(GradientError):
        used(view, one.x, one.y, margin, keys)
    return max(1.0, passes.forwards + 2.0 * passes.backwards)


def check_gradient(
    subject: Subject, cell: Cell, batch: Batch, name: str, batch_size: int, left: float = 1.0
) -> Iterator[Finding]:
    """Checks of a white-box cell's view, with the estimator that its attack uses.

    Args:
        subject: The cell's objects.
        cell: A white-box cell.
        batch: A few samples.
        name: The pipeline in words.
        batch_size: Images per pass.
        left: Accuracy that the cell's attack left: where nothing stands, noise did no harm.
    """
    view, pipeline = subject.attacked(cell), subject.pipeline(cell)
    keys = random.keys(cell.seed, batch.index).to(batch.x.device)
    yield _exact_view(view, pipeline, batch.x, keys, name)
    attack = subject.attacker(cell)
    used = _estimator(subject, cell, view)
    if used is None:
        return
    some = SOME if is_stochastic(view) else len(batch)
    slope = _slopes(view, batch_size)
    try:
        gradient = slope(used, margin, batch.y, batch.x, keys)
    except GradientError as error:
        yield Finding("zero-gradient", "fail", name, str(error))
        return
    if attack.attack.needs_gradient:
        found = _zeros(view, batch.x, keys, gradient, name)
        yield found
        if found.status == "fail":
            return
        own = _own_loss(attack.attack, cell.targeted)
        if own is not None and own is not margin:
            goal = batch.goal(cell.targeted)[:some]
            dead = slope(used, own, goal, batch.x[:some], keys[:some])
            yield _alive(dead, name, attack.attack)
    yield _agreement(pipeline, cell, batch, keys, gradient, name, batch_size)
    if is_stochastic(view):
        drawn = random.fold(keys[:some], "second estimate")
        other = slope(used, margin, batch.y[:some], batch.x[:some], drawn)
        yield _signal(gradient[:some], other, name, left)


def check_slope(
    subject: Subject, cell: Cell, batch: Batch, name: str, batch_size: int
) -> Iterator[Finding]:
    """Does the view's gradient foretell what happens, and is the loss stable?

    Nothing where the gradient is zero or refused: `check_gradient` says so.

    Args:
        subject: The cell's objects.
        cell: A white-box cell.
        batch: A few samples.
        name: The pipeline in words.
        batch_size: Images per pass.

    Cost: one gradient and 17 forward passes per sample; one more if the pipeline is random.
    """
    view, pipeline = subject.attacked(cell), subject.pipeline(cell)
    keys = random.keys(cell.seed, batch.index).to(batch.x.device)
    if _estimator(subject, cell, view) is None:
        return
    if subject.attacker(cell).attack.needs_gradient:
        slope = _slopes(view, batch_size)
        try:
            gradient = slope(backprop, margin, batch.y, inside(batch.x), keys)
        except GradientError:
            return
        if not bool(gradient.isfinite().all()) or _share_of_zeros(gradient) > LOST:
            return
        # One draw for a random pipeline: the same in the gradient and in what happens.
        yield from check_slopes(pipeline, gradient, batch, keys, name, batch_size)
    yield from check_stability(pipeline, batch, keys, name, batch_size)


def _share_of_zeros(gradient: Tensor) -> float:
    return float((gradient == 0).flatten(1).all(1).double().mean()) if len(gradient) else 0.0


def _own_loss(attack: ParsedAttack, targeted: bool) -> Loss | None:
    """The loss that the attack climbs, if it has one by name."""
    named = attack.effective("loss") if "loss" in attack.info.parameters else None
    return get_loss(named, targeted) if isinstance(named, str) and named in LOSSES else None


def _alive(gradient: Tensor, name: str, attack: ParsedAttack) -> Finding:
    dead = _share_of_zeros(gradient)
    status: Status = "fail" if dead > 0.5 else "warn" if dead > 0.1 else "pass"
    evidence = (
        f"the gradient of the attack's own loss, {attack.effective('loss')}, is zero on "
        f"{100 * dead:.0f} % of {len(gradient)} samples (warn above 10 %, fail above 50 %)"
    )
    if status != "pass":
        evidence += "; the loss is saturated: attack with loss='margin' or loss='dlr'"
    return Finding("loss-is-alive", status, name, evidence)


def _signal(first: Tensor, second: Tensor, name: str, left: float) -> Finding:
    a, b = first.flatten(1).double(), second.flatten(1).double()
    lengths = a.norm(dim=1) * b.norm(dim=1)
    known = lengths > 0
    evidence = f"no estimate of {len(a)} samples is other than zero"
    if not bool(known.any()):
        return Finding("eot-signal", "pass", name, evidence)
    cosine = float(((a * b).sum(1)[known] / lengths[known]).mean())
    evidence = (
        f"two independent estimates of the gradient have a cosine of {cosine:.2f} (warn below "
        f"{SIGNAL:g} if more than {100 * STANDING:g} % stand; {100 * left:.0f} % do)"
    )
    weak = cosine < SIGNAL and left > STANDING
    if weak:
        evidence += (
            f"; noise hides it: about {_draws_for_half(cosine)} times the draws for a cosine of 0.5"
        )
    return Finding("eot-signal", "warn" if weak else "pass", name, evidence)


def _draws_for_half(cosine: float) -> str:
    """Signal grows with the draws: c = s/(s + 1) for one estimate, s·k/(s·k + 1) for k times."""
    return f"{(1 - cosine) / cosine:.0f}" if cosine > 1e-3 else "more than 1000"


def _exact_view(
    view: nn.Module, pipeline: nn.Module, x: Tensor, keys: Tensor, name: str
) -> Finding:
    with torch.enable_grad():  # as an attack asks: a pipeline might answer it otherwise
        seen = call(view, x.detach().clone().requires_grad_(), keys).detach()
    with torch.no_grad():
        off = unlike(seen, call(pipeline, x, keys))
    unkeyed = any(isinstance(m, Undeclared) for m in pipeline.modules())
    evidence = (
        f"logits of what is attacked and of what is judged differ by {off:.2g} of the largest "
        "(must be 0)"
    )
    status: Status = "pass" if off == 0 else "fail"
    if off and unkeyed:
        status, evidence = "warn", evidence + "; its randomness takes no keys"
    return Finding("view-is-exact", status, name, evidence)


def _zeros(view: nn.Module, x: Tensor, keys: Tensor, gradient: Tensor, name: str) -> Finding:
    flat = gradient.flatten(1)
    zero = float((flat == 0).all(1).double().mean())
    bad = float((~flat.isfinite()).any(1).double().mean())
    evidence = f"{100 * zero:.0f} % of the input gradients are zero, {100 * bad:.0f} % not finite"
    status: Status = "pass"
    if zero > 0 or bad > 0:
        module = find_gradient_loss(view, x, keys) if zero > 0 else _first_bad(view, x, keys)
        evidence += f"; lost in module {module!r}" if module else ""
        status = "fail" if zero > LOST or bad > 0 else "warn"
    return Finding("zero-gradient", status, name, evidence + " (fail above 10 %)")


def _first_bad(view: nn.Module, x: Tensor, keys: Tensor) -> str | None:
    """The innermost module that turns a finite gradient of its output into NaN or infinity."""
    found: list[str] = []
    hooks = []

    def record(name: str):  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, into: tuple[object, ...], out: tuple[object, ...]) -> None:
            ends = [[t for t in g if isinstance(t, Tensor)] for g in (into, out)]
            bad = [any(not bool(t.isfinite().all()) for t in g) for g in ends]
            if bad[0] and not bad[1]:
                found.append(name)

        return hook

    for name, module in view.named_modules():
        if name:
            hooks.append(module.register_full_backward_hook(record(name)))
    try:
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            logits = call(view, leaf, keys)
            torch.autograd.grad(logits.sum(), leaf, allow_unused=True)
    except RuntimeError:  # a module that works in place cannot be hooked
        return None
    finally:
        for handle in hooks:
            handle.remove()
    return min(found, key=lambda n: -n.count("."), default=None)


@torch.no_grad()
def _agreement(
    pipeline: nn.Module,
    cell: Cell,
    batch: Batch,
    keys: Tensor,
    gradient: Tensor,
    name: str,
    batch_size: int,
) -> Finding:
    """Does a step along the view's gradient raise the true pipeline's loss?

    One small step in the sign's direction, judged by the margin loss of the true pipeline, mean
    over the same draws, and compared with the same step in a random direction. A step that does as
    well as chance is no evidence against the gradient: a pipeline may not depend on its input.
    """
    draws = EOT_DRAWS if is_stochastic(pipeline) else 1
    wide = random.fold(keys, "agreement", 0, torch.arange(draws, device=keys.device)).flatten()
    y = batch.y.repeat_interleave(draws)

    def loss(x: Tensor) -> Tensor:
        many = x.repeat_interleave(draws, 0)
        parts = [
            margin(
                call(pipeline, many[i : i + batch_size], wide[i : i + batch_size]),
                y[i : i + batch_size],
            )
            for i in range(0, len(many), batch_size)
        ]
        return torch.cat(parts).double().view(-1, draws).mean(1)

    step = min(STEP, cell.eps) if cell.norm == "linf" and cell.eps > 0 else STEP
    blind = random.integers(random.fold(keys, "blind"), 0, 2, batch.x.shape[1:]) * 2 - 1
    base = loss(batch.x)
    gain = loss((batch.x + step * gradient.sign()).clamp(0, 1)) - base
    chance = loss((batch.x + step * blind).clamp(0, 1)) - base
    slack = 1e-6 * (1 + base.abs())
    fine = float((gain >= chance - slack).double().mean())
    evidence = (
        f"a step of {step:.3g} along the gradient raises the margin loss of the deployed pipeline "
        f"by {float(gain.mean()):.3g} on average, a random one by {float(chance.mean()):.3g}; it "
        f"does no worse on {100 * fine:.0f} % of {len(batch)} samples (warn below "
        f"{100 * HELPFUL:.0f} %, fail below {100 * USELESS:.0f} %)"
    )
    status: Status = "pass" if fine >= HELPFUL else "warn" if fine >= USELESS else "fail"
    return Finding("gradient-is-useful", status, name, evidence)
