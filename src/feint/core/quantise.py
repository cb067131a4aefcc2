"""8-bit conversion, with the rounding named: three conventions are in circulation."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from feint.core.errors import ConfigError, DtypeError

__all__ = ["Rounding", "from_uint8", "quantise", "to_uint8", "to_uint8_numpy"]

Rounding = Literal["nearest", "truncate", "torchvision"]

_RULES: dict[str, tuple[float, str]] = {
    "nearest": (255, "nearest"),
    "truncate": (255, "floor"),
    "torchvision": (255.999, "floor"),
}
"""By name: what values are multiplied by, and how the product becomes whole."""


def to_uint8(x: Tensor, rounding: Rounding = "nearest") -> Tensor:
    """Images in [0, 1] as 8-bit values.

    Args:
        x: Floating point in [0, 1].
        rounding: `"nearest"` is round(255x), half to even; `"truncate"` is ⌊255x⌋ (numpy's
            `astype`, ART); `"torchvision"` is ⌊255.999x⌋.

    Example:
        >>> to_uint8(torch.tensor([0.999]), "truncate"), to_uint8(torch.tensor([0.999]))
        (tensor([254], dtype=torch.uint8), tensor([255], dtype=torch.uint8))
    """
    if not x.is_floating_point():
        raise DtypeError(f"x has dtype {x.dtype}; expected floating point in [0, 1]")
    scale, way = _rule(rounding)
    value = x.detach() * scale
    value = value.round_() if way == "nearest" else value.floor_()
    # By way of integers: from floating point to bytes torch has no vectorised code on a CPU.
    return value.clamp_(0, 255).to(torch.int32).to(torch.uint8)


def to_uint8_numpy(x: np.ndarray, rounding: Rounding = "nearest") -> np.ndarray:
    """What `to_uint8` does, for an array and on the calling thread alone.

    For threads of our own: in each of them torch would start as many again.

    Args:
        x: float32 or float64 in [0, 1].
        rounding: See `to_uint8`.

    Example:
        >>> to_uint8_numpy(np.array([0.999], np.float32), "truncate")
        array([254], dtype=uint8)
    """
    scale, way = _rule(rounding)
    value = x * x.dtype.type(scale)
    (np.rint if way == "nearest" else np.floor)(value, out=value)
    with np.errstate(invalid="ignore"):  # not a number: 0, as in torch
        return np.clip(value, 0, 255, out=value).astype(np.uint8)


def _rule(rounding: str) -> tuple[float, str]:
    if rounding not in _RULES:
        raise ConfigError(
            f"rounding is {rounding!r}; expected 'nearest', 'truncate' or 'torchvision'"
        )
    return _RULES[rounding]


def from_uint8(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """8-bit values as images in [0, 1]: x / 255."""
    if x.dtype != torch.uint8:
        raise DtypeError(f"x has dtype {x.dtype}; expected uint8")
    return x.to(dtype) / 255


def quantise(x: Tensor, rounding: Rounding = "nearest") -> Tensor:
    """The nearest images that 8 bits can hold, in the dtype of `x`."""
    return from_uint8(to_uint8(x, rounding), x.dtype)
