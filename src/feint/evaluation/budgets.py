"""Budgets in other units than a norm's own."""

from __future__ import annotations

import math
from collections.abc import Sequence

from feint.core.errors import RangeError

__all__ = ["rms_budget"]


def rms_budget(eps: float, shape: Sequence[int]) -> float:
    """The l2 budget that S1 writes as a root-mean-square: eps·√(C·H·W).

    Args:
        eps: Largest √mean δ², in image units: S1's "L2 of 0.05" is this.
        shape: Shape of an image or of a batch; the last three axes count.

    Raises:
        RangeError: If `eps` is no budget or the shape has no image.

    Example:
        >>> round(rms_budget(0.05, (3, 299, 299)), 2)
        25.89
    """
    if not 0 <= eps <= 1:
        raise RangeError(f"rms eps is {eps:g}; images are in [0, 1], so expected 0 to 1")
    if len(shape) < 3:
        raise RangeError(f"shape is {tuple(shape)}; expected (C, H, W)")
    return float(eps) * math.sqrt(math.prod(shape[-3:]))
