"""What is noted while an attack runs: first successes, the loss, and the passes it takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from feint.core.losses import adversarial
from feint.core.norms import distance

__all__ = ["Passes", "Recorder", "counted"]


@dataclass
class Recorder:
    """A trace that remembers, per sample, the first success and how the loss went.

    Nothing is read back from the device before `summary`. Under restarts a sample may have several
    rows in one step: its loss is the highest of them, and it is hit if one of them is.

    Args:
        y: (B,) labels or targets of the batch.
        targeted: Whether they are targets.
        passes: Counts what goes through the attacked model. What passed between two calls is shared
            out evenly among the rows of the second: all rows of a step cost the same.
        within: Clean images, norm and budget, for an attack that evaluates points beyond the
            budget: effort then goes on to the first success within it.
    """

    y: Tensor
    targeted: bool
    passes: Passes | None = None
    within: tuple[Tensor, str, float] | None = None
    steps: list[int] = field(default_factory=list)
    hits: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    active: list[Tensor] = field(default_factory=list)
    _effort: Tensor | None = None
    """(3, B): the last round, forward and backward passes up to the first success or the end."""
    _fallen: Tensor | None = None
    _before: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if self.passes is not None:
            self._before = (self.passes.forwards, self.passes.backwards)

    def __call__(
        self, step: int, x_adv: Tensor, logits: Tensor, loss: Tensor, active: Tensor
    ) -> None:
        """The trace callback."""
        wide = logits.detach() if logits.ndim == 3 else logits.detach()[:, None]
        self.steps.append(step)
        self.hits.append(adversarial(wide, self.y[active], self.targeted).any(1))
        self.losses.append(loss.detach().double())
        self.active.append(active)
        hit = self.hits[-1]
        if self.within is not None:
            x, norm, eps = self.within
            hit = hit & (distance(x_adv, x[active], norm) <= eps)
        self._count(step, active, hit)

    def _count(self, step: int, active: Tensor, hit: Tensor) -> None:
        """Add what this call cost to the samples that had not fallen before it."""
        if self._effort is None or self._fallen is None:
            self._effort = torch.zeros(3, len(self.y), dtype=torch.float64, device=active.device)
            self._fallen = torch.zeros(len(self.y), dtype=torch.bool, device=active.device)
        standing = (~self._fallen[active]).double()
        if self.passes is not None and len(active):
            now = (self.passes.forwards, self.passes.backwards)
            for row, spent in enumerate(b - a for a, b in zip(self._before, now, strict=True)):
                self._effort[row + 1].index_add_(0, active, standing * (spent / len(active)))
            self._before = now
        self._effort[0].scatter_reduce_(0, active, standing * step, "amax")
        fell = torch.zeros_like(self._effort[0]).index_add_(0, active, hit.double())
        self._fallen = self._fallen | (fell > 0)

    def effort(self) -> dict[str, Tensor]:
        """Per sample, up to the first success or the end: `rounds`, `queries`, `gradients`.

        The evaluation that showed the success counts, with its gradient. NaN where no trace was
        called or nothing was counted.
        """
        unknown = torch.full((3, len(self.y)), math.nan, dtype=torch.float64)
        found = unknown if self._effort is None else self._effort.cpu()
        if self.passes is None:
            found = torch.cat([found[:1], unknown[1:]])
        return {"rounds": found[0], "queries": found[1], "gradients": found[2]}

    def summary(self) -> dict[str, Tensor]:
        """Per sample: `first_hit` (step of the first adversarial draw, −1 if none) and `late_gain`.

        `late_gain` is the share of the total rise of the running best loss that came in the last
        tenth of the attack's steps (at least one step, at most ten): an attack that was still
        climbing has a large one. It is 0 where the loss did not rise, and NaN where no trace was
        called.
        """
        n = len(self.y)
        first = torch.full((n,), -1, dtype=torch.int64)
        if not self.steps:
            return {"first_hit": first, "late_gain": torch.full((n,), math.nan).double()}
        length = max(self.steps) + 1
        best = torch.full((length, n), -math.inf, dtype=torch.float64)
        for step, hit, loss, active in zip(
            self.steps, self.hits, self.losses, self.active, strict=True
        ):
            rows = active.cpu()
            best[step].scatter_reduce_(0, rows, loss.cpu().nan_to_num(nan=-math.inf), "amax")
            new = rows[hit.cpu()]
            new = new[first[new] < 0]
            first[new] = step
        return {"first_hit": first, "late_gain": _late_gain(best)}


def _late_gain(best: Tensor) -> Tensor:
    """(steps, B) best loss of every step to the share of its rise in the last tenth, (B,)."""
    length = len(best)
    running = best.cummax(0).values
    known = running.isfinite()
    # A trace need not start at step 0: a sample's start is the first loss that it has.
    start = running.gather(0, known.int().argmax(0, keepdim=True))[0]
    window = max(1, min(10, (length - 1) // 10))
    late = torch.maximum(running[max(0, length - 1 - window)], start)
    span, gain = running[-1] - start, running[-1] - late
    rose = known.any(0) & (span > 1e-6 * (1 + start.abs()))
    return torch.where(rose, gain / span, 0.0).nan_to_num(0.0).clamp(0, 1)


@dataclass
class Passes:
    """Images that went forward and came back through a model."""

    forwards: int = 0
    backwards: int = 0


@contextmanager
def counted(*models: nn.Module) -> Iterator[Passes]:
    """Count the images that pass through `models` while the context lasts; nothing else changes."""
    passes = Passes()

    def back(gradient: Tensor) -> None:
        passes.backwards += len(gradient)

    def forth(_: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if isinstance(output, Tensor) and output.ndim:
            passes.forwards += len(output)
            if output.requires_grad:
                output.register_hook(back)

    handles = [model.register_forward_hook(forth) for model in models]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()
