"""What attacks with a state of their own share: checks, evaluation, each sample's best point."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from feint.attacks._ascent import (
    Stop,
    Trace,
    _bounds,
    _objective,
    _radius,
    sample_keys,
    stops_early,
)
from feint.attacks._minimal import column, flag
from feint.core import random
from feint.core.checks import check_eps, check_images, check_labels, check_mask
from feint.core.errors import DeviceError, GradientError, ModelError
from feint.core.gradients import (
    Estimate,
    GradientEstimator,
    Model,
    backprop,
    call,
    require_gradient,
    takes_keys,
)
from feint.core.losses import Loss, success_share
from feint.core.norms import NORMS, check_norm, norm_of, project

__all__ = ["CHUNK", "Best", "Measure"]

CHUNK = 4096
"""At most so many images per forward pass of an attack that asks for scores or decisions."""

Measure = Callable[[Tensor, Tensor], Tensor]
"""`(points, samples) -> (N,)`: a worth that is no function of the logits, such as a nearness."""


class Best:
    """Evaluates points of a batch and keeps each sample's best one.

    The best point has most draws adversarial, then the highest loss (or `measure`); of equals it is
    the latest. `rows` are indices of samples, and a sample occurs once in them.

    Args:
        eps: Budget in `norm`; 0 where the attack has none.
        measure: Ranks points instead of the loss.

    Raises:
        ConfigError, RangeError, ShapeError, DtypeError, DeviceError: On bad arguments.
    """

    def __init__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        norm: str,
        norms: tuple[str, ...],
        targeted: bool,
        loss: str | Loss,
        mask: Tensor | None,
        seed: int | Tensor,
        stop: Stop | None,
        trace: Trace | None,
        eps: float = 0.0,
        gradient: GradientEstimator | None = None,
        measure: Measure | None = None,
    ) -> None:
        check_images(x)
        if isinstance(y, Tensor) and y.device != x.device:
            raise DeviceError(f"y is on {y.device}, x on {x.device}; move one of them")
        check_labels(y, len(x))
        check_norm(norm, norms)
        if norm in NORMS:
            check_eps(eps, norm, x.shape)
        if mask is not None:
            check_mask(mask, x)
        self.model, self.x, self.y = model, x.detach(), y
        self.mask = None if mask is None else mask.expand(len(x), *mask.shape[1:])
        self.norm, self.targeted, self.trace, self.measure = norm, targeted, trace, measure
        self.loss = _objective(loss, targeted, y)
        self.early = stops_early(stop, model)
        self.estimator = gradient or backprop
        self.keyed = self.estimator is not backprop or takes_keys(model)
        self.keys = sample_keys(seed, x)
        self.low, self.high = _bounds(self.x, norm, eps)
        self.radius = _radius(x, norm, eps) if norm in ("l2", "l1") and len(x) else 0.0
        self.best = self.x.clone()
        self.share = torch.full((len(x),), -1.0, device=x.device)
        self.worth = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)
        self.broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self._checked = False

    @property
    def everyone(self) -> Tensor:
        """All rows."""
        return torch.arange(len(self.x), device=self.x.device)

    def keys_for(self, rows: Tensor, step: int) -> Tensor:
        """The rows' keys at this step."""
        return random.fold(self.keys[rows], "step", step) if self.keyed else self.keys[rows]

    def masked(self, point: Tensor, rows: Tensor) -> Tensor:
        """`point` where the mask allows a change, the clean image elsewhere."""
        return point if self.mask is None else torch.where(self.mask[rows], point, self.x[rows])

    def confine(self, point: Tensor, rows: Tensor) -> Tensor:
        """An allowed point: mask, ball, box, in this order; the last two never undo the first."""
        x, point = self.x[rows], self.masked(point, rows)
        if self.norm in ("l2", "l1"):
            delta = point - x
            if self.norm == "l1":
                delta = project(delta, "l1", self.radius)
            size = norm_of(delta.double(), self.norm)
            shrink = (self.radius / size.clamp_min(1e-300)).clamp_max(1)
            point = x + delta * column(shrink, delta)
        return torch.clamp(point, self.low[rows], self.high[rows])

    # --- evaluation -------------------------------------------------------------------------------

    def ask(
        self,
        point: Tensor,
        rows: Tensor,
        step: int,
        forward_only: bool = False,
        estimate: Callable[..., Estimate] | None = None,
    ) -> Tensor:
        """Evaluate a point per row, and give the gradient of what may change.

        Args:
            point: (R, C, H, W).
            rows: (R,).
            step: Number of the step, for the trace and the keys.
            forward_only: Skip the gradient.
            estimate: `(point, rows, keys, forward_only) -> Estimate`, by default of the loss by
                the attack's estimator.
        """
        keys = self.keys_for(rows, step)
        if estimate is None:
            found = self.estimator(
                self.model, point, self.y[rows], self.loss, keys, forward_only=forward_only
            )
        else:
            found = estimate(point, rows, keys, forward_only)
        if not self._checked:
            self._check_logits(found.logits)
            if not forward_only and not getattr(self.estimator, "scores_only", False):
                require_gradient(self.model, point, keys, found.gradient)
        bad = found.logits.flatten(1).isnan().any(1)
        share = success_share(found.logits, self.y[rows], self.targeted)
        self.record(point, rows, share, found.loss)
        if self.trace is not None:
            self.trace(step, point, found.logits, found.loss, rows)
        # One NaN or infinite value spoils the sum. Such rows stay where they are, and are told.
        bad = bad | ~found.gradient.flatten(1).sum(1).isfinite()
        self.broken[rows] = self.broken[rows] | bad
        gradient = found.gradient.masked_fill(flag(bad, point), 0)
        return gradient if self.mask is None else gradient * self.mask[rows]

    def look(self, rows: Tensor, step: int = 0) -> None:
        """Evaluate the clean images, without a gradient."""
        self.try_many(lambda flat: self.x[rows[flat]], 1, rows, step)

    @torch.no_grad()
    def try_many(
        self,
        build: Callable[[Tensor], Tensor],
        count: int,
        rows: Tensor,
        step: int,
        chunk: int = CHUNK,
    ) -> tuple[Tensor, Tensor]:
        """Evaluate `count` candidates per row by their scores; the draws are the row's own.

        Args:
            build: Images of the candidates of the given numbers, r·count + i for the i-th of
                `rows[r]`; called again for the winners, so that not all need be in memory.
            count: Candidates per row.
            rows: (R,).
            step: Number of the step, for the trace and the keys.
            chunk: Images per forward pass.

        Returns:
            worth: (R, count) float64: the loss, or `measure`.
            hit: (R, count) bool: whether it is adversarial.
        """
        flat = torch.arange(len(rows) * count, device=rows.device)
        keys = self.keys_for(rows, step)
        worths, hits = [], []
        for part in flat.split(max(1, chunk)):
            points, owner = build(part), rows[part // count]
            logits = call(self.model, points, keys[part // count])
            loss = self.loss(logits, self.y[owner])
            if not self._checked:
                self._check_logits(logits)
            hits.append(success_share(logits, self.y[owner], self.targeted) == 1)
            if self.measure is not None:
                loss = self.measure(points, owner)
            worths.append(loss.double().nan_to_num(nan=-torch.inf))
            if self.trace is not None:
                self.trace(step, points, logits[:, None], loss, owner)
        worth, hit = torch.cat(worths).view(-1, count), torch.cat(hits).view(-1, count)
        top = torch.where(hit | ~hit.any(1, keepdim=True), worth, -torch.inf)
        # Of equal ones the last. Where all are −∞ the choice does not matter, but must be valid.
        pick = count - 1 - top.flip(1).argmax(1)
        won = build(torch.arange(len(rows), device=rows.device) * count + pick)
        column_ = pick[:, None]
        self.record(won, rows, hit.gather(1, column_)[:, 0].float(), worth.gather(1, column_)[:, 0])
        return worth, hit

    def _check_logits(self, logits: Tensor) -> None:
        if bool(logits.isnan().any()):
            raise ModelError("the model gives NaN logits for valid images; check its weights")
        self._checked = True

    def record(self, point: Tensor, rows: Tensor, share: Tensor, worth: Tensor) -> None:
        """Take each row's point as its best one where it is."""
        worth, old, former = worth.double(), self.worth[rows], self.share[rows]
        better = (share > former) | ((share == former) & (worth >= old))
        self.share[rows] = torch.where(better, share, former)
        self.worth[rows] = torch.where(better, worth, old)
        self.best[rows] = torch.where(flag(better, point), point, self.best[rows])

    # --- end --------------------------------------------------------------------------------------

    def standing(self, rows: Tensor) -> Tensor:
        """Positions in `rows` of the samples that are not adversarial on all draws yet."""
        return (self.share[rows] < 1).nonzero()[:, 0]

    def result(self) -> Tensor:
        """The best point of each sample.

        Raises:
            GradientError: If a sample that never fell met a gradient that was no number.
        """
        broken = self.broken & (self.share <= 0)
        if bool(broken.any()):
            raise GradientError(
                f"NaN or infinite gradients or logits for {int(broken.sum())} of {len(broken)} "
                "samples on the way; look for sqrt, log or a division at zero in the model"
            )
        return self.best
