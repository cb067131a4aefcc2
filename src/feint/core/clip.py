"""Clipping to [0, 1] that does not cut the gradient of pixels at exactly 0 or 1."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["clip"]


def clip(x: Tensor) -> Tensor:
    """`x.clamp(0, 1)` with the derivative 1 on the closed interval.

    The derivative of `torch.clamp` at the bounds themselves is 0 or 1, depending on the version of
    torch. Black and white pixels lie there, so with 0 an attack would never see them.

    Args:
        x: Any shape.

    Returns:
        Like `x`.

    Example:
        >>> x = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0], requires_grad=True)
        >>> torch.autograd.grad(clip(x).sum(), x)[0]
        tensor([0., 1., 1., 1., 0.])
    """
    return torch.where(x < 0, 0.0, torch.where(x > 1, 1.0, x))
