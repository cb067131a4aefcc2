"""The 8×8 block DCT of image codecs, its quantisation, and a differentiable rounding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from feint.core.errors import ShapeError

__all__ = ["block_dct", "block_idct", "dct_matrix", "round_stable", "round_stable_", "soft_round"]

_TIE_GRID = 2.0**20


def dct_matrix(
    size: int = 8, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
) -> Tensor:
    """The orthonormal DCT-II as a matrix: row k is √(c/n)·cos(π(2i+1)k/2n), c = 1 for k = 0 else 2.

    Example:
        >>> d = dct_matrix(8)
        >>> bool(torch.allclose(d @ d.T, torch.eye(8, dtype=d.dtype)))
        True
    """
    i = torch.arange(size, dtype=torch.float64)
    d = torch.cos(math.pi / (2 * size) * i[:, None] * (2 * i + 1)) * math.sqrt(2 / size)
    d[0] *= math.sqrt(0.5)
    return d.to(device, dtype)


def _blockwise(x: Tensor, left: Tensor) -> Tensor:
    """`left @ block @ left.T` for every block of the two last axes, in place of the blocks."""
    size, (height, width) = len(left), x.shape[-2:]
    if height % size or width % size:
        raise ShapeError(
            f"x has shape {tuple(x.shape)}; expected sides that are multiples of {size}; pad it"
        )
    rows = left @ x.unflatten(-2, (height // size, size))
    return (rows.unflatten(-1, (width // size, size)) @ left.T).flatten(-2).flatten(-3, -2)


def block_dct(x: Tensor, size: int = 8) -> Tensor:
    """Orthonormal DCT-II of every non-overlapping `size`×`size` block.

    Convention:
        Coefficient (u, v) of block (i, j) lies at (i·size + u, j·size + v); u, v = 0 is the lowest
        frequency. No level shift, no scaling.

    Args:
        x: (…, H, W); H and W are multiples of `size`.
        size: Side of a block.

    Returns:
        Same shape and dtype as `x`.

    Raises:
        ShapeError: If a side is no multiple of `size`.

    Cost: 4·size multiply–adds per pixel.

    Example:
        >>> block_dct(torch.ones(1, 1, 8, 8))[0, 0, :2, :2].round().abs()
        tensor([[8., 0.],
                [0., 0.]])
    """
    return _blockwise(x, dct_matrix(size, x.dtype, x.device))


def block_idct(x: Tensor, size: int = 8) -> Tensor:
    """Inverse of `block_dct` (the transposed matrices); arguments, errors and cost as there."""
    return _blockwise(x, dct_matrix(size, x.dtype, x.device).T)


def round_stable(x: Tensor) -> Tensor:
    """Round half to even, with halves recognised within 5·10⁻⁷.

    Quantised coefficients of 8-bit images lie on exact halves rather often (the DC term is a sum
    of integers over eight). Summed in another order they come out a hair above or below, and the
    result would depend on the device and on the batch size. Values are therefore brought to the
    grid of 2⁻²⁰ before they are rounded. Meant for float64.

    Example:
        >>> round_stable(torch.tensor([2.5 + 1e-12, 3.5 - 1e-12], dtype=torch.float64))
        tensor([2., 4.], dtype=torch.float64)
    """
    return round_stable_(x.clone())


def round_stable_(x: Tensor) -> Tensor:
    """`round_stable`, in place."""
    return x.mul_(_TIE_GRID).round_().div_(_TIE_GRID).round_()


def soft_round(x: Tensor, floor: float = 0.0) -> Tensor:
    """Cubic rounding ⌊x⌉ + r³ + floor·r, r = x − ⌊x⌉: near to rounding, derivative 3r² + floor.

    Args:
        x: Any shape.
        floor: Slope at the integers. With 0, values that are rounded already have no gradient.

    References:
        Shin, Song, "JPEG-resistant adversarial images", NIPS 2017 workshop on machine learning and
        computer security.
    """
    whole = x.detach().round()
    rest = x - whole
    return whole + rest**3 + floor * rest
