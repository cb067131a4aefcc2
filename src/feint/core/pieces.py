"""Batches in pieces that fit a CPU's cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["in_pieces"]

_VALUES = 1 << 18
"""Values of a piece: a float64 copy of them is 2 MiB."""


def in_pieces(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)` for a function that treats every sample by itself.

    On a CPU a large batch is cut into pieces of about 2¹⁸ values, one sample at least: a function
    of many elementwise steps then finds in the cache what it has just written, instead of asking
    the system for fresh memory at every step. Elsewhere, and for small batches, it is one call.

    Args:
        function: From (B, …) to (B, …), sample by sample.
        x: (B, …).

    Example:
        >>> in_pieces(lambda z: z * 2, torch.ones(3, 2)).sum()
        tensor(12.)
    """
    if x.device.type != "cpu" or x.numel() <= _VALUES or len(x) < 2:
        return function(x)
    size = max(1, _VALUES * len(x) // x.numel())
    return torch.cat([function(part) for part in x.split(size)])
