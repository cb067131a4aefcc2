"""Checks at the public door: called once per public call, never per step. Nothing is repaired."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from feint.core.errors import DeviceError, DtypeError, RangeError, ShapeError

__all__ = ["check_eps", "check_images", "check_keys", "check_labels", "check_mask"]


def check_images(x: Tensor, name: str = "x") -> None:
    """Require a float batch (B, C, H, W) of finite values in [0, 1]; an empty batch is fine.

    Raises:
        ShapeError: Not four dimensions.
        DtypeError: Not a floating-point tensor.
        RangeError: NaN, infinite, or outside [0, 1].
    """
    if not isinstance(x, Tensor):
        raise DtypeError(f"{name} is a {type(x).__name__}; expected a torch tensor (B, C, H, W)")
    if x.ndim != 4:
        raise ShapeError(
            f"{name} has shape {tuple(x.shape)}; expected (B, C, H, W)"
            + ("; add the batch axis with x[None]" if x.ndim == 3 else "")
        )
    if not x.is_floating_point():
        raise DtypeError(
            f"{name} has dtype {x.dtype}; expected floating point in [0, 1]; "
            "convert 8-bit images with feint.core.quantise.from_uint8(x)"
        )
    if x.numel() == 0:
        return
    low, high = torch.aminmax(x.detach())
    low_, high_ = float(low), float(high)
    if not (low_ == low_ and high_ == high_):
        raise RangeError(f"{name} contains NaN; expected finite values in [0, 1]")
    if low_ < 0 or high_ > 1:
        if 2 < high_ <= 255 and low_ >= 0:
            fix = "divide by 255"
        elif low_ < 0 and high_ <= 10:
            fix = "undo the normalisation; it belongs inside the model (feint.models.Normalized)"
        else:
            fix = "rescale it"
        raise RangeError(f"{name} has values in [{low_:.6g}, {high_:.6g}]; expected [0, 1]; {fix}")


def check_labels(y: Tensor, batch: int, classes: int | None = None, name: str = "y") -> None:
    """Require int64 labels (B,) in [0, classes).

    Raises:
        ShapeError: Not one label per image.
        DtypeError: Not int64.
        RangeError: A label that is negative or not below `classes`.
    """
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        got = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise DtypeError(f"{name} has type {got}; expected an int64 tensor of class indices")
    if y.shape != (batch,):
        raise ShapeError(f"{name} has shape {tuple(y.shape)}; expected ({batch},), one per image")
    if y.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(y))
    if low < 0 or (classes is not None and high >= classes):
        expected = "0 or more" if classes is None else f"0 to {classes - 1}, the model's classes"
        raise RangeError(
            f"{name} has labels in [{low}, {high}]; expected {expected}; "
            "number the classes as the model does"
        )


def check_eps(eps: float, norm: str, shape: torch.Size | tuple[int, ...]) -> None:
    """Require a budget in the units of images in [0, 1].

    Raises:
        RangeError: Negative, NaN, or larger than the box can ever need.
    """
    if not eps >= 0:
        raise RangeError(f"eps is {eps}; expected a number ≥ 0")
    n = math.prod(shape[1:])
    most = {"linf": 1.0, "l2": n**0.5, "l1": float(n), "l0": float(n)}[norm]
    if eps > most and n:
        raise RangeError(
            f"eps is {eps:g} for {norm}; images are in [0, 1], so expected at most {most:g}; "
            f"write {eps:g}/255 if it is in 0…255 units"
        )


def check_mask(mask: Tensor, x: Tensor) -> None:
    """Require a boolean mask (B or 1, 1 or C, H, W) on the device of `x`."""
    if mask.dtype != torch.bool:
        raise DtypeError(f"mask has dtype {mask.dtype}; expected bool (True = may be changed)")
    b, c, h, w = x.shape
    if (
        mask.ndim != 4
        or mask.shape[0] not in (1, b)
        or mask.shape[1] not in (1, c)
        or mask.shape[2:] != (h, w)
    ):
        raise ShapeError(
            f"mask has shape {tuple(mask.shape)}; expected ({b} or 1, 1 or {c}, {h}, {w})"
        )
    if mask.device != x.device:
        raise DeviceError(f"mask is on {mask.device}, x on {x.device}; move one of them")


def check_keys(keys: Tensor, batch: int) -> None:
    """Require one int64 key per image."""
    if keys.dtype != torch.int64 or keys.shape != (batch,):
        raise ShapeError(
            f"keys are {keys.dtype} {tuple(keys.shape)}; expected int64 ({batch},), "
            "from feint.core.random.keys(seed, index)"
        )
