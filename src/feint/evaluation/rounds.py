"""Attacks that are tried against the whole pipeline round by round: who fell when, and where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feint.attacks._ascent import Trace
from feint.core.errors import RangeError
from feint.evaluation.metrics import Rate, rate

__all__ = ["History", "watched"]

Attack = Callable[[slice, Trace], Tensor]


@dataclass(frozen=True)
class History:
    """An attack round by round, by S1's convention.

    There is one draw a round: an image that gets through on it leaves as a success, and counts as
    wrong from then on.
    """

    first_hit: NDArray[np.int64]
    """(N,) round of the first hit, −1 for none up to the last round: right-censored there."""
    right: NDArray[np.bool_]
    """(R + 1, N): not hit yet, and the one draw of the round gave the true label."""
    images: dict[int, Tensor] = field(default_factory=dict)
    """(N, C, H, W) after some rounds: those that left stay as they were."""

    @property
    def rounds(self) -> int:
        """The last round."""
        return len(self.right) - 1

    @property
    def accuracy(self) -> list[Rate]:
        """S1's ACC of every round: not hit before, and the round's draw right, of all images."""
        return [rate(row.astype(float)) for row in self.right]

    @property
    def success(self) -> list[Rate]:
        """S1's ASR of every round: share of the images hit so far."""
        hit = self.first_hit
        return [rate(((hit >= 0) & (hit <= r)).astype(float)) for r in range(self.rounds + 1)]

    def rounds_to(self, share: float) -> int | None:
        """First round by which `share` of the images was hit; None if it lies beyond the last.

        Raises:
            RangeError: If `share` is not in (0, 1].
        """
        if not 0 < share <= 1:
            raise RangeError(f"share is {share}; expected a number in (0, 1]")
        hits = np.sort(self.first_hit[self.first_hit >= 0])
        needed = int(np.ceil(share * len(self.first_hit) - 1e-9))
        return int(hits[needed - 1]) if 0 < needed <= len(hits) else None


def watched(
    attack: Attack,
    x: Tensor,
    y: Tensor,
    target: Tensor | None,
    *,
    rounds: int,
    checked: Sequence[int] = (),
    batch_size: int = 64,
) -> tuple[Tensor, History]:
    """Run an attack batch by batch and note what every round of it did.

    Args:
        attack: `attack(pick, trace)` attacks the samples `pick`, calls `trace` as the attacks of
            `feint.attacks` do, with the logits of the round's one draw, and returns their images.
        x: Images, (N, C, H, W).
        y: True labels, (N,).
        target: Targets, (N,); None for an untargeted attack.
        rounds: The last round; round 0 is where the attack starts.
        checked: Rounds whose images are kept.
        batch_size: Images per call.

    Returns:
        The attack's images, and its history.
    """
    first = np.full(len(x), -1, dtype=np.int64)
    right = np.zeros((rounds + 1, len(x)), dtype=np.bool_)
    images = {r: x.clone() for r in checked}
    parts = [x[:0]]
    for start in range(0, len(x), batch_size):
        pick = slice(start, start + batch_size)
        now = x[pick].clone()

        def watch(
            step: int,
            points: Tensor,
            logits: Tensor,
            loss: Tensor,
            active: Tensor,
            start: int = start,
            now: Tensor = now,
            pick: slice = pick,
        ) -> None:
            said = logits[:, 0].argmax(1)
            correct = said == y[pick][active]
            hit = ~correct if target is None else said == target[pick][active]
            place = start + active.cpu().numpy()
            fallen = place[hit.cpu().numpy()]
            first[fallen[first[fallen] < 0]] = step
            right[step, place] = (correct & ~hit).cpu().numpy()
            now[active] = points
            if step in images:
                images[step][pick] = now

        parts.append(attack(pick, watch))
        # Where all have left before a round, its images are the last ones.
        met = int(first[pick].max(initial=-1)) if (first[pick] >= 0).all() else rounds
        for r in (r for r in images if r > met):
            images[r][pick] = now
    return torch.cat(parts), History(first, right, images)
