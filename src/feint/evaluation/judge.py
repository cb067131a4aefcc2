"""The judge: how often a pipeline is right about given images, on draws nobody has seen before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.checks import check_labels
from feint.core.errors import ModelError, RangeError
from feint.core.gradients import call, is_stochastic

__all__ = ["VOTES", "Judgement", "judge"]

VOTES = (3, 5, 9, 17)
"""Sizes of majority votes that every judgement looks at."""


@dataclass(frozen=True)
class Judgement:
    """What the judged pipeline said of each sample; one draw if it is deterministic.

    All fields are per sample, on the CPU.
    """

    predictions: Tensor
    """(N, D) int64: the prediction of every draw."""
    y: Tensor
    """(N,) true labels."""

    @property
    def draws(self) -> int:
        """Draws per sample, D."""
        return self.predictions.shape[1]

    @property
    def correct(self) -> Tensor:
        """(N,) int64: draws whose prediction is the true label."""
        return (self.predictions == self.y[:, None]).sum(1)

    def half(self, which: int) -> Tensor:
        """(N,) share correct on the even (0) or odd (1) draws; all draws if there is one."""
        part = self.predictions if self.draws == 1 else self.predictions[:, which::2]
        return (part == self.y[:, None]).double().mean(1)

    def hits(self, target: Tensor) -> Tensor:
        """(N,) int64: draws whose prediction is the attacker's target."""
        return (self.predictions == target[:, None]).sum(1)

    def majority(self) -> Tensor:
        """(N,) the most frequent prediction (the smallest class among equals)."""
        return self.predictions.mode(1).values

    def vote(self, n: int) -> Tensor:
        """(N,) float64: share of the majority votes of `n` draws that give the true label.

        Over the D runs of `n` successive draws (the last goes over into the first): every draw
        counts alike, and the expectation is that of a vote of `n` fresh draws. Of equals the
        smallest class wins. NaN where fewer than `n` draws were taken.
        """
        if n > self.draws:
            return torch.full((len(self.y),), torch.nan, dtype=torch.float64)
        ring = torch.cat([self.predictions, self.predictions[:, : n - 1]], 1)
        return (ring.unfold(1, n, 1).mode(2).values == self.y[:, None]).double().mean(1)


@torch.no_grad()
def judge(
    pipeline: nn.Module,
    x: Tensor,
    y: Tensor,
    keys: Tensor,
    *,
    draws: int = 32,
    batch_size: int = 256,
    purpose: str = "judge",
) -> Judgement:
    """Judge images on held-out draws.

    The draws' keys are folded from the samples' keys for the purpose `"judge"`, which no attack
    uses. A deterministic pipeline is asked once.

    Args:
        pipeline: The classifier that is deployed.
        x: Images, (N, C, H, W), in [0, 1].
        y: True labels, (N,).
        keys: (N,) int64, from the run's seed and the samples' indices.
        draws: Draws per sample for a stochastic pipeline, at least 2.
        batch_size: Images per forward pass.
        purpose: Which held-out draws; another purpose gives fresh ones.

    Raises:
        ModelError: If the logits are NaN.
        RangeError: If a label is no class of the pipeline, or the draws are fewer than two.

    Cost: `draws` forward passes per sample, or one.
    """
    keys = keys.to(x.device)
    if is_stochastic(pipeline):
        if draws < 2:
            raise RangeError(f"judge draws is {draws}; a stochastic pipeline needs at least 2")
        number = torch.arange(draws, device=x.device)
        wide = random.fold(keys, purpose, 0, number)
    else:
        wide = keys[:, None]
    count = wide.shape[1]
    rows = torch.arange(len(x), device=x.device).repeat_interleave(count)
    flat, parts = wide.flatten(), []
    for start in range(0, len(flat), batch_size):
        pick = slice(start, start + batch_size)
        logits = call(pipeline, x[rows[pick]], flat[pick])
        if start == 0:
            check_labels(y, len(x), logits.shape[1])
        if bool(logits.isnan().any()):
            raise ModelError("the judged pipeline gives NaN logits; no prediction can be read")
        parts.append(logits.argmax(1).cpu())
    found = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
    return Judgement(found.view(len(x), count), y.cpu())
