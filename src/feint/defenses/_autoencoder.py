"""MagNet's autoencoder: convolutions with sigmoids, pooled in the middle if that is wanted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feint.core.errors import ConfigError

__all__ = ["Autoencoder"]

Layers = Sequence[int | str]

POOLS = ("max", "average")


class Autoencoder(nn.Module):
    """Images to images in [0, 1]: 3×3 convolutions, each followed by a sigmoid.

    Args:
        layers: The encoder's: a number is a convolution with so many channels, `"max"` or
            `"average"` a 2×2 pooling. The decoder is its mirror image, with nearest-neighbor
            upsampling, and ends in a convolution to the image's channels.
        channels: Of the images.

    Raises:
        ConfigError: Something else among the layers, or no convolution.
    """

    def __init__(self, layers: Layers = (32,), channels: int = 3) -> None:
        super().__init__()
        bad = [v for v in layers if v not in POOLS and (type(v) is not int or v < 1)]
        sizes = [v for v in layers if isinstance(v, int)]
        if bad or not sizes or isinstance(layers, str):
            raise ConfigError(
                f"layers is {layers!r}; expected numbers of channels, 'max' and 'average', with at "
                "least one number, such as [32] or [3, 'average', 3]"
            )
        if type(channels) is not int or channels < 1:
            raise ConfigError(f"channels is {channels!r}; expected a whole number from 1")
        self.layers = tuple(layers)
        wide = [channels, *sizes, *reversed(sizes)]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in zip(wide, [*wide[1:], channels], strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct a batch (B, channels, H, W) of any size."""
        convs, sizes = iter(self.convs), []
        for layer in self.layers:
            if layer == "max":
                sizes.append(x.shape[-2:])
                x = F.max_pool2d(x, 2, ceil_mode=True)
            elif layer == "average":
                sizes.append(x.shape[-2:])
                x = F.avg_pool2d(x, 2, ceil_mode=True)
            else:
                x = torch.sigmoid(next(convs)(x))
        for layer in reversed(self.layers):
            if isinstance(layer, str):
                # Half of an odd side is rounded up: doubled, it is a row too long.
                height, width = sizes.pop()
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., :height, :width]
            else:
                x = torch.sigmoid(next(convs)(x))
        return torch.sigmoid(next(convs)(x))
