"""Batches in pieces that fit a CPU's cache, and memory for large results."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

__all__ = ["fresh_like", "in_pieces", "keep_freed_memory"]

_VALUES = 1 << 18
"""Values of a piece: a float64 copy of them is 2 MiB."""
_LARGE = 1 << 22
"""Bytes from which on numpy asks the system for huge pages."""
_TYPES = {torch.float32: np.float32, torch.float64: np.float64}


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Let tensors of a few MiB come from memory that the process has already; once per process.

    glibc gives idle memory back to the system beyond twice the largest block that was ever freed,
    then asks for it again, page by page. Freeing one block, untouched, raises that to 60 MiB, as
    freeing any large tensor would. Other allocators do not mind.
    """
    torch.empty(30 << 20, dtype=torch.uint8)


def fresh_like(x: Tensor) -> Tensor:
    """Uninitialised memory for a result like `x`: same shape, dtype and device, contiguous.

    Large memory on a CPU comes from numpy, which has it in pages of 2 MiB where the system can:
    the first touch of every page of 4 KiB otherwise costs several times the copying itself.

    Args:
        x: Any tensor.

    Example:
        >>> fresh_like(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """
    if x.device.type == "cpu" and x.dtype in _TYPES and x.nbytes >= _LARGE:
        return torch.from_numpy(np.empty(tuple(x.shape), _TYPES[x.dtype]))
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def in_pieces(
    function: Callable[..., Tensor], x: Tensor, *others: Tensor, values: int = _VALUES
) -> Tensor:
    """`function(x, *others)` for a function that treats every sample by itself.

    On a CPU a large batch is cut into pieces of about 2¹⁸ values, one sample at least: a function
    of many elementwise steps then finds in the cache what it has just written, instead of asking
    the system for fresh memory at every step. Elsewhere, and for small batches, it is one call.

    Args:
        function: From (B, …) to the same shape and dtype, sample by sample.
        x: (B, …).
        others: More tensors with the same first axis, cut alike.
        values: Values of `x` in a piece, about.

    Example:
        >>> in_pieces(lambda z: z * 2, torch.ones(3, 2)).sum()
        tensor(12.)
    """
    if x.device.type != "cpu" or x.numel() <= values or len(x) < 2:
        return function(x, *others)
    keep_freed_memory()
    size = max(1, values * len(x) // x.numel())
    parts = zip(*(tensor.split(size) for tensor in (x, *others)), strict=True)
    first = function(*next(parts))
    if first.requires_grad or first.shape[1:] != x.shape[1:]:
        return torch.cat([first, *(function(*part) for part in parts)])
    out = fresh_like(x)
    out[:size] = first
    for i, part in enumerate(parts, 1):
        out[i * size : (i + 1) * size] = function(*part)
    return out
