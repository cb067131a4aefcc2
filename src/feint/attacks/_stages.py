"""Several attacks in turn: each sample keeps its worst point, and leaves once it has fallen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from feint.attacks._ascent import Stop, Trace, _check, sample_keys, stops_early
from feint.attacks._minimal import check_count, goal_margin
from feint.core import random
from feint.core.gradients import Model, backprop, eot, is_stochastic
from feint.core.losses import success_share
from feint.core.norms import distance

__all__ = ["Stage", "run_stages"]

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

    Raises:
        ConfigError, RangeError, ShapeError, DtypeError, DeviceError: On bad arguments.
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
    for number, stage in enumerate(stages):
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
        if early and number + 1 < len(stages):
            rows = rows[worst.share[rows] < 1]
            if len(rows) == 0:
                break
    return worst.point[:-1]
