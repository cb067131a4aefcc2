"""The loop of FAB: project the point and the image onto the linearised boundary, and mix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from feint.attacks._ascent import Stop, Trace
from feint.attacks._boxed import step_to_hyperplane
from feint.attacks._minimal import (
    Answer,
    Rows,
    Search,
    check_count,
    check_number,
    column,
    dot,
    flag,
    goal_margin,
)
from feint.attacks._targets import (
    Targets,
    check_targets,
    chunked,
    gap,
    likeliest,
    pack,
    rows_at_once,
)
from feint.core import random
from feint.core.errors import ModelError
from feint.core.gradients import GradientEstimator, Model, backprop, call, comfortable
from feint.core.losses import margin
from feint.core.mixed import declare_margin
from feint.core.norms import norm_of, random_in_ball

__all__ = ["NORMS", "nearest"]

NORMS = ("linf", "l2", "l1")
_TARGET = declare_margin(lambda logits, y: -margin(logits, y), goal_margin(True))
_DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}


@dataclass
class _State(Rows):
    rows: Tensor
    x: Tensor
    point: Tensor
    rivals: Tensor
    """(R, C): classes whose boundary is looked at."""
    sample: Tensor
    """Which of the samples this row works for."""
    direct: bool
    """Whether autograd gives the gradients, so that rivals can share a forward pass."""


@dataclass
class _Plane(Rows):
    """The nearest linearised boundary of each row: gap + ⟨slope, z − point⟩ = 0."""

    hit: Tensor
    gap: Tensor
    slope: Tensor


def nearest(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    norm: str,
    steps: int,
    restarts: int,
    alpha_max: float,
    overshoot: float,
    backward: float,
    spread: float,
    refine: int,
    targets: Targets,
    targeted: bool,
    gradient: GradientEstimator | None,
    mask: Tensor | None,
    seed: int | Tensor,
    stop: Stop | None,
    trace: Trace | None,
    enough: float | None = None,
) -> Tensor:
    """What `fab` documents; with `enough` a sample stops at a point that is no farther than it."""
    for name, number in (("steps", steps), ("restarts", restarts)):
        check_count(name, number)
    check_count("refine", refine, least=0)
    check_number("alpha_max", alpha_max, high=1.0)
    check_number("overshoot", overshoot)
    check_number("backward", backward, high=1.0)
    check_number("spread", spread)
    check_targets(targets, targeted)
    whole = Search(
        model,
        x,
        y,
        norm=norm,
        norms=NORMS,
        targeted=targeted,
        gradient=gradient,
        mask=mask,
        seed=seed,
        stop=stop,
        trace=trace,
    )
    if len(x) == 0:
        return x.clone()
    logits = _look_at_images(whole)
    rivals = _rivals(logits, y, targets, targeted)
    left = whole.unsolved(whole.everyone) if whole.early else whole.everyone
    if len(left) == 0:
        return whole.result()
    rivals = rivals[left]
    fold = restarts * len(rivals[0])
    numbers = torch.arange(fold, device=x.device)
    owner = left.repeat_interleave(fold)

    def relay(step: int, point: Tensor, logits: Tensor, loss: Tensor, rows: Tensor) -> None:
        if trace is not None:
            trace(step, point, logits, loss, owner[rows])

    search = Search(
        model,
        whole.x[owner],
        y[owner],
        norm=norm,
        norms=NORMS,
        targeted=targeted,
        gradient=gradient,
        mask=None if whole.mask is None else whole.mask[owner],
        seed=random.fold(whole.keys[left], "row", 0, numbers).flatten(),
        stop=stop,
        trace=relay,
    )
    search.estimator = chunked(search.estimator, rows_at_once(x, fold * rivals.shape[2]))
    # The images have been evaluated already, once for all rows.
    search._asked = whole._asked
    search.size, search.start = whole.size[owner], whole.start[owner]
    wide = rivals.repeat_interleave(restarts, 1).flatten(0, 1)
    direct = whole.estimator is backprop
    state = _State(search.everyone, search.x, search.x, wide, owner, direct)
    if restarts > 1:
        delta = random_in_ball(random.fold(search.keys, "start"), search.x, norm, spread)
        moved = search.confine(search.x + delta, search.everyone, search.x)
        state.point = torch.where(
            flag(numbers.repeat(len(left)) % restarts > 0, x), moved, x[owner]
        )
    _descend(search, state, steps, alpha_max, overshoot, backward, enough)
    broken, search.broken = search.broken, torch.zeros_like(search.broken)
    found = search.finish(refine)
    return _pick(whole, search, found, broken, left, fold)


def _look_at_images(whole: Search) -> Tensor:
    """Evaluate the images themselves: logits (B, D, K)."""
    keys = whole.keys_for(whole.everyone, "image", 0)
    estimate = whole.estimator(
        whole.model, whole.x, whole.y, whole.checked(goal_margin(whole.targeted)), keys,
        forward_only=True,
    )  # fmt: skip
    whole.note(whole.x, whole.everyone, estimate.logits, estimate.loss, estimate.gradient)
    return estimate.logits


def _rivals(logits: Tensor, y: Tensor, targets: Targets, targeted: bool) -> Tensor:
    """The classes that each row looks at: (B, rows, C).

    A target: one row, whose rival is the target. With `targets`: a row for each. Else one row
    that looks at them all.
    """
    if targeted:
        return y[:, None, None]
    if targets is not None:
        return likeliest(logits, y, targets)[:, :, None]
    return likeliest(logits, y, "all")[:, None]


def _descend(
    search: Search,
    state: _State,
    steps: int,
    alpha_max: float,
    overshoot: float,
    backward: float,
    enough: float | None,
) -> None:
    """Walk along the boundary; what is found is kept by `search`."""
    done = torch.zeros(len(search.x), dtype=torch.int32, device=search.x.device)
    for step in range(steps + 1):
        last = step == steps
        plane = _linearise(search, state, step, forward_only=last)
        if last:
            break
        if enough is not None:
            near = search.size[state.rows] <= enough
            done.index_add_(0, state.sample, near.int())
            left = (done[state.sample] == 0).nonzero()[:, 0]
            if len(left) == 0:
                break
            if len(left) < len(state.rows):
                state.keep(left)
                plane.keep(left)
        x, point = state.x, state.point
        base = torch.where(flag(plane.hit, x), torch.lerp(x, point, backward), point)
        slope = plane.slope
        need = -plane.gap - dot(slope, base - point)
        from_x = -plane.gap - dot(slope, x - point)
        ahead = _project(base, slope, need, search.norm)
        home = _project(x, slope, from_x, search.norm)
        far, near_ = norm_of(ahead, search.norm), norm_of(home, search.norm)
        alpha = (far / (far + near_).clamp_min(1e-12)).clamp_max(alpha_max)
        if search.norm == "l1":
            # Steps move few values, and the pull can keep a walk from the boundary for good: one
            # that has found nothing yet is drawn towards the image less and less.
            never = search.size[state.rows].isinf()
            alpha = torch.where(never, alpha * (1 - step / steps), alpha)
        moved = torch.lerp(base + overshoot * ahead, x + overshoot * home, column(alpha, x))
        state.point = search.confine(moved, state.rows, x)


def _project(point: Tensor, slope: Tensor, need: Tensor, norm: str) -> Tensor:
    """`step_to_hyperplane`, on a CPU in parts that stay in its cache: a third of the time."""
    size = comfortable(point)
    parts = [
        step_to_hyperplane(point[i : i + size], slope[i : i + size], need[i : i + size], norm)
        for i in range(0, max(1, len(point)), size)
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _linearise(search: Search, state: _State, step: int, forward_only: bool) -> _Plane:
    """Evaluate the rows' points, and choose the nearest linearised boundary."""
    point, rows = state.point, state.rows
    y, keys = search.y[rows], search.keys_for(rows, "step", step)
    answer: Answer | None = None
    best = value = direction = torch.empty(0)
    for j, (logits, score, slope) in enumerate(_slopes(search, state, y, keys, forward_only)):
        if answer is None:
            if step == 0:
                search.check_gradient(logits, slope, point, keys)
            loss = goal_margin(search.targeted)(logits, y).mean(1)
            answer = search.note(point, rows, logits, loss, slope)
        if forward_only:
            return _Plane(answer.hit, score, slope)
        slope = search.clean(slope, rows)
        size = norm_of(slope, _DUAL[search.norm])
        away = score.abs() / size.clamp_min(1e-12)
        nearer = away < best if j else torch.ones_like(answer.hit)
        best = torch.where(nearer, away, best) if j else away
        value = torch.where(nearer, score, value) if j else score
        direction = torch.where(flag(nearer, slope), slope, direction) if j else slope
    if answer is None:
        raise ModelError("the model gives 1 class; expected at least 2")
    return _Plane(answer.hit, value, direction)


def _slopes(
    search: Search, state: _State, y: Tensor, keys: Tensor, forward_only: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Logits (R, D, K), score difference (R,) and its gradient, rival by rival."""
    point, rivals = state.point, state.rivals
    count = rivals.shape[1]
    if search.targeted or count == 1 or forward_only:
        loss = _TARGET if search.targeted else gap
        label = y if search.targeted else pack(y, rivals[:, 0])
        one = search.estimator(search.model, point, label, loss, keys, forward_only=forward_only)
        yield one.logits, one.loss, one.gradient
    elif state.direct:
        yield from _by_autograd(search, point, y, rivals, keys)
    else:
        wide = search.estimator(
            search.model,
            point.repeat_interleave(count, 0),
            pack(y[:, None], rivals).flatten(),
            gap,
            keys.repeat_interleave(count, 0),
        )
        logits, losses = wide.logits[::count], wide.loss.view(-1, count)
        gradients = wide.gradient.unflatten(0, (-1, count))
        for j in range(count):
            yield logits, losses[:, j], gradients[:, j]


def _by_autograd(
    search: Search, point: Tensor, y: Tensor, rivals: Tensor, keys: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The same by one forward pass and as many backward passes through it."""
    leaf = point.detach().requires_grad_()
    with torch.enable_grad():
        logits = call(search.model, leaf, keys)
        gaps = logits.gather(1, rivals) - logits.gather(1, y[:, None])
        sums = gaps.sum(0).unbind()
    count = rivals.shape[1]
    for j in range(count):
        slope = None
        if gaps.requires_grad:
            (slope,) = torch.autograd.grad(
                sums[j], leaf, retain_graph=j + 1 < count, allow_unused=True
            )
        if slope is None:  # raises an error that names where the gradient is lost
            slope = backprop(search.model, point, y, goal_margin(False), keys).gradient
        yield logits.detach()[:, None], gaps.detach()[:, j], slope


def _pick(
    whole: Search, search: Search, found: Tensor, broken: Tensor, left: Tensor, fold: int
) -> Tensor:
    """Each sample's nearest point of all its rows.

    Raises:
        GradientError: If a sample without one met a gradient that was no number.
    """
    size = norm_of(found.double() - search.x.double(), search.norm)
    size = torch.where(search.size.isfinite(), size, torch.inf).view(-1, fold)
    row = torch.arange(len(left), device=left.device) * fold + size.argmin(1)
    least = size.amin(1)
    better = least < whole.size[left]
    whole.size[left] = torch.where(better, least, whole.size[left])
    whole.best[left] = torch.where(flag(better, found), found[row], whole.best[left])
    whole.broken[left] = whole.broken[left] | broken.view(-1, fold).any(1)
    return whole.result()
