"""Exact search for the pair of features with the largest saliency, without the n² matrix.

The saliency of a pair is (a_p + a_q)·(b_p + b_q), both sums positive. It grows in a and in b, so a
feature that another one dominates (no smaller a, no smaller b) can be replaced by it, unless that
one is its partner. Hence there is a best pair in which neither feature is dominated by two others.
Those few are found by sorting; their pairs are then looked at in blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["best_pair", "best_single"]

_BLOCK = 1 << 22
"""Pairs in memory at a time, over all samples."""


def best_single(a: Tensor, b: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """The feature with a > 0, b > 0 that maximises a·b.

    Args:
        a: (R, n).
        b: (R, n).
        allowed: (R, n) bool.

    Returns:
        index: (R, 1) int64.
        found: (R,) bool, false where no feature has both positive.
    """
    worth = torch.where(allowed & (a > 0) & (b > 0), a * b, -torch.inf)
    top = worth.max(1, keepdim=True)
    return top.indices, top.values[:, 0] > -torch.inf


def best_pair(a: Tensor, b: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """The pair p ≠ q with both sums positive that maximises (a_p + a_q)·(b_p + b_q).

    Cost: A sort of n values per sample, and m² pairs, m the most features of a sample that fewer
    than two others dominate (about log² n for values at random; n, in n/2 times the block's memory
    and no more, if they all lie on a falling line). One host synchronisation, for m.

    Args:
        a: (R, n).
        b: (R, n).
        allowed: (R, n) bool.

    Returns:
        index: (R, 2) int64.
        found: (R,) bool, false where no pair has both sums positive.
    """
    rows, n = a.shape
    if n < 2:
        return a.new_zeros((rows, 2), dtype=torch.int64), torch.zeros_like(allowed[:, 0])
    # Scaled, so that products of tiny gradients do not underflow.
    a, b = (_scaled(v, allowed) for v in (a, b))
    order, kept = _undominated(a, b, allowed)
    count = max(2, int(kept.sum(1).amax()))
    slot = kept.int().argsort(dim=1, descending=True, stable=True)[:, :count]
    index = order.gather(1, slot)
    valid = kept.gather(1, slot)
    a = torch.where(valid, a.gather(1, index), -torch.inf)
    b = torch.where(valid, b.gather(1, index), -torch.inf)
    best = a.new_full((rows,), -torch.inf)
    pair = torch.zeros((rows, 2), dtype=torch.int64, device=a.device)
    other = torch.arange(count, device=a.device)
    height = max(1, _BLOCK // max(1, rows * count))
    for start in range(0, count, height):
        left = other[start : start + height]
        x, y = a[:, left, None] + a[:, None], b[:, left, None] + b[:, None]
        fits = (x > 0) & (y > 0) & (left[:, None] < other)
        top = torch.where(fits, x * y, -torch.inf).flatten(1).max(1)
        chosen = torch.stack([left[top.indices // count], top.indices % count], 1)
        better = top.values > best
        pair = torch.where(better[:, None], chosen, pair)
        best = torch.maximum(best, top.values)
    return index.gather(1, pair), best > -torch.inf


def _scaled(value: Tensor, allowed: Tensor) -> Tensor:
    value = value.masked_fill(~allowed, 0)
    return value / value.abs().amax(1, keepdim=True).clamp_min(torch.finfo(value.dtype).tiny)


def _undominated(a: Tensor, b: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Features by falling a, (R, n), and which of them fewer than two before them dominate in b."""
    order = torch.where(allowed, a, -torch.inf).argsort(dim=1, descending=True, stable=True)
    fall = torch.where(allowed, b, -torch.inf).gather(1, order)
    first = _before(fall)
    # The second largest so far is the largest of those that lost to a larger one before or after.
    second = _before(torch.minimum(fall, first))
    return order, (fall > second) & allowed.gather(1, order)


def _before(value: Tensor) -> Tensor:
    """Largest of the values before each one; −∞ for the first."""
    largest = value.cummax(1).values
    start = torch.full_like(largest[:, :1], -torch.inf)
    return torch.cat([start, largest[:, :-1]], 1)
