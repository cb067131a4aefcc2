"""The loop of APGD: momentum, step sizes that halve where the ascent no longer pays."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from feint.attacks._ascent import (
    Stop,
    Trace,
    _check,
    _check_first,
    _check_walk,
    _column,
    _confine,
    _objective,
    _radius,
    _Result,
    _Rows,
    _start,
    sample_keys,
    stops_early,
)
from feint.attacks._boxed import l1_ball_in_box
from feint.attacks._targets import (
    Targets,
    check_targets,
    chunked,
    likeliest,
    pack,
    rows_at_once,
    tolerant_dlr,
    toward,
    unpack,
)
from feint.core import random
from feint.core.errors import ModelError, RangeError
from feint.core.gradients import Estimate, GradientEstimator, Model, backprop, takes_keys
from feint.core.losses import Loss, success_share
from feint.core.norms import random_in_ball, steepest_ascent

__all__ = ["NORMS", "checkpoints", "climb"]

NORMS = ("linf", "l2", "l1")
_MOMENTUM = 0.75
_RHO = 0.75
"""Share of the steps between two checkpoints that must raise the loss."""


def checkpoints(steps: int) -> list[int]:
    """Steps after which the step sizes are looked at: intervals of 22 % of them, shrinking to 6 %.

    Example:
        >>> checkpoints(100)[:4]
        [22, 41, 57, 70]
    """
    interval, least, less = (max(1, int(share * steps)) for share in (0.22, 0.06, 0.03))
    found, at = [], interval
    while at <= steps:
        found.append(at)
        interval = max(interval - less, least)
        at += interval
    return found


@dataclass
class _Climb(_Rows):
    """A row's own step size, and what it needs to decide on it."""

    label: Tensor
    """What the loss is told: the label, or label and target as one number."""
    step: Tensor
    previous: Tensor
    """The point before the current one."""
    peak: Tensor
    """The point of the highest loss, to which a row returns when its step size is halved."""
    slope: Tensor
    """The gradient there."""
    top: Tensor
    """The loss there."""
    before: Tensor
    """The loss at the previous point."""
    rises: Tensor
    """Steps since the last checkpoint that raised the loss."""
    settled: Tensor
    """Whether the step size was halved at the last checkpoint (or there was none)."""
    checked: Tensor
    """The highest loss at the last checkpoint."""
    sparsity: Tensor
    """l1: share of the values that step."""
    changed: Tensor
    """l1: how many values the peak had changed at the last checkpoint."""


def climb(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str,
    steps: int,
    step_size: float | None,
    random_start: bool,
    restarts: int,
    targets: Targets,
    sparsity: float,
    targeted: bool,
    loss: str | Loss,
    gradient: GradientEstimator | None,
    mask: Tensor | None,
    seed: int | Tensor,
    stop: Stop | None,
    trace: Trace | None,
    tolerant: bool = False,
) -> Tensor:
    """What `apgd` documents; `tolerant` replaces DLR where the classes are too few for it."""
    _check(x, y, eps, norm, NORMS, mask)
    _check_walk(norm, steps, step_size or 0.0, random_start, restarts, "sign")
    check_targets(targets, targeted)
    if not 0 < sparsity <= 1:
        raise RangeError(f"sparsity is {sparsity}; expected a share in (0, 1]")
    if step_size is None:
        step_size = eps if norm == "l1" else 2 * eps
    if tolerant and loss == "dlr" and targets is None:
        loss = tolerant_dlr(targeted)
    chosen = loss if targets is None else toward(loss, tolerant)
    label_of = None if targets is None else lambda code: unpack(code)[0]
    objective = _objective(chosen, targeted and targets is None, y, label_of)
    early = stops_early(stop, model)
    estimator = gradient or backprop
    keyed = estimator is not backprop or takes_keys(model)
    keys = sample_keys(seed, x)
    if len(x) == 0:
        return x.clone()
    x = x.detach()

    fold, first = restarts, 0
    clean: Estimate | None = None
    target = y[:, None]
    if targets is not None:
        own = random.fold(keys, "targets") if keyed else keys
        plain = _objective("margin", False, y)
        clean = estimator(model, x, y, plain, own, forward_only=True)
        if bool(clean.logits.isnan().any()):
            raise ModelError("the model gives NaN logits for valid images; check its weights")
        if trace is not None:
            trace(0, x, clean.logits, clean.loss, torch.arange(len(x), device=x.device))
        target = likeliest(clean.logits, y, targets)
        fold, first = restarts * target.shape[1], 1
    base = _start(x, y, norm, eps, mask, keys, fold, False)
    label = base.y
    if clean is not None:
        label = pack(base.y, target.repeat_interleave(restarts, 1).flatten())
        wide = clean.logits.repeat_interleave(fold, 0)
        share = success_share(wide, base.y)
        base.record(share, objective(wide, label).mean(1).to(x.dtype))
    rows = _prepare(base, label, step_size, sparsity)
    radius = _radius(x, norm, eps)
    if random_start:
        delta = random_in_ball(random.fold(rows.keys, "start"), rows.x, norm, eps)
        rows.point = _confine(rows, rows.x + delta, norm, radius)
    result = _Result(*(getattr(rows, f.name).clone() for f in fields(_Result)))
    if clean is not None and early:
        left = (rows.share < 1).nonzero()[:, 0]
        rows.keep(left)
        if len(left) == 0:
            return result.pick(fold)
    estimator = chunked(estimator, rows_at_once(x, fold))
    finished = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    looks = frozenset(checkpoints(steps))
    pause = max(1, int(0.04 * steps))
    for step in range(steps + 1):
        last = step == steps
        drawn = random.fold(rows.keys, "step", step) if keyed else rows.keys
        estimate = estimator(model, rows.point, rows.label, objective, drawn, forward_only=last)
        if step == 0:
            _check_first(estimate, rows, model, estimator)
        share = success_share(estimate.logits, rows.y, targeted)
        rows.broken = rows.broken | estimate.logits.flatten(1).isnan().any(1)
        value = estimate.loss.to(x.dtype)
        rows.record(share, value)
        if trace is not None:
            trace(step + first, rows.point, estimate.logits, estimate.loss, rows.sample)
        if last:
            break
        slope = estimate.gradient
        if early:
            finished.index_add_(0, rows.sample, (share == 1).int())
            left = (finished[rows.sample] == 0).nonzero()[:, 0]
            if len(left) < len(rows.sample):
                result.write(rows)
                rows.keep(left)
                slope, value = slope[left], value[left]
            if len(left) == 0:
                break
        rows.broken = rows.broken | ~slope.flatten(1).sum(1).isfinite()
        slope = slope.masked_fill(_column(rows.broken, slope), 0)
        slope = slope if rows.mask is None else slope * rows.mask
        _note(rows, slope, value)
        if norm == "l1":
            if step and step % pause == 0:
                slope = _look_l1(rows, slope, step_size)
            _advance_l1(rows, slope, radius)
        else:
            if step in looks:
                slope = _look(rows, slope, step - max([0, *(s for s in looks if s < step)]))
            _advance(rows, slope, norm, radius, first=step == 0)
    result.write(rows)
    return result.pick(fold)


def _prepare(base: _Rows, label: Tensor, step_size: float, sparsity: float) -> _Climb:
    """The rows with their step sizes; `base` has their start."""
    count, size = len(base.x), base.x[:1].numel()
    value = base.loss.new_full((count,), -torch.inf)
    return _Climb(
        **{f.name: getattr(base, f.name) for f in fields(base)},
        label=label,
        step=torch.full_like(value, step_size),
        previous=base.x,
        peak=base.x,
        slope=torch.zeros_like(base.x),
        top=value,
        before=torch.full_like(value, torch.inf),
        rises=torch.zeros(count, dtype=torch.int32, device=value.device),
        settled=torch.ones(count, dtype=torch.bool, device=value.device),
        checked=value,
        sparsity=torch.full_like(value, sparsity),
        changed=torch.full_like(value, float(size)),
    )


def _note(rows: _Climb, slope: Tensor, value: Tensor) -> None:
    """Remember the peak and whether the last step went up."""
    higher = value > rows.top
    wide = _column(higher, slope)
    rows.peak = torch.where(wide, rows.point, rows.peak)
    rows.slope = torch.where(wide, slope, rows.slope)
    rows.top = torch.where(higher, value, rows.top)
    rows.rises = rows.rises + (value > rows.before)
    rows.before = value


def _look(rows: _Climb, slope: Tensor, interval: int) -> Tensor:
    """A checkpoint: halve the step and return to the peak where the ascent no longer pays."""
    few = rows.rises <= _RHO * interval
    stuck = ~rows.settled & (rows.checked >= rows.top)
    halve = few | stuck
    rows.step = torch.where(halve, rows.step / 2, rows.step)
    rows.settled, rows.checked = halve, rows.top
    rows.rises = torch.zeros_like(rows.rises)
    wide = _column(halve, slope)
    rows.point = torch.where(wide, rows.peak, rows.point)
    rows.before = torch.where(halve, rows.top, rows.before)
    return torch.where(wide, rows.slope, slope)


def _advance(rows: _Climb, slope: Tensor, norm: str, radius: float, first: bool) -> None:
    """A step along the gradient, and a quarter of the step before."""
    step = _column(rows.step, slope)
    point = _confine(rows, rows.point + step * steepest_ascent(slope, norm), norm, radius)
    if not first:
        point = torch.lerp(rows.point, point, _MOMENTUM)
        point = point.add(rows.point - rows.previous, alpha=1 - _MOMENTUM)
        point = _confine(rows, point, norm, radius)
    rows.previous, rows.point = rows.point, point


def _look_l1(rows: _Climb, slope: Tensor, step_size: float) -> Tensor:
    """l1: follow the sparsity of the peak; where it falls, start again from there."""
    count = math.prod(rows.x.shape[1:])
    changed = (rows.peak != rows.x).flatten(1).sum(1).to(rows.step.dtype)
    sparser = changed / rows.changed.clamp_min(1) < 0.95
    rows.sparsity = changed / count / 1.5
    shorter = (rows.step / 1.5).clamp(step_size / 10, step_size)
    rows.step = torch.where(sparser, torch.full_like(shorter, step_size), shorter)
    rows.changed = changed
    wide = _column(sparser, slope)
    rows.point = torch.where(wide, rows.peak, rows.point)
    return torch.where(wide, rows.slope, slope)


def _advance_l1(rows: _Climb, slope: Tensor, radius: float) -> None:
    """l1: an equal step on the largest gradient values, then onto the ball within the box."""
    # Values at the end of the box cannot follow; the few that step must be others.
    stuck = torch.where(slope > 0, rows.point >= rows.high, rows.point <= rows.low)
    size = slope.masked_fill(stuck, 0).abs().flatten(1)
    count = (rows.sparsity * size.shape[1]).long().clamp(1, size.shape[1])
    ordered = size.sort(dim=1, descending=True).values
    least = ordered.gather(1, count[:, None] - 1)
    kept = ((size >= least) & (size > 0)).view_as(slope)
    length = rows.step / kept.flatten(1).sum(1).clamp_min(1)
    point = rows.point + _column(length, slope) * slope.sign() * kept
    delta = l1_ball_in_box(point - rows.x, rows.x, radius)
    rows.previous, rows.point = rows.point, _confine(rows, rows.x + delta, "l1", radius)
