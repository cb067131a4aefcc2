"""What the minimal-norm attacks share: checks, evaluation, and the nearest adversarial point."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from feint.attacks._ascent import Stop, Trace, sample_keys, stops_early
from feint.core import random
from feint.core.checks import check_images, check_labels, check_mask
from feint.core.errors import ConfigError, DeviceError, GradientError, ModelError, RangeError
from feint.core.gradients import (
    GradientEstimator,
    Model,
    backprop,
    is_stochastic,
    require_gradient,
    takes_keys,
)
from feint.core.losses import Loss, margin, success_share
from feint.core.norms import check_norm, norm_of

__all__ = [
    "Answer",
    "Constants",
    "Rows",
    "Search",
    "check_count",
    "check_number",
    "column",
    "dot",
    "flag",
    "goal_log_odds",
    "goal_margin",
]

_LOG = logging.getLogger(__name__)
CONFIRMATIONS = 3
"""Estimates with fresh draws that a point found on a random model must fool, all of them."""
LENGTHS, GROWTH = 8, 1.3
"""Lengths at which it is tried, and the ratio of each to the one before."""


def column(value: Tensor, like: Tensor) -> Tensor:
    """One value per sample, (B,), shaped to broadcast over the samples of `like`."""
    return value.view(-1, *[1] * (like.ndim - 1)).to(like.dtype)


def flag(value: Tensor, like: Tensor) -> Tensor:
    """One bool per sample, (B,), shaped to broadcast over the samples of `like`."""
    return value.view(-1, *[1] * (like.ndim - 1))


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each pair of samples, (B,)."""
    return (a * b).flatten(1).sum(1)


def check_count(name: str, value: object, least: int = 1) -> None:
    """Require a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise RangeError(f"{name} is {value}; expected a whole number ≥ {least}")


def check_number(name: str, value: float, low: float = 0.0, high: float = float("inf")) -> None:
    """Require a finite number in [low, high]."""
    if not low <= value <= high or value == float("inf"):
        top = "" if high == float("inf") else f" and at most {high:g}"
        raise RangeError(f"{name} is {value}; expected a finite number ≥ {low:g}{top}")


def goal_margin(targeted: bool) -> Loss:
    """How far the logits are on the attacker's side: positive exactly when adversarial."""
    return (lambda logits, y: -margin(logits, y)) if targeted else margin


def goal_log_odds(targeted: bool) -> Loss:
    """Log odds of the attacker's classes against the others.

    Cross-entropy's gradient is this one's times a probability, which underflows on confident
    models; this one never vanishes.
    """

    def log_odds(logits: Tensor, y: Tensor) -> Tensor:
        while y.ndim < logits.ndim - 1:
            y = y[..., None]
        label = y.expand(logits.shape[:-1])[..., None]
        own = logits.gather(-1, label)[..., 0]
        rest = logits.scatter(-1, label, -torch.inf).logsumexp(-1)
        return own - rest if targeted else rest - own

    return log_odds


@dataclass
class Rows:
    """State of the samples still in a loop, one row each; compacted together."""

    def keep(self, left: Tensor) -> None:
        """Compact every field to the given rows."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                setattr(self, f.name, value[left])


@dataclass(frozen=True)
class Answer:
    """What one evaluation told, one row per point."""

    gradient: Tensor
    """Gradient of `loss`, zero where it was not a number."""
    loss: Tensor
    """(R,): the loss to be raised, mean over the draws."""
    margin: Tensor
    """(R,): the smallest margin of the draws; positive if all are adversarial."""
    hit: Tensor
    """(R,) bool: adversarial on all draws, and by the confidence asked for."""

    def take(self, left: Tensor) -> Answer:
        """The given rows."""
        return Answer(*(getattr(self, f.name)[left] for f in fields(self)))


class Search:
    """Evaluates points of a batch and keeps each sample's nearest adversarial one.

    Rows are indices of samples; a sample must not occur twice in one evaluation.

    Args:
        measure: Size of a perturbation, (R, …) to (R,); by default the norm in float64.
        confidence: Margin that a point must reach to count as adversarial.

    Raises:
        RangeError, ShapeError, DtypeError, DeviceError, ConfigError: On bad arguments.
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
        gradient: GradientEstimator | None,
        mask: Tensor | None,
        seed: int | Tensor,
        stop: Stop | None,
        trace: Trace | None,
        measure: Callable[[Tensor], Tensor] | None = None,
        confidence: float = 0.0,
    ) -> None:
        check_images(x)
        if isinstance(y, Tensor) and y.device != x.device:
            raise DeviceError(f"y is on {y.device}, x on {x.device}; move one of them")
        check_labels(y, len(x))
        check_norm(norm, norms)
        if mask is not None:
            check_mask(mask, x)
            mask = mask.expand(len(x), *mask.shape[1:])
        self.model, self.x, self.y, self.mask = model, x.detach(), y, mask
        self.norm, self.targeted, self.confidence = norm, targeted, confidence
        self.early = stops_early(stop, model)
        self.estimator = gradient or backprop
        self.keyed = self.estimator is not backprop or takes_keys(model)
        self.keys = sample_keys(seed, x)
        self.trace = trace
        self.measure = measure or (lambda delta: norm_of(delta, norm))
        self.best = self.x.clone()
        self.size = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
        """Size of each sample's best perturbation, infinite where none was found."""
        self.margin = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
        """Margin of each sample's best point."""
        self.start = torch.full_like(self.margin, -torch.inf)
        """Margin of each clean image: the first evaluation is of them."""
        self.broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self._asked = 0

    @property
    def everyone(self) -> Tensor:
        """All rows."""
        return torch.arange(len(self.x), device=self.x.device)

    def keys_for(self, rows: Tensor, phase: str, step: int) -> Tensor:
        """The rows' keys at this step; a phase has its own, so its steps count from zero."""
        keys = self.keys[rows]
        return random.fold(keys, phase, step) if self.keyed else keys

    def confine(self, point: Tensor, rows: Tensor, x: Tensor) -> Tensor:
        """`point` in the box, and `x` (the rows' clean images) where the mask forbids a change."""
        point = point.clamp(0, 1)
        return point if self.mask is None else torch.where(self.mask[rows], point, x)

    def ask(
        self,
        point: Tensor,
        rows: Tensor,
        loss: Loss,
        step: int,
        phase: str = "step",
        forward_only: bool = False,
    ) -> Answer:
        """Evaluate a point per row, and remember those that are the nearest adversarial ones."""
        keys = self.keys_for(rows, phase, step)
        estimate = self.estimator(
            self.model, point, self.y[rows], self.checked(loss), keys, forward_only=forward_only
        )
        if self._asked == 0:
            self.check_gradient(estimate.logits, estimate.gradient, point, keys)
        return self.note(point, rows, estimate.logits, estimate.loss, estimate.gradient)

    def checked(self, loss: Loss) -> Loss:
        """`loss`, which at the first evaluation looks at the logits, and at the loss itself."""
        if self._asked:
            return loss

        def checked(logits: Tensor, y: Tensor) -> Tensor:
            self.check_logits(logits.detach())
            value = loss(logits, y)
            if value.shape != logits.shape[:-1]:
                raise ConfigError(
                    f"the loss gave {tuple(value.shape)} for logits {tuple(logits.shape)}; "
                    "expected one value per sample; do not average over the batch"
                )
            return value

        return checked

    def check_gradient(self, logits: Tensor, gradient: Tensor, point: Tensor, keys: Tensor) -> None:
        """Look at the first gradient's values once: a structural zero is an error.

        Losses that end at success have none where it is there already.
        """
        if getattr(self.estimator, "scores_only", False):
            return
        needed = success_share(logits, self.y, self.targeted) < 1
        require_gradient(self.model, point[needed], keys[needed], gradient[needed])

    def check_logits(self, logits: Tensor) -> None:
        """Look at the first logits' values once: two classes, labels among them, no NaN.

        Probabilities are taken as they are, with a warning.

        Raises:
            ModelError, RangeError: If not.
        """
        if self._asked:
            return
        if logits.shape[-1] < 2:
            raise ModelError(f"the model gives {logits.shape[-1]} class; expected at least 2")
        check_labels(self.y, len(self.y), logits.shape[-1])
        if bool(logits.isnan().any()):
            raise ModelError("the model gives NaN logits for valid images; check its weights")
        whole = (logits >= 0) & ((logits.sum(-1, keepdim=True) - 1).abs() < 1e-3)
        if logits.numel() and bool(whole.all()):
            _LOG.warning(
                "each image's outputs add up to 1, as those of a softmax do, which hides "
                "gradients: give the logits before it"
            )

    def note(
        self, point: Tensor, rows: Tensor, logits: Tensor, loss: Tensor, gradient: Tensor
    ) -> Answer:
        """Record an evaluation made by `ask` or by the attack itself; logits are (R, D, K)."""
        margins = goal_margin(self.targeted)(logits, self.y[rows]).amin(1).to(self.margin.dtype)
        if self.trace is not None:
            self.trace(self._asked, point, logits, loss, rows)
        if self._asked == 0:
            self.start[rows] = margins
        self._asked += 1
        hit = success_share(logits, self.y[rows], self.targeted) == 1
        if self.confidence:
            hit = hit & (margins >= self.confidence)
        size = self.measure(point.double() - self.x[rows].double())
        before = self.size[rows]
        better = hit & (size < before)
        if self._asked > 1:  # `x` itself has one chance, however often a random model sees it
            better = better & (size > 0)
        self.size[rows] = torch.where(better, size, before)
        self.margin[rows] = torch.where(better, margins, self.margin[rows])
        self.best[rows] = torch.where(flag(better, point), point, self.best[rows])
        self.mark_broken(rows, logits)
        gradient = self.clean(gradient, rows)
        return Answer(gradient, loss.to(point.dtype).nan_to_num(), margins, hit)

    def mark_broken(self, rows: Tensor, values: Tensor) -> Tensor:
        """Remember rows whose values hold a NaN or an infinity, which spoils their sum."""
        bad = ~values.flatten(1).sum(1).isfinite()
        self.broken[rows] = self.broken[rows] | bad
        return bad

    def clean(self, gradient: Tensor, rows: Tensor) -> Tensor:
        """The gradient of what may change; rows where it is not a number stay where they are."""
        bad = self.mark_broken(rows, gradient)
        gradient = gradient.masked_fill(flag(bad, gradient), 0)
        return gradient if self.mask is None else gradient * self.mask[rows]

    def finish(self, refine: int) -> Tensor:
        """Polish what was found and return `result()`.

        A deterministic model: `refine` forward passes move the points back to the boundary. A
        random one: the nearest of many points that fooled all draws is partly a lucky one, so it
        is moved away from the clean image until it fools fresh draws as well, or to where it fools
        the most of them.
        """
        rows = (self.size.isfinite() & (self.size > 0)).nonzero()[:, 0]
        if len(rows):
            if is_stochastic(self.model):
                self._confirm(rows)
            else:
                self._move_back(rows, refine)
        return self.result()

    def _move_back(self, rows: Tensor, times: int) -> None:
        """Interpolate the zero of the margin on the line to the clean image, `times` times."""
        x, far, goal = self.x[rows], self.best[rows], self.confidence
        under, over = self.start[rows] - goal, self.margin[rows] - goal
        low, high = torch.zeros_like(over), torch.ones_like(over)
        for step in range(times):
            root = low + (high - low) * under / (under - over).clamp_max(-1e-12)
            t = root + 0.1 * (high - root)
            point = self.confine(torch.lerp(x, far, column(t, x)), rows, x)
            answer = self.ask(
                point, rows, goal_margin(self.targeted), step, "move back", forward_only=True
            )
            reached = answer.margin - goal
            low, high = torch.where(answer.hit, low, t), torch.where(answer.hit, t, high)
            under = torch.where(answer.hit, under, reached)
            over = torch.where(answer.hit, reached, over)

    def _confirm(self, rows: Tensor) -> None:
        """Replace each point by the first of ever longer ones that fools fresh draws the most."""
        x, far = self.x[rows], self.best[rows]
        most = torch.zeros_like(rows)
        for step in range(LENGTHS):
            point = self.confine(torch.lerp(x, far, GROWTH**step), rows, x)
            fooled = torch.zeros_like(rows)
            for again in range(CONFIRMATIONS):
                number = step * CONFIRMATIONS + again
                goal = goal_margin(self.targeted)
                answer = self.ask(point, rows, goal, number, "confirm", forward_only=True)
                fooled = fooled + answer.hit
            better = flag(fooled > most, point)
            self.best[rows] = torch.where(better, point, self.best[rows])
            most = torch.maximum(most, fooled)

    def unsolved(self, rows: Tensor) -> Tensor:
        """Positions in `rows` of the samples whose clean image is not adversarial already."""
        return (self.size[rows] > 0).nonzero()[:, 0]

    def result(self) -> Tensor:
        """The nearest adversarial point of each sample, or its clean image.

        Raises:
            GradientError: If a sample without one met a gradient that was no number.
        """
        broken = self.broken & ~self.size.isfinite()
        if bool(broken.any()):
            raise GradientError(
                f"NaN or infinite gradients or logits for {int(broken.sum())} of {len(broken)} "
                "samples on the way; look for sqrt, log or a division at zero in the model"
            )
        return self.best


@dataclass
class Constants(Rows):
    """Search for the weight c of the attack's loss: tenfold until success, then bisection."""

    c: Tensor
    low: Tensor
    high: Tensor
    round: Tensor

    @classmethod
    def start(cls, count: int, initial: float, like: Tensor) -> Constants:
        """`count` rows that begin with `initial`."""
        c = like.new_full((count,), initial)
        rounds = torch.zeros(count, dtype=torch.int64, device=like.device)
        return cls(c, torch.zeros_like(c), torch.full_like(c, torch.inf), rounds)

    def advance(self, ended: Tensor, fell: Tensor) -> None:
        """Where a round has `ended`, choose the next weight by whether the sample `fell` in it."""
        self.high = torch.where(ended & fell, torch.minimum(self.high, self.c), self.high)
        self.low = torch.where(ended & ~fell, torch.maximum(self.low, self.c), self.low)
        middle = (self.low + self.high) / 2
        following = torch.where(self.high.isfinite(), middle, self.c * 10)
        self.c = torch.where(ended, following.clamp_max(1e10), self.c)
        self.round = self.round + ended
