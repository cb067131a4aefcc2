"""What Square draws: windows, their size over time, and the bumps of its l2 form."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["bump", "inside", "place", "share_of_window", "side"]

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries, out of 10 000, after which the windows' area is halved (the first one: by two)."""


def share_of_window(query: int, schedule: int, first: float) -> float:
    """Share of the image that a window covers at this query (the first after the start is 0).

    Example:
        >>> [share_of_window(q, 10_000, 0.8) for q in (0, 11, 9000)]
        [0.8, 0.4, 0.0015625]
    """
    scaled = int(query / schedule * 10_000)
    return float(first / 2 ** sum(scaled > after for after in _HALVINGS))


def side(share: float, height: int, width: int, norm: str) -> int:
    """Side of the square window; for l2 odd and at least 3, as far as the image allows."""
    most = min(height, width)
    length = round(math.sqrt(share * height * width))
    if norm == "linf":
        return min(max(length, 1), most)
    length = max(length, 3)
    length += length % 2 == 0
    return length if length <= most else max(1, most - (most % 2 == 0))


def inside(top: Tensor, left: Tensor, length: int, height: int, width: int) -> Tensor:
    """Windows with these upper left corners (R,) as a mask (R, 1, H, W)."""
    i = torch.arange(height, device=top.device) - top[:, None]
    j = torch.arange(width, device=top.device) - left[:, None]
    return (((i >= 0) & (i < length))[:, :, None] & ((j >= 0) & (j < length))[:, None, :])[:, None]


def place(
    pattern: Tensor, turned: Tensor, top: Tensor, left: Tensor, height: int, width: int
) -> Tensor:
    """`pattern` (s, s), or its transpose where `turned` (R,), in windows (R, 1, H, W)."""
    s = len(pattern)
    i = torch.arange(height, device=top.device) - top[:, None]
    j = torch.arange(width, device=top.device) - left[:, None]
    i_, j_ = i.clamp(0, s - 1)[:, :, None], j.clamp(0, s - 1)[:, None, :]
    flip = turned[:, None, None]
    found = pattern[torch.where(flip, j_, i_), torch.where(flip, i_, j_)][:, None]
    return found * inside(top, left, s, height, width)


@lru_cache(maxsize=64)
def bump(length: int) -> Tensor:
    """Two peaks of opposite sign, one above the other, of unit l2 norm: (s, s) float64."""
    upper = length // 2
    pattern = torch.cat([_peak(upper, length), -_peak(length - upper, length)])
    return pattern / pattern.norm()


def _peak(height: int, width: int) -> Tensor:
    """Concentric squares that add 1/m² each, m = 1, 2, …, of unit l2 norm."""
    pattern = torch.zeros(height, width, dtype=torch.float64)
    i, j = height // 2, width // 2
    for m in range(max(i, j) + 1):
        pattern[max(0, i - m) : i + m + 1, max(0, j - m) : j + m + 1] += 1 / (m + 1) ** 2
    return pattern / pattern.norm() if height else pattern
