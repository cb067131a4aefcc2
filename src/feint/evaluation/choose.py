"""Choose an example by its estimated probability of success, not by one lucky evaluation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.gradients import eot
from feint.core.losses import margin, success_share
from feint.core.norms import distance

__all__ = ["DRAWS", "KEPT", "Shortlist"]

KEPT = 4
"""Points of each sample that are looked at again."""
DRAWS = 24
"""Fresh draws on which they are compared."""
_IMAGES, _VALUES = 1024, 1 << 27
"""Images, and numbers, that go through the pipeline at once."""


class Shortlist:
    """A trace that remembers each sample's most promising points within the budget.

    An attack on a random pipeline keeps the point that looked best on the few draws of its step; of
    many steps the best look is luck in part. Here several are kept, and `pick` asks the pipeline
    about them again, on draws that neither the attack nor the judge uses.

    Args:
        x: Clean images, (B, C, H, W).
        y: (B,) labels or targets.
        targeted: Whether they are targets.
        norm: The threat model's norm.
        eps: Its budget: points beyond do not count.
    """

    def __init__(self, x: Tensor, y: Tensor, targeted: bool, norm: str, eps: float) -> None:
        self.x, self.y, self.targeted, self.norm, self.eps = x, y, targeted, norm, eps
        # One row more than there are samples: what is not wanted is written there.
        wide = torch.cat([x, x[:1]]) if len(x) else x
        self.points = wide[:, None].repeat(1, KEPT, 1, 1, 1)
        self.worth = torch.full(self.points.shape[:2], -torch.inf, device=x.device).double()

    def __call__(
        self, step: int, x_adv: Tensor, logits: Tensor, loss: Tensor, active: Tensor
    ) -> None:
        """The trace callback; a sample that has several rows brings its best one."""
        wide = logits.detach() if logits.ndim == 3 else logits.detach()[:, None]
        share = success_share(wide, self.y[active], self.targeted).double()
        # The share decides, and the loss between equal shares.
        worth = share + 1e-4 * loss.detach().double().nan_to_num(nan=-torch.inf).atan()
        beyond = distance(x_adv, self.x[active], self.norm) > self.eps
        worth = worth.masked_fill(beyond, -torch.inf)
        best = torch.full_like(self.worth[:, 0], -torch.inf)
        best = best.scatter_reduce(0, active, worth, "amax")
        number = torch.arange(len(active), device=active.device)
        first = torch.where(worth == best[active], number, len(active))
        ours = torch.full_like(best, len(active), dtype=torch.int64)
        ours = ours.scatter_reduce(0, active, first, "amin")
        least, slot = self.worth[active].min(1)
        wanted = (ours[active] == number) & (worth > least)
        row = torch.where(wanted, active, len(self.x))
        self.points[row, slot] = x_adv.detach()
        self.worth[row, slot] = worth

    def pick(self, view: nn.Module, found: Tensor, keys: Tensor) -> Tensor:
        """For each sample the point that succeeds most often on fresh draws.

        Args:
            view: The attacked pipeline.
            found: What the attack returned, (B, C, H, W): one more candidate.
            keys: (B,) keys of the samples.

        Returns:
            (B, C, H, W). Of equally successful points that of the largest mean margin.

        Cost: (`KEPT` + 1)·`DRAWS` forward passes per sample, or fewer draws if there are no more.
        """
        size = min(_IMAGES, _VALUES // max(1, found[:1].numel())) // ((KEPT + 1) * DRAWS)
        parts = [
            self._picked(view, found, keys, slice(start, start + max(1, size)))
            for start in range(0, len(found), max(1, size))
        ]
        return torch.cat(parts) if parts else found

    def _picked(self, view: nn.Module, found: Tensor, keys: Tensor, rows: slice) -> Tensor:
        """The choice for some samples."""
        found, labels, count = found[rows], self.y[rows], KEPT + 1
        known = self.worth[:-1][rows].isfinite()[..., None, None, None]
        kept = torch.where(known, self.points[:-1][rows], found[:, None])
        every = torch.cat([found[:, None], kept], 1).flatten(0, 1)
        labels = labels.repeat_interleave(count)
        # The same draws for all candidates of a sample: their difference is not the draws'.
        drawn = random.fold(keys[rows], "choose").repeat_interleave(count)
        asked = eot(DRAWS)(view, every, labels, margin, drawn, forward_only=True)
        share = success_share(asked.logits, labels, self.targeted).double()
        sign = -1.0 if self.targeted else 1.0
        worth = (share + 1e-6 * (sign * asked.loss.double()).atan()).view(-1, count)
        best = torch.arange(len(found), device=found.device) * count + worth.argmax(1)
        return every[best]
