"""DUNET: a UNet that predicts the noise in an image, and leaves the image to its caller."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feint.core.errors import RangeError

__all__ = ["DUNet"]


class _Convs(nn.Sequential):
    """3×3 convolutions, each with batch normalisation and a ReLU; the first has the stride."""

    def __init__(self, channels: list[int], stride: int = 1) -> None:
        layers: list[nn.Module] = []
        for place, (inputs, outputs) in enumerate(itertools.pairwise(channels)):
            step = 1 if place else stride
            conv = nn.Conv2d(inputs, outputs, 3, stride=step, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*layers)


class DUNet(nn.Module):
    """Noise of an image, by convolutions at several scales joined by bilinear upsampling.

    Down: two convolutions at full size, then three at every halved size. Up: the smaller features
    are upsampled to the size of the larger ones and joined with them; three convolutions, two at
    full size. A 1×1 convolution gives the noise.

    Args:
        width: Channels at full size; they double with each scale up to four times.
        levels: Scales, from 2. With width 64 and 5 levels it is the paper's.

    Raises:
        RangeError: A width below 1, or fewer levels than 2.
    """

    def __init__(self, width: int = 64, levels: int = 5) -> None:
        super().__init__()
        if width < 1 or levels < 2:
            raise RangeError(f"width, levels are {width}, {levels}; expected at least 1 and 2")
        sizes = [width * min(2**i, 4) for i in range(levels)]
        self.first = _Convs([3, width, width])
        self.down = nn.ModuleList(_Convs([a, b, b, b], 2) for a, b in itertools.pairwise(sizes))
        self.up = nn.ModuleList(
            _Convs([below + own] + [own] * (3 if level else 2))
            for level, (own, below) in reversed(list(enumerate(itertools.pairwise(sizes))))
        )
        self.last = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The noise in a batch (B, 3, H, W) of normalised images of any size."""
        kept = [self.first(x)]
        for block in self.down:
            kept.append(block(kept[-1]))
        x = kept.pop()
        for block, skipped in zip(self.up, reversed(kept), strict=True):
            size = skipped.shape[-2:]
            x = F.interpolate(x, (size[0], size[1]), mode="bilinear", align_corners=False)
            x = block(torch.cat([x, skipped], 1))
        result: Tensor = self.last(x)
        return result
