"""The loop shared by the gradient attacks with a budget: step, project, evaluate, keep the best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from feint.core import random
from feint.core.checks import check_eps, check_images, check_keys, check_labels, check_mask
from feint.core.errors import ConfigError, DeviceError, GradientError, ModelError, RangeError
from feint.core.gradients import (
    Estimate,
    GradientEstimator,
    Model,
    backprop,
    is_stochastic,
    require_gradient,
    takes_keys,
)
from feint.core.losses import Loss, get_loss, margin, success_share
from feint.core.mixed import declare_margin
from feint.core.norms import check_norm, project, random_in_ball, steepest_ascent

__all__ = ["EPS", "Direction", "Stop", "Trace", "ascend", "sample_keys", "stops_early"]

Stop = Literal["success", "never"]
Direction = Literal["sign", "gradient", "raw"]
Trace = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]
"""Called as `trace(step, x_adv, logits, loss, active)` for every evaluated point.

`logits` are (B, D, K) with the D draws of the estimator; `active` holds the index of each row's
sample in the batch, more than once under restarts.
"""

EPS = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}
"""The field's customary budgets for 32×32 images, used when `eps` is left out."""


def sample_keys(seed: int | Tensor, x: Tensor) -> Tensor:
    """Keys (B,) from an integer seed (samples numbered by position) or from keys as given."""
    if isinstance(seed, Tensor):
        check_keys(seed, len(x))
        return seed.to(x.device)
    return random.keys(seed, torch.arange(len(x), device=x.device))


def stops_early(stop: Stop | None, model: Model) -> bool:
    """Resolve `stop`: by default a deterministic model's samples leave when adversarial."""
    if stop is None:
        return not is_stochastic(model)
    if stop not in ("success", "never"):
        raise ConfigError(f"stop is {stop!r}; expected 'success', 'never' or None")
    return stop == "success"


def _column(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *[1] * (like.ndim - 1))


@dataclass
class _Rows:
    """The samples still in the loop, one row per sample and restart, each with its best point.

    The best point has most draws adversarial, then the highest loss; of equals it is the latest,
    since a saturated loss stays the same while the ascent makes its way. `broken` marks rows that
    met NaN or an infinite gradient.
    """

    number: Tensor
    sample: Tensor
    x: Tensor
    point: Tensor
    y: Tensor
    keys: Tensor
    low: Tensor
    high: Tensor
    mask: Tensor | None
    velocity: Tensor | None
    best: Tensor
    share: Tensor
    loss: Tensor
    broken: Tensor

    def keep(self, rows: Tensor) -> None:
        """Compact every field to the given rows."""
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None:
                setattr(self, f.name, value[rows])

    def record(self, share: Tensor, loss: Tensor) -> None:
        """Take the current point as the best one where it is."""
        better = (share > self.share) | ((share == self.share) & (loss >= self.loss))
        self.share = torch.where(better, share, self.share)
        self.loss = torch.where(better, loss, self.loss)
        self.best = torch.where(_column(better, self.point), self.point, self.best)


@dataclass
class _Result:
    """What each row ends with; rows are written when they leave the loop."""

    best: Tensor
    share: Tensor
    loss: Tensor
    broken: Tensor

    def write(self, rows: _Rows) -> None:
        for f in fields(self):
            getattr(self, f.name)[rows.number] = getattr(rows, f.name)

    def pick(self, restarts: int) -> Tensor:
        """The best restart of each sample.

        Raises:
            GradientError: If a sample that never fell met a gradient that was no number.
        """
        share, loss = self.share.view(-1, restarts), self.loss.view(-1, restarts)
        broken = self.broken.view(-1, restarts).any(1) & (share.amax(1) <= 0)
        if bool(broken.any()):
            raise GradientError(
                f"NaN or infinite gradients or logits for {int(broken.sum())} of {len(broken)} "
                "samples on the way; look for sqrt, log or a division at zero in the model"
            )
        if restarts == 1:
            return self.best
        top = torch.where(share == share.amax(1, keepdim=True), loss, -torch.inf).argmax(1)
        return self.best[torch.arange(len(top), device=top.device) * restarts + top]


def _bounds(x: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """Box of allowed values; for linf it holds the ball too, exactly when measured in float64."""
    if norm != "linf":
        return torch.zeros_like(x), torch.ones_like(x)
    exact = x.double()
    low, high = (exact - eps).to(x.dtype), (exact + eps).to(x.dtype)
    # The nearest number of this type can lie outside by a rounding; the next one inwards does not.
    up = torch.tensor(torch.inf, dtype=x.dtype, device=x.device)
    low = torch.where(exact - low.double() > eps, torch.nextafter(low, up), low)
    high = torch.where(high.double() - exact > eps, torch.nextafter(high, -up), high)
    return low.clamp(0, 1), high.clamp(0, 1)


def _radius(x: Tensor, norm: str, eps: float) -> float:
    """Radius to project to, such that the rounding of x + δ cannot leave the ball of `eps`.

    Values in [0, 1] are rounded by at most a quarter of the machine epsilon, so the distance grows
    by at most n^(1/p) of these; the last factor covers the rounding of δ and of the measurement.
    """
    order = 2 if norm == "l2" else 1
    slack = x[0].numel() ** (1 / order) * torch.finfo(x.dtype).eps / 4
    return max(0.0, eps - slack) * (1 - 1e-6)


def _confine(rows: _Rows, point: Tensor, norm: str, radius: float) -> Tensor:
    """An allowed point: mask, ball, box, in this order; the last two never undo the first."""
    if rows.mask is not None:
        point = torch.where(rows.mask, point, rows.x)
    if norm != "linf":
        delta = point - rows.x
        if norm == "l1":
            delta = project(delta, "l1", radius)
        order = 2 if norm == "l2" else 1
        size = torch.linalg.vector_norm(delta.flatten(1), order, dim=1, dtype=torch.float64)
        shrink = (radius / size.clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1)
        point = rows.x + delta * _column(shrink.to(delta.dtype), delta)
    return torch.clamp(point, rows.low, rows.high)


def _unit(rows: _Rows, gradient: Tensor, norm: str, direction: Direction, decay: float) -> Tensor:
    """Unit step (or the raw gradient) that each row takes; updates the momentum."""
    if rows.mask is not None:
        gradient = gradient * rows.mask
    if rows.velocity is not None:
        size = _column(gradient.abs().flatten(1).mean(1), gradient)
        normed = gradient / size.clamp_min(torch.finfo(gradient.dtype).tiny)
        rows.velocity = gradient = decay * rows.velocity + normed
    if direction == "raw":
        return gradient
    if direction == "gradient":
        return steepest_ascent(gradient, "l2")
    if norm == "l1":
        # Values at the end of the box cannot follow; the few that step must be others.
        stuck = torch.where(gradient > 0, rows.point >= rows.high, rows.point <= rows.low)
        gradient = gradient.masked_fill(stuck, 0)
    return steepest_ascent(gradient, norm)


def _check(
    x: Tensor, y: Tensor, eps: float, norm: str, norms: tuple[str, ...], mask: Tensor | None
) -> None:
    check_images(x)
    if isinstance(y, Tensor) and y.device != x.device:
        raise DeviceError(f"y is on {y.device}, x on {x.device}; move one of them")
    check_labels(y, len(x))
    check_norm(norm, norms)
    check_eps(eps, norm, x.shape)
    if mask is not None:
        check_mask(mask, x)


def _check_walk(
    norm: str, steps: int, step_size: float, random_start: bool, restarts: int, direction: Direction
) -> None:
    for name, value in (("steps", steps), ("restarts", restarts)):
        if not isinstance(value, int) or value < 1:
            raise RangeError(f"{name} is {value}; expected a whole number ≥ 1")
    if restarts > 1 and not random_start:
        raise ConfigError(
            f"restarts is {restarts} without a random start: all would be the same; "
            "set random_start=True or restarts=1"
        )
    if direction not in ("sign", "gradient", "raw"):
        raise ConfigError(f"direction is {direction!r}; expected 'sign', 'gradient' or 'raw'")
    if not step_size >= 0:
        raise RangeError(f"step_size is {step_size}; expected a number ≥ 0")
    if norm == "linf" and direction == "sign" and step_size > 1:
        raise RangeError(
            f"step_size is {step_size:g} for linf; images are in [0, 1], so expected at most 1; "
            f"write {step_size:g}/255 if it is in 0…255 units"
        )


def _objective(
    loss: str | Loss, targeted: bool, y: Tensor, label: Callable[[Tensor], Tensor] | None = None
) -> Loss:
    """The loss to maximise, which refuses labels beyond the classes and losses not per sample.

    Args:
        loss: As the attack takes it.
        targeted: Whether labels are targets.
        y: All labels (B,).
        label: From what the loop gives the loss as `y` to labels, if that is something else.
    """
    inner = get_loss(loss, targeted)
    top = int(y.max()) if len(y) else 0

    def objective(logits: Tensor, labels: Tensor) -> Tensor:
        if logits.shape[-1] < 2:
            raise ModelError(f"the model gives {logits.shape[-1]} class; expected at least 2")
        if top >= logits.shape[-1]:
            check_labels(y, len(y), logits.shape[-1])
        value = inner(logits, labels)
        if value.shape != logits.shape[:-1]:
            raise ConfigError(
                f"the loss gave {tuple(value.shape)} for logits {tuple(logits.shape)}; expected "
                "one value per sample; do not average over the batch"
            )
        return value

    def goal(logits: Tensor, labels: Tensor) -> Tensor:
        own = margin(logits, labels if label is None else label(labels))
        return -own if targeted else own

    return declare_margin(objective, goal)


def _check_first(
    estimate: Estimate, rows: _Rows, model: Model, gradient: GradientEstimator
) -> None:
    """Look at the first estimate's values once: NaN, structural zero gradients."""
    if bool(estimate.logits.isnan().any()):
        raise ModelError("the model gives NaN logits for valid images; check its weights")
    if not getattr(gradient, "scores_only", False):
        require_gradient(model, rows.point, rows.keys, estimate.gradient)


def ascend(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str,
    norms: tuple[str, ...],
    steps: int,
    step_size: float,
    targeted: bool,
    loss: str | Loss,
    gradient: GradientEstimator | None,
    mask: Tensor | None,
    seed: int | Tensor,
    stop: Stop | None,
    trace: Trace | None,
    random_start: bool = False,
    restarts: int = 1,
    direction: Direction = "sign",
    decay: float = 0.0,
    lookahead: bool = False,
) -> Tensor:
    """Take `steps` ascent steps from `x` and return each sample's best evaluated point.

    The `steps + 1` points (start and every step) are all evaluated. Restarts are further rows of
    the same batch. With early stopping, a sample's rows leave when one of them is adversarial on
    all of its draws; what is left is compacted, which is the only host synchronisation of a step.
    With `lookahead` the gradient is that at the point where the momentum alone would lead.

    Raises:
        ConfigError, RangeError, ShapeError, DtypeError, DeviceError: On bad arguments.
        GradientError: If no gradient reaches the input, or one that is not finite.
        ModelError: If the logits are NaN or not (B, K) with K ≥ 2.
    """
    _check(x, y, eps, norm, norms, mask)
    _check_walk(norm, steps, step_size, random_start, restarts, direction)
    objective = _objective(loss, targeted, y)
    early = stops_early(stop, model)
    gradient = gradient or backprop
    keyed = gradient is not backprop or takes_keys(model)
    keys = sample_keys(seed, x)
    if len(x) == 0:
        return x.clone()

    rows = _start(x.detach(), y, norm, eps, mask, keys, restarts, decay != 0)
    radius = _radius(x, norm, eps)
    if random_start:
        delta = random_in_ball(random.fold(rows.keys, "start"), rows.x, norm, eps)
        rows.point = _confine(rows, rows.x + delta, norm, radius)
    result = _Result(rows.x.clone(), rows.share.clone(), rows.loss.clone(), rows.broken.clone())
    finished = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    for step in range(steps + 1):
        last = step == steps
        drawn = random.fold(rows.keys, "step", step) if keyed else rows.keys
        plain = last or rows.velocity is None or not lookahead
        estimate = gradient(
            model, rows.point, rows.y, objective, drawn, forward_only=last or not plain
        )
        if not plain and rows.velocity is not None:
            ahead = rows.point.add(rows.velocity, alpha=decay * step_size)
            slope = gradient(model, ahead, rows.y, objective, drawn).gradient
            estimate = estimate._replace(gradient=slope)
        if step == 0:
            _check_first(estimate, rows, model, gradient)
        share = success_share(estimate.logits, rows.y, targeted)
        rows.broken = rows.broken | estimate.logits.flatten(1).isnan().any(1)
        rows.record(share, estimate.loss.to(x.dtype))
        if trace is not None:
            trace(step, rows.point, estimate.logits, estimate.loss, rows.sample)
        if last:
            break
        slope = estimate.gradient
        if early:
            finished.index_add_(0, rows.sample, (share == 1).int())
            left = (finished[rows.sample] == 0).nonzero()[:, 0]
            if len(left) < len(rows.sample):
                result.write(rows)
                rows.keep(left)
                slope = slope[left]
            if len(left) == 0:
                break
        # One NaN or infinite value spoils the sum. Such rows stay where they are, and are told.
        rows.broken = rows.broken | ~slope.flatten(1).sum(1).isfinite()
        slope = slope.masked_fill(_column(rows.broken, slope), 0)
        unit = _unit(rows, slope, norm, direction, decay)
        rows.point = _confine(rows, rows.point.add(unit, alpha=step_size), norm, radius)
    result.write(rows)
    return result.pick(restarts)


def _start(
    x: Tensor,
    y: Tensor,
    norm: str,
    eps: float,
    mask: Tensor | None,
    keys: Tensor,
    restarts: int,
    momentum: bool,
) -> _Rows:
    """One row per sample and restart, all at `x`."""
    numbers = torch.arange(restarts, device=x.device)
    wide = x.repeat_interleave(restarts, 0)
    low, high = _bounds(wide, norm, eps)
    if mask is not None:
        mask = mask.expand(len(x), *mask.shape[1:]).repeat_interleave(restarts, 0)
    return _Rows(
        number=torch.arange(len(wide), device=x.device),
        sample=torch.arange(len(x), device=x.device).repeat_interleave(restarts),
        x=wide,
        point=wide,
        y=y.repeat_interleave(restarts, 0),
        keys=random.fold(keys, "restart", 0, numbers).flatten(),
        low=low,
        high=high,
        mask=mask,
        velocity=torch.zeros_like(wide) if momentum else None,
        best=wide,
        share=torch.full((len(wide),), -1.0, device=x.device),
        loss=torch.full((len(wide),), -torch.inf, dtype=x.dtype, device=x.device),
        broken=torch.zeros(len(wide), dtype=torch.bool, device=x.device),
    )
