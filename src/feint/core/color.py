"""YCbCr as scikit-image defines it (ITU-R BT.601, studio range 16…235 and 16…240)."""

from __future__ import annotations

import torch
from torch import Tensor

from feint.core.errors import ShapeError

__all__ = ["FROM_RGB", "rgb_to_ycbcr", "ycbcr_to_rgb"]

FROM_RGB = (
    (65.481, 128.553, 24.966),
    (-37.797, -74.203, 112.0),
    (112.0, -93.786, -18.214),
)
"""Without the offset of 16 for Y and 128 for Cb and Cr."""
_OFFSET = (16.0, 128.0, 128.0)


def _mix(x: Tensor, matrix: Tensor, name: str) -> Tensor:
    if x.ndim != 4 or x.shape[1] != 3:
        raise ShapeError(f"{name} has shape {tuple(x.shape)}; expected (B, 3, H, W)")
    return torch.einsum("ij,bjhw->bihw", matrix.to(x.device, x.dtype), x)


def rgb_to_ycbcr(x: Tensor) -> Tensor:
    """RGB in [0, 1] to YCbCr: Y in [16, 235], Cb and Cr in [16, 240], gray at 128.

    Args:
        x: (B, 3, H, W).

    Raises:
        ShapeError: If there are not three channels.

    Example:
        >>> rgb_to_ycbcr(torch.ones(1, 3, 1, 1)).flatten().round().tolist()
        [235.0, 128.0, 128.0]
    """
    matrix = torch.tensor(FROM_RGB, dtype=torch.float64)
    offset = torch.tensor(_OFFSET, dtype=x.dtype, device=x.device)[:, None, None]
    return _mix(x, matrix, "x") + offset


def ycbcr_to_rgb(x: Tensor) -> Tensor:
    """Inverse of `rgb_to_ycbcr`; the result is not clipped."""
    matrix = torch.tensor(FROM_RGB, dtype=torch.float64).inverse()
    offset = torch.tensor(_OFFSET, dtype=x.dtype, device=x.device)[:, None, None]
    return _mix(x - offset, matrix, "x")
