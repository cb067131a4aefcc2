"""Functions of a matrix's singular values, batched, with a gradient that ties do not break."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["soft_threshold", "truncate"]

_TIE = 1e-10
"""Gap between eigenvalues, as a share of the largest one, below which they count as equal."""


def truncate(a: Tensor, rank: int) -> Tensor:
    """The nearest matrix of a rank, for each of a batch: the largest singular values are kept.

    Args:
        a: (…, M, N), float64 for full accuracy.
        rank: How many singular values to keep, 0 … min(M, N).

    Cost: An eigendecomposition of the smaller Gram matrix, and products with it.

    Example:
        >>> a = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
        >>> truncate(a, 2).diagonal().round(decimals=6)
        tensor([3., 2., 0.], dtype=torch.float64)
    """
    return _wide(a, rank, None)


def soft_threshold(a: Tensor, amount: float) -> Tensor:
    """Every singular value lowered by `amount`, to zero at least: the nuclear norm's proximal map.

    Args:
        a: (…, M, N), float64 for full accuracy.
        amount: τ > 0.

    Cost: As `truncate`.

    Example:
        >>> a = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
        >>> soft_threshold(a, 1.5).diagonal().round(decimals=6)
        tensor([1.5000, 0.5000, 0.0000], dtype=torch.float64)
    """
    return _wide(a, None, amount)


def _wide(a: Tensor, rank: int | None, amount: float | None) -> Tensor:
    """On the transposed matrix if it is tall, so that the Gram matrix is the smaller one."""
    tall = a.shape[-2] > a.shape[-1]
    result: Tensor = _Filter.apply(a.mT if tall else a, rank, amount)
    return result.mT if tall else result


class _Filter(torch.autograd.Function):
    """F(A) = h(A Aᵀ) A: the singular value s becomes h(s²)·s, its vectors stay.

    With U and λ the eigenvectors and eigenvalues of A Aᵀ, dF = Dh[dA Aᵀ + A dAᵀ] A + h dA, where
    Dh[E] = U (Q ∘ Uᵀ E U) Uᵀ and Q holds the divided differences of h (Daleckii and Krein). Inside
    of a group of equal eigenvalues they are h', so that no gap has to be divided by.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, rank: int | None, amount: float | None) -> Tensor:
        values, vectors = torch.linalg.eigh(a @ a.mT)  # ascending
        if amount is None:
            kept = torch.arange(values.shape[-1], device=a.device) >= values.shape[-1] - (rank or 0)
            share = kept.to(a.dtype).expand_as(values)
            slope = torch.zeros_like(values)
        else:
            size = values.clamp_min(0).sqrt()
            above = size > amount
            safe = torch.where(above, size, 1.0)
            share = torch.where(above, 1 - amount / safe, 0.0)
            slope = torch.where(above, amount / (2 * safe**3), 0.0)
        ctx.save_for_backward(a, values, vectors, share, slope)
        return vectors @ (share[..., None] * (vectors.mT @ a))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        a, values, vectors, share, slope = ctx.saved_tensors
        gap = values[..., :, None] - values[..., None, :]
        rise = share[..., :, None] - share[..., None, :]
        apart = gap.abs() > _TIE * values[..., -1:, None].abs()
        middle = (slope[..., :, None] + slope[..., None, :]) / 2
        quotient = torch.where(apart, rise / torch.where(apart, gap, 1.0), middle)
        both = grad @ a.mT
        inner = vectors.mT @ (both + both.mT) @ vectors
        change = vectors @ (quotient * inner) @ vectors.mT
        direct = vectors @ (share[..., None] * (vectors.mT @ grad))
        return change @ a + direct, None, None
