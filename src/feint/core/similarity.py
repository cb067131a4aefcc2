"""Structural similarity (SSIM) of images, batched."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from feint.core.errors import RangeError, ShapeError

__all__ = ["ssim"]

_K1, _K2 = 0.01, 0.03


def ssim(x: Tensor, y: Tensor, window: int = 7) -> Tensor:
    """Structural similarity of each pair of images, with a uniform window.

    Means, variances and covariances are taken over every whole `window`×`window` square, with
    N − 1 in the denominator; the similarity of the squares is averaged over places and channels.

    Args:
        x: Images, (B, C, H, W), in [0, 1].
        y: Images of the same shape.
        window: Side of the square in pixels, odd.

    Returns:
        (B,) float64, 1 for equal images.

    Raises:
        ShapeError: If the shapes differ, or a side is shorter than the window.
        RangeError: If the window is not an odd number of at least 3 pixels.

    Cost: Ten one-dimensional means over the images, in float64.

    Example:
        >>> x = torch.rand(2, 3, 16, 16)
        >>> ssim(x, x)
        tensor([1., 1.], dtype=torch.float64)

    References:
        Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to
        structural similarity", IEEE Trans. Image Processing 13, 2004. Constants, window and sample
        covariance are scikit-image's defaults (`structural_similarity` with `data_range=1`), which
        S1 uses.
    """
    if x.shape != y.shape or x.ndim != 4:
        raise ShapeError(f"x is {tuple(x.shape)}, y {tuple(y.shape)}; expected (B, C, H, W) twice")
    if window < 3 or window % 2 == 0:
        raise RangeError(f"window is {window}; expected an odd number of at least 3 pixels")
    if min(x.shape[-2:]) < window:
        raise ShapeError(
            f"images of {x.shape[-2]}×{x.shape[-1]} pixels; SSIM expected sides of at least "
            f"{window}, its window; give larger images or a smaller window"
        )
    if x.numel() == 0:
        return torch.zeros(len(x), dtype=torch.float64, device=x.device)
    x, y = x.double(), y.double()
    mx, my, xx, yy, xy = _means(torch.stack([x, y, x * x, y * y, x * y]), window).unbind()
    unbiased = window**2 / (window**2 - 1)
    vx, vy, cov = unbiased * (xx - mx * mx), unbiased * (yy - my * my), unbiased * (xy - mx * my)
    top = (2 * mx * my + _K1**2) * (2 * cov + _K2**2)
    bottom = (mx * mx + my * my + _K1**2) * (vx + vy + _K2**2)
    return (top / bottom).flatten(1).mean(1)


def _means(stack: Tensor, window: int) -> Tensor:
    """Means over every whole square of the last two axes."""
    flat = stack.flatten(0, 1)
    down = nn.functional.avg_pool2d(flat, (window, 1), stride=1)
    return nn.functional.avg_pool2d(down, (1, window), stride=1).unflatten(0, stack.shape[:2])
