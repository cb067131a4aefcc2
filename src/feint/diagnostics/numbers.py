"""What a measure gives: arrays, and numbers with their counts and 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

__all__ = ["SHARE", "Measured", "Number", "array", "exact", "mean", "rate"]

SHARE = (0.0, 1.0)
"""Bounds of a share."""
_Z = 1.959963984540054


@dataclass(frozen=True)
class Number:
    """A number; with a count and a 95 % interval if it was estimated from images."""

    value: float | None
    """None where nothing counted."""
    n: int | None = None
    low: float | None = None
    high: float | None = None

    def as_dict(self) -> dict[str, float | int | None]:
        """Plain data; what is not finite is None."""
        return {k: _finite(v) for k, v in asdict(self).items() if v is not None or k == "value"}


@dataclass(frozen=True)
class Measured:
    """A measure of one model."""

    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    numbers: Mapping[str, Number] = field(default_factory=dict)


def _finite(value: float | int | None) -> float | int | None:
    return value if value is None or math.isfinite(value) else None


def exact(value: float | Tensor) -> Number:
    """A number without sampling error, such as one of an architecture."""
    return Number(float(value))


def rate(hits: Tensor) -> Number:
    """Share of true entries with Wilson's 95 % interval.

    Args:
        hits: bool, (N,).

    Example:
        >>> import torch
        >>> rate(torch.tensor([True, False])).value
        0.5

    References:
        Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    n = hits.numel()
    if n == 0:
        return Number(None, 0)
    p = float(hits.double().mean())
    middle, size = p + _Z**2 / (2 * n), 1 + _Z**2 / n
    half = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n))
    low, high = (middle - half) / size, (middle + half) / size
    return Number(p, n, 0.0 if p == 0 else max(0.0, low), 1.0 if p == 1 else min(1.0, high))


def mean(values: Tensor, bounds: tuple[float, float] = (-math.inf, math.inf)) -> Number:
    """Mean of per-image values with Student's 95 % interval; NaN and infinities are left out.

    Args:
        values: (N,).
        bounds: What a mean can be; the interval is cut to it.

    Example:
        >>> import torch
        >>> mean(torch.tensor([1.0, 3.0])).value
        2.0
    """
    known = array(values).astype(np.float64)
    known = known[np.isfinite(known)]
    n = len(known)
    if n < 2:
        return Number(float(known[0]) if n else None, n)
    half = float(stats.t.ppf(0.975, n - 1) * known.std(ddof=1) / math.sqrt(n))
    centre = float(known.mean())
    return Number(centre, n, max(bounds[0], centre - half), min(bounds[1], centre + half))


def array(values: Tensor) -> NDArray[Any]:
    """A tensor as a numpy array."""
    return np.asarray(values.detach().cpu().numpy())
