"""The loop shared by the gradient attacks with a budget: step, project, evaluate, keep the best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from feint.core import random
from feint.core.checks import check_eps, check_images, check_keys, check_labels, check_mask
from feint.core.errors import ConfigError, ModelError, RangeError
from feint.core.gradients import (
    Estimate,
    GradientEstimator,
    Model,
    backprop,
    is_stochastic,
    require_gradient,
)
from feint.core.losses import Loss, get_loss, success_share
from feint.core.norms import check_norm, distance, project, random_in_ball, steepest_ascent

__all__ = ["EPS", "Direction", "Stop", "Trace", "ascend", "sample_keys", "stops_early"]

Stop = Literal["success", "never"]
Direction = Literal["sign", "gradient", "raw"]
Trace = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]
"""Called as `trace(step, x_adv, logits, loss, active)` for every evaluated point."""

EPS = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}
"""The field's customary budgets for 32×32 images, used when `eps` is left out."""

_SAFE = 1 - 1e-6  # l2 and l1 project a little inside, so that rounding cannot leave the ball


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


@dataclass
class _Rows:
    """The samples still in the loop, one row per sample and restart."""

    sample: Tensor
    x: Tensor
    point: Tensor
    y: Tensor
    keys: Tensor
    velocity: Tensor
    low: Tensor
    high: Tensor
    mask: Tensor | None

    def keep(self, rows: Tensor) -> None:
        """Compact every field to the given rows."""
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None:
                setattr(self, f.name, value[rows])


@dataclass
class _Best:
    """Per row, the best point evaluated so far: most draws adversarial, then the highest loss."""

    point: Tensor
    share: Tensor
    loss: Tensor

    def update(self, rows: Tensor, point: Tensor, share: Tensor, loss: Tensor) -> None:
        old_share, old_loss = self.share[rows], self.loss[rows]
        better = (share > old_share) | ((share == old_share) & (loss > old_loss))
        self.share[rows] = torch.where(better, share, old_share)
        self.loss[rows] = torch.where(better, loss, old_loss)
        shape = (-1, *[1] * (point.ndim - 1))
        self.point[rows] = torch.where(better.view(shape), point, self.point[rows])


def _bounds(x: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """Box of allowed values; for linf it holds the ball too, exactly when measured in float64."""
    if norm != "linf":
        return torch.zeros_like(x), torch.ones_like(x)
    exact = x.double()
    low, high = (exact - eps).to(x.dtype), (exact + eps).to(x.dtype)
    inwards = torch.tensor(torch.inf, dtype=x.dtype, device=x.device)
    low = torch.where(low.double() < exact - eps, torch.nextafter(low, inwards), low)
    high = torch.where(high.double() > exact + eps, torch.nextafter(high, -inwards), high)
    return low.clamp(0, 1), high.clamp(0, 1)


def _confine(rows: _Rows, point: Tensor, norm: str, eps: float) -> Tensor:
    """The nearest allowed point: mask, ball, box (in that order; the box cannot leave the ball)."""
    if rows.mask is not None:
        point = torch.where(rows.mask, point, rows.x)
    if norm != "linf":
        delta = point - rows.x
        ones = [1] * (delta.ndim - 1)
        inner = project(delta, norm, eps * _SAFE)
        over = (distance(rows.x + inner, rows.x, norm) > eps).view(-1, *ones)
        # Rounding of x + δ can still exceed a tiny ball; there only no step at all is safe.
        point = torch.where(over, rows.x, rows.x + inner)
    return torch.minimum(torch.maximum(point, rows.low), rows.high)


def _step(rows: _Rows, gradient: Tensor, norm: str, direction: Direction, decay: float) -> Tensor:
    """Unit step (or the raw gradient) that each row takes; updates the momentum."""
    if rows.mask is not None:
        gradient = gradient * rows.mask
    if decay:
        ones = [1] * (gradient.ndim - 1)
        size = gradient.abs().flatten(1).mean(1).view(-1, *ones)
        normed = gradient / size.clamp_min(torch.finfo(gradient.dtype).tiny)
        rows.velocity = gradient = decay * rows.velocity + normed
    if direction == "sign":
        return steepest_ascent(gradient, norm)
    return steepest_ascent(gradient, "l2") if direction == "gradient" else gradient


def _check(
    x: Tensor, y: Tensor, eps: float, norm: str, norms: tuple[str, ...], mask: Tensor | None
) -> None:
    check_images(x)
    check_labels(y, len(x))
    check_norm(norm, norms)
    check_eps(eps, norm, x.shape)
    if mask is not None:
        check_mask(mask, x)


def _check_first(estimate: Estimate, rows: _Rows, model: Model, loss: Loss) -> None:
    """Look at the first estimate's values once: labels, NaN, structural zero gradients."""
    classes = estimate.logits.shape[-1]
    check_labels(rows.y, len(rows.y), classes)
    if bool(estimate.logits.isnan().any()):
        raise ModelError("the model gives NaN logits for valid images; check its weights")
    if classes < 2:
        raise ModelError(f"the model gives {classes} class; expected at least 2")
    require_gradient(model, rows.point, rows.keys, estimate.gradient)


def ascend(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | None,
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
) -> Tensor:
    """Take `steps` ascent steps from `x` and return each sample's best evaluated point.

    The `steps + 1` points (start and every step) are all evaluated. Restarts are further rows of
    the same batch. With early stopping, a sample's rows leave when one of them is adversarial on
    all of its draws; what is left is compacted.

    Raises:
        ConfigError, RangeError, ShapeError, DtypeError: On bad arguments.
        GradientError: If no gradient reaches the input.
        ModelError: If the logits are NaN or not (B, K) with K ≥ 2.
    """
    eps = EPS.get(norm, 0.0) if eps is None else eps
    _check(x, y, eps, norm, norms, mask)
    if steps < 1 or restarts < 1:
        raise RangeError(f"steps is {steps}, restarts is {restarts}; expected at least 1")
    if restarts > 1 and not random_start:
        raise ConfigError(f"restarts is {restarts} without random_start: all would be the same")
    if direction not in ("sign", "gradient", "raw"):
        raise ConfigError(f"direction is {direction!r}; expected 'sign', 'gradient' or 'raw'")
    if len(x) == 0:
        return x.clone()
    gradient = gradient or backprop
    objective = get_loss(loss, targeted)
    early = stops_early(stop, model)

    rows = _start(x, y, norm, eps, mask, seed, random_start, restarts)
    best = _Best(
        rows.x.clone(),
        torch.full((len(rows.x),), -1.0, device=x.device),
        torch.full((len(rows.x),), -torch.inf, dtype=x.dtype, device=x.device),
    )
    number = torch.arange(len(rows.x), device=x.device)  # row of `best` for each row left
    finished = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for step in range(steps + 1):
        last = step == steps
        step_keys = random.fold(rows.keys, "step", step)
        estimate = gradient(model, rows.point, rows.y, objective, step_keys, forward_only=last)
        if step == 0:
            _check_first(estimate, rows, model, objective)
        share = success_share(estimate.logits, rows.y, targeted)
        best.update(number, rows.point, share, estimate.loss.to(x.dtype))
        if trace is not None:
            trace(step, rows.point, estimate.logits, estimate.loss, rows.sample)
        if last:
            break
        unit = _step(rows, estimate.gradient, norm, direction, decay)
        rows.point = _confine(rows, rows.point + step_size * unit, norm, eps)
        if early:
            finished[rows.sample[share == 1]] = True
            left = (~finished[rows.sample]).nonzero()[:, 0]
            if len(left) == 0:
                break
            if len(left) < len(rows.sample):
                rows.keep(left)
                number = number[left]
    return _pick(best, restarts)


def _start(
    x: Tensor,
    y: Tensor,
    norm: str,
    eps: float,
    mask: Tensor | None,
    seed: int | Tensor,
    random_start: bool,
    restarts: int,
) -> _Rows:
    keys = sample_keys(seed, x)
    numbers = torch.arange(restarts, device=x.device)
    wide = x.repeat_interleave(restarts, 0)
    low, high = _bounds(wide, norm, eps)
    rows = _Rows(
        torch.arange(len(x), device=x.device).repeat_interleave(restarts),
        wide,
        wide,
        y.repeat_interleave(restarts, 0),
        random.fold(keys, "restart", 0, numbers).flatten(),
        torch.zeros_like(wide),
        low,
        high,
        None
        if mask is None
        else mask.expand(len(x), *mask.shape[1:]).repeat_interleave(restarts, 0),
    )
    if random_start:
        delta = random_in_ball(random.fold(rows.keys, "start"), wide, norm, eps)
        rows.point = _confine(rows, wide + delta, norm, eps)
    return rows


def _pick(best: _Best, restarts: int) -> Tensor:
    """The best restart of each sample."""
    if restarts == 1:
        return best.point
    share, loss = best.share.view(-1, restarts), best.loss.view(-1, restarts)
    top = torch.where(share == share.amax(1, keepdim=True), loss, -torch.inf).argmax(1)
    start = torch.arange(len(top), device=top.device) * restarts
    return best.point[start + top]
