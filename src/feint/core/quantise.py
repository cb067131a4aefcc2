"""8-bit conversion, with the rounding named: three conventions are in circulation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from feint.core.errors import ConfigError, DtypeError

__all__ = ["Rounding", "from_uint8", "quantise", "to_uint8"]

Rounding = Literal["nearest", "truncate", "torchvision"]


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
    x = x.detach()
    if rounding == "nearest":
        value = (x * 255).round_()
    elif rounding == "truncate":
        value = (x * 255).floor_()
    elif rounding == "torchvision":
        value = (x * 255.999).floor_()
    else:
        raise ConfigError(
            f"rounding is {rounding!r}; expected 'nearest', 'truncate' or 'torchvision'"
        )
    # By way of integers: from floating point to bytes torch has no vectorised code on a CPU.
    return value.clamp_(0, 255).to(torch.int32).to(torch.uint8)


def from_uint8(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """8-bit values as images in [0, 1]: x / 255."""
    if x.dtype != torch.uint8:
        raise DtypeError(f"x has dtype {x.dtype}; expected uint8")
    return x.to(dtype) / 255


def quantise(x: Tensor, rounding: Rounding = "nearest") -> Tensor:
    """The nearest images that 8 bits can hold, in the dtype of `x`."""
    return from_uint8(to_uint8(x, rounding), x.dtype)
