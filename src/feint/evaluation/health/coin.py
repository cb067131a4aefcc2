"""A coin of known probability, judged like any random pipeline: its number must be the truth."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from feint.core import random
from feint.evaluation.judge import judge
from feint.evaluation.metrics import Rate, rate

__all__ = ["CoinControl", "coin_control"]

RIGHT = 0.8
"""Probability that the coin is right about class 0."""
SAMPLES = 256
"""Samples that it is judged on."""


class CoinControl(nn.Module):
    """Right about class 0 with a known probability, whatever the image."""

    stochastic = True

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """Logits of two classes, (B, 2)."""
        keys = random.entropy_keys(len(x), x.device) if keys is None else keys
        right = random.uniform(keys) < RIGHT
        return torch.stack([right, ~right], 1).to(x.dtype)


@lru_cache(maxsize=8)
def coin_control(draws: int) -> tuple[Rate, float]:
    """The judge's number for the coin, with an interval of 95 %, and the truth.

    Deterministic: one seed, one answer, for each number of draws.

    Args:
        draws: Draws per sample, as the judge takes them.
    """
    x, y = torch.zeros(SAMPLES, 1, 1, 1), torch.zeros(SAMPLES, dtype=torch.int64)
    keys = random.keys(0, torch.arange(SAMPLES))
    found = judge(CoinControl(), x, y, keys, draws=max(2, draws))
    return rate(found.correct.double().numpy() / found.draws, found.draws), RIGHT
