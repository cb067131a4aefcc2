"""Several attacks in turn: each sample keeps its worst point, and leaves once it has fallen."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from feint.attacks._ascent import Stop, Trace, _check, sample_keys, stops_early
from feint.attacks._minimal import check_count, goal_margin
from feint.core import random
from feint.core.errors import ModelError
from feint.core.gradients import Model, backprop, call, eot, is_stochastic
from feint.core.losses import success_share
from feint.core.norms import distance

__all__ = ["ASKED_TWICE", "Stage", "run_stages"]

_LOG = logging.getLogger(__name__)
ASKED_TWICE = 8
"""Images on which a model that declares no randomness must give the same logits twice."""
_SAME, _SUM_TO_ONE = 1e-4, 1e-3
_MASKED = 0.002
"""More newly fallen samples than this share, from scores alone, speak of masked gradients."""
_DRAWN_AT_ONCE = 1024
"""Images that go through a stochastic model at once when candidates are compared."""


class _Run(Protocol):
    """An attack with everything set but the data and what the stages decide."""

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        mask: Tensor | None,
        seed: Tensor,
        stop: Stop,
        trace: Trace,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Stage:
    """One attack of several."""

    name: str
    run: _Run
    within: bool = True
    """Whether every point that it evaluates keeps to the budget."""
    traced: bool = True
    """Whether it calls its trace at every evaluated point."""
    blind: bool = False
    """Whether it works without gradients."""


class _Worst:
    """Each sample's worst point so far: most draws adversarial, then the largest margin.

    Of equals it is the latest. Rows of points may hold a sample several times; nothing is read
    back from the device.
    """

    def __init__(
        self, x: Tensor, y: Tensor, eps: float, norm: str, targeted: bool, trace: Trace | None
    ) -> None:
        self.x, self.y, self.eps, self.norm, self.targeted = x, y, eps, norm, targeted
        self.trace = trace
        self.count = 0
        # One place more than there are samples: what is not better is written there.
        self.point = torch.cat([x, x[:1]])
        self.share = x.new_full((len(x) + 1,), -1.0)
        self.margin = x.new_full((len(x) + 1,), -torch.inf)

    def tell(self, points: Tensor, logits: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Pass an evaluation on to the user's trace: shares and margins of the rows."""
        wide = logits if logits.ndim == 3 else logits[:, None]
        margin = goal_margin(self.targeted)(wide, self.y[samples]).mean(1)
        share = success_share(wide, self.y[samples], self.targeted).to(self.x.dtype)
        if self.trace is not None:
            self.trace(self.count, points, wide, margin, samples)
        self.count += 1
        return share, margin.to(self.x.dtype).nan_to_num(nan=-torch.inf)

    def allow(self, points: Tensor, samples: Tensor, within: bool, share: Tensor) -> Tensor:
        """`share`, or −2 for a point beyond the budget."""
        if within:
            return share
        return share.masked_fill(distance(points, self.x[samples], self.norm) > self.eps, -2)

    def take(self, points: Tensor, share: Tensor, margin: Tensor, samples: Tensor) -> None:
        """Keep those points that are worse for their sample than the one it has."""
        row = torch.arange(len(samples), device=samples.device)
        top = torch.full_like(self.share, -2.0).scatter_reduce(0, samples, share, "amax")
        equal = share == top[samples]
        margin = margin.masked_fill(~equal, -torch.inf)
        most = torch.full_like(self.margin, -torch.inf).scatter_reduce(0, samples, margin, "amax")
        equal = equal & (margin == most[samples])
        latest = torch.full_like(self.share, -1, dtype=torch.int64)
        latest = latest.scatter_reduce(0, samples, torch.where(equal, row, -1), "amax")
        before, margin_before = self.share[samples], self.margin[samples]
        better = (share > before) | ((share == before) & (margin >= margin_before))
        place = torch.where(better & (latest[samples] == row), samples, len(self.x))
        self.share[place], self.margin[place], self.point[place] = share, margin, points

    def listen(self, rows: Tensor, within: bool) -> Trace:
        """The trace of a stage that works on these samples."""

        def trace(step: int, points: Tensor, logits: Tensor, loss: Tensor, active: Tensor) -> None:
            samples = rows[active]
            share, margin = self.tell(points, logits, samples)
            self.take(points, self.allow(points, samples, within, share), margin, samples)

        return trace

    def relay(self, rows: Tensor) -> Trace:
        """A trace that only passes on."""

        def trace(step: int, points: Tensor, logits: Tensor, loss: Tensor, active: Tensor) -> None:
            self.tell(points, logits, rows[active])

        return trace


def _check_model(model: Model, x: Tensor) -> None:
    """Refuse randomness that is not declared, and tell of probabilities in place of logits.

    Raises:
        ModelError: If the same images get other logits when they are asked again.
    """
    few = x[:ASKED_TWICE]
    with torch.no_grad():
        first, again = call(model, few), call(model, few)
    most = float((first - again).abs().amax() / first.abs().amax().clamp_min(1e-30))
    if most > _SAME:
        raise ModelError(
            f"the model declares no randomness, but the same images get logits that differ by "
            f"{most:.2g} of the largest; set its attribute stochastic = True, so that draws are "
            "averaged and successes are counted on held-out ones"
        )
    inside = (first >= 0) & (first <= 1)
    off = (first.sum(1) - 1).abs() > _SUM_TO_ONE
    if bool(inside.all()) and not bool(off.any()):
        _LOG.warning(
            "the model gives probabilities; a softmax hides gradients: give the logits before it"
        )


def run_stages(
    model: Model,
    x: Tensor,
    y: Tensor,
    stages: Sequence[Stage],
    *,
    eps: float,
    norm: str,
    norms: tuple[str, ...],
    targeted: bool,
    mask: Tensor | None,
    seed: int | Tensor,
    stop: Stop | None,
    trace: Trace | None,
    held_out: int,
) -> Tensor:
    """Run the stages in order and return each sample's worst point within the budget.

    A deterministic model's points are compared as they were evaluated, all of them. Of a stochastic
    model an evaluation is luck in part; there each stage's result is asked again on `held_out`
    draws that no attack has seen, and the results' shares on these are compared.

    AutoAttack's flags: a model that is random and does not say so is refused; probabilities in
    place of logits, and samples that fall to scores alone after the gradients failed, are logged as
    warnings.

    Raises:
        ConfigError, RangeError, ShapeError, DtypeError, DeviceError: On bad arguments.
        ModelError: If the model is random and does not declare it.
    """
    _check(x, y, eps, norm, norms, mask)
    check_count("held_out", held_out)
    early = stops_early(stop, model)
    keys = sample_keys(seed, x)
    if len(x) == 0:
        return x.clone()
    x = x.detach()
    worst = _Worst(x, y, eps, norm, targeted, trace)
    rows = torch.arange(len(x), device=x.device)
    random_model = is_stochastic(model)
    if not random_model:
        _check_model(model, x)
    for number, stage in enumerate(stages):
        fallen = worst.share[:-1] == 1
        own = random.fold(keys[rows], stage.name, number)
        listen = worst.relay(rows) if random_model else worst.listen(rows, stage.within)
        found = stage.run(
            model,
            x[rows],
            y[rows],
            mask=mask[rows] if mask is not None and len(mask) > 1 else mask,
            seed=own,
            stop="success" if early else "never",
            trace=listen,
        )
        if random_model or not stage.traced:
            judge = eot(held_out, chunk=_DRAWN_AT_ONCE) if random_model else backprop
            fresh = random.fold(own, "held out")
            loss = goal_margin(targeted)
            answer = judge(model, found, y[rows], loss, fresh, forward_only=True)
            share, margin = worst.tell(found, answer.logits, rows)
            # What an attack returns need not be within the budget, whoever wrote it.
            worst.take(found, worst.allow(found, rows, False, share), margin, rows)
        informed = any(not earlier.blind for earlier in stages[:number])
        if stage.blind and informed and not random_model:
            late = int(((worst.share[:-1] == 1) & ~fallen).sum())
            if late > _MASKED * len(x):
                _LOG.warning(
                    "%s, which sees no gradients, fells %d of %d samples that those before it left "
                    "standing; the model's gradients may be masked", stage.name, late, len(x)
                )  # fmt: skip
        if early and number + 1 < len(stages):
            rows = rows[worst.share[rows] < 1]
            if len(rows) == 0:
                break
    return worst.point[:-1]
