"""Resizing lives inside the model: images of any size in, the network's own size within."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from feint.core.errors import ConfigError, RangeError
from feint.core.gradients import is_stochastic, takes_keys

__all__ = ["Resized"]

Mode = Literal["bilinear", "nearest"]


class Resized(nn.Module):
    """`net(resize(x))`: the network's input size, where an attacker differentiates through it.

    Budgets are then measured on the images as given, not on what the network sees of them. Images
    that already have the size pass unchanged.

    Args:
        net: A model on images of the given size; if its forward takes `keys`, so does this one's.
        side: Height and width, or (height, width), in pixels.
        mode: `"bilinear"` is antialiased, as Pillow's; `"nearest"` takes the pixel under the
            center.

    Raises:
        RangeError: The side is below 1.
        ConfigError: No such mode.

    Cost:
        The network's, plus an interpolation of about a thousandth of a ResNet-50.

    Example:
        >>> import torch
        >>> model = Resized(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), 2)
        >>> model(torch.rand(1, 3, 5, 7)).shape
        torch.Size([1, 2])
    """

    def __new__(cls, net: nn.Module | None = None, *_: Any, **__: Any) -> Resized:
        """One class whose forward takes keys, one whose does not: the signature tells attacks."""
        keyed = cls is Resized and net is not None and takes_keys(net)
        return super().__new__(_KeyedResized if keyed else cls)

    def __init__(
        self, net: nn.Module, side: int | tuple[int, int], mode: Mode = "bilinear"
    ) -> None:
        super().__init__()
        size = (side, side) if isinstance(side, int) else tuple(side)
        if len(size) != 2 or not all(isinstance(s, int) and s >= 1 for s in size):
            raise RangeError(f"side is {side!r}; expected a number of pixels from 1, or two")
        if mode not in ("bilinear", "nearest"):
            raise ConfigError(f"mode is {mode!r}; expected 'bilinear' or 'nearest'")
        self.net, self.size, self.mode = net, size, mode

    @property
    def stochastic(self) -> bool:
        """What the network declares."""
        return is_stochastic(self.net)

    def resize(self, x: Tensor) -> Tensor:
        """The images at the network's size."""
        if x.shape[-2:] == self.size:
            return x
        if self.mode == "nearest":
            return F.interpolate(x, self.size, mode="nearest-exact")
        return F.interpolate(x, self.size, mode="bilinear", antialias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images in [0, 1] of any size."""
        logits: Tensor = self.net(self.resize(x))
        return logits

    def extra_repr(self) -> str:
        """Size and mode."""
        return f"size={self.size}, mode={self.mode!r}"


class _KeyedResized(Resized):
    """`Resized` around a model whose forward takes `keys`."""

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """Logits, with the draws that `keys` name."""
        logits: Tensor = self.net(self.resize(x), keys=keys)
        return logits
