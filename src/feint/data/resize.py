"""Resizing as data preparation, before any attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from feint.core.errors import ConfigError, RangeError

__all__ = ["Fit", "Mode", "Resize"]

Mode = Literal["bilinear", "nearest"]
Fit = Literal["stretch", "crop"]


@dataclass(frozen=True)
class Resize:
    """How images are brought to side × side, before the 8-bit values are fixed.

    Args:
        side: Height and width afterwards, in pixels.
        mode: `"bilinear"` is antialiased, as Pillow's; `"nearest"` takes the pixel under the
            center, as Pillow's default was before version 7 (S1's images were probably resized so).
        fit: `"stretch"` ignores the aspect ratio; `"crop"` scales the shorter side and then cuts
            out the center.

    Convention:
        The result is rounded to 8 bits, half to even: a dataset holds 8-bit images throughout.
        This is data preparation, which happens before any attack. A size that a *network* needs
        belongs inside the model (`feint.models.Resized`), where the attacker sees it.
    """

    side: int
    mode: Mode = "bilinear"
    fit: Fit = "stretch"

    def __post_init__(self) -> None:
        if isinstance(self.side, bool) or not isinstance(self.side, int) or self.side < 1:
            raise RangeError(f"resize is {self.side!r}; expected a side of at least 1 pixel")
        if self.mode not in ("bilinear", "nearest"):
            raise ConfigError(f"mode is {self.mode!r}; expected 'bilinear' or 'nearest'")
        if self.fit not in ("stretch", "crop"):
            raise ConfigError(f"fit is {self.fit!r}; expected 'stretch' or 'crop'")

    def __call__(self, image: Tensor) -> Tensor:
        """One uint8 image (3, H, W), resized."""
        height, width = image.shape[-2:]
        short = min(height, width)
        crop = self.fit == "crop"
        rows = round(height * self.side / short) if crop else self.side
        columns = round(width * self.side / short) if crop else self.side
        if (rows, columns) != (height, width):
            wide = image[None].float()
            if self.mode == "nearest":
                wide = F.interpolate(wide, (rows, columns), mode="nearest-exact")
            else:
                wide = F.interpolate(wide, (rows, columns), mode="bilinear", antialias=True)
            image = wide[0].round().clamp(0, 255).to(torch.uint8)
        top, left = (rows - self.side) // 2, (columns - self.side) // 2
        return image[:, top : top + self.side, left : left + self.side]

    def __str__(self) -> str:
        how = "antialiased bilinear" if self.mode == "bilinear" else "nearest pixel"
        fit = "aspect ratio ignored" if self.fit == "stretch" else "center crop"
        return f"resized to {self.side}×{self.side} ({how}, {fit}), rounded to 8 bits"
