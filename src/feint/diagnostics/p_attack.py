"""P_attack: how often one white pixel changes the prediction, place by place."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from feint.core.errors import RangeError
from feint.core.gradients import Model
from feint.core.losses import adversarial
from feint.diagnostics._common import check, logits_of, predict_variants, sample_keys

__all__ = ["PixelAttack", "pixel_attack_rate"]


class PixelAttack(NamedTuple):
    """Where one pixel was enough."""

    rate: Tensor
    """P_attack, float64 (H, W): share of the images counted that the pixel breaks; NaN outside of
    the window, and everywhere if no image counts."""
    broken: Tensor
    """bool (B, h, w): which image each pixel of the window breaks."""
    counted: Tensor
    """bool (B,): images that were right (or all of them, by `criterion`)."""


def pixel_attack_rate(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    value: float = 1.0,
    criterion: Literal["wrong", "changed"] = "wrong",
    window: int | None = None,
    seed: int | Tensor = 0,
    batch_size: int = 256,
) -> PixelAttack:
    """P_attack of S0 Fig. 2: set one pixel at a time to white, count the images that it breaks.

    Args:
        model: Gives logits.
        x: Images, (B, C, H, W), in [0, 1].
        y: Labels, (B,).
        value: What all channels of the pixel become: 1 is white.
        criterion: `"wrong"` counts images that were right and become wrong; `"changed"` counts all
            images, broken if the prediction differs from the one without the pixel.
        window: Side of the square in the middle of the image that is tried; all pixels by default.
            For large images: 224×224 pixels are 50 176 forward passes per image.
        seed: Integer, or one key per sample; all variants of an image meet the same draw.
        batch_size: Variants per forward pass.

    Returns:
        See `PixelAttack`.

    Raises:
        RangeError: A value outside [0, 1], an unknown criterion, or a window that does not fit.
        ShapeError, DtypeError, DeviceError: On bad arguments.

    Cost: 1 + H·W forward passes per image (1 + window² with a window).

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> pixel_attack_rate(model, torch.rand(4, 3, 2, 2), torch.arange(4) % 3).rate.shape
        torch.Size([2, 2])

    References:
        ACE (anonymous ICLR 2019 submission), §3.1 and Fig. 2.

    Deviations:
        S0 averages over all test images; those that are wrong to begin with say nothing about a
        pixel, so the default leaves them out (`criterion="changed"` keeps them).
    """
    check(x, y, batch_size)
    height, width = x.shape[-2:]
    if not 0 <= value <= 1:
        raise RangeError(f"value is {value}; expected 0 (black) to 1 (white)")
    if criterion not in ("wrong", "changed"):
        raise RangeError(f"criterion is {criterion!r}; expected 'wrong' or 'changed'")
    if window is not None and not 1 <= window <= min(height, width):
        raise RangeError(f"window is {window}; expected 1 to {min(height, width)}, the short side")
    keys = sample_keys(seed, x)
    clean = logits_of(model, x, keys, batch_size)
    rows = height if window is None else window
    columns = width if window is None else window
    # An even corner, so that the window's grid has the image's own phase.
    top, left = (height - rows) // 2 // 2 * 2, (width - columns) // 2 // 2 * 2

    def whiten(images: Tensor, number: Tensor) -> Tensor:
        place = (top + number // columns) * width + left + number % columns
        flat = images.flatten(2)
        where = place[:, None, None].expand(-1, flat.shape[1], 1)
        return flat.scatter(2, where, value).view_as(images)

    found = predict_variants(model, x, keys, rows * columns, whiten, batch_size)
    if criterion == "wrong":
        counted = ~adversarial(clean, y)
        broken = (found != y[:, None]) & counted[:, None]
    else:
        counted = torch.ones(len(x), dtype=torch.bool, device=x.device)
        broken = found != clean.argmax(1)[:, None]
    rate = torch.full((height, width), torch.nan, dtype=torch.float64, device=x.device)
    inside = (broken.double().sum(0) / counted.sum()).view(rows, columns)
    rate[top : top + rows, left : left + columns] = inside
    return PixelAttack(rate, broken.view(len(x), rows, columns), counted)
