"""SegNet as an autoencoder: VGG's convolutions, pooling whose indices the decoder unpools with."""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from feint.core.errors import RangeError

__all__ = ["SegNet"]

LAYERS = (2, 2, 3, 3, 3)
"""Convolutions per stage in VGG-16."""


class _Stage(nn.Sequential):
    """3×3 convolutions, each with batch normalisation and a ReLU."""

    def __init__(self, channels: list[int]) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(channels):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*layers)


class Encoder(nn.Module):
    """Stages with 2×2 max-pooling after each."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            _Stage([before] + [size] * LAYERS[i])
            for i, (before, size) in enumerate(zip([3, *sizes[:-1]], sizes, strict=True))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[list[int]]]:
        """Features, and per stage the places of the maxima and the size before pooling."""
        places, shapes = [], []
        for stage in self.stages:
            x = stage(x)
            shapes.append(list(x.shape))
            x, place = F.max_pool2d(x, 2, return_indices=True)
            places.append(place)
        return x, places, shapes


class Decoder(nn.Module):
    """The encoder's mirror image: unpooling to the places of the maxima, then convolutions."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            _Stage([size] * LAYERS[i] + [after])
            for i, (after, size) in reversed(
                list(enumerate(zip([sizes[0], *sizes[:-1]], sizes, strict=True)))
            )
        )
        self.last = nn.Conv2d(sizes[0], 3, 1)

    def forward(self, x: Tensor, places: list[Tensor], shapes: list[list[int]]) -> Tensor:
        """The image that the features describe."""
        for stage, place, shape in zip(self.stages, places[::-1], shapes[::-1], strict=True):
            x = stage(F.max_unpool2d(x, place, [2, 2], output_size=shape))
        result: Tensor = self.last(x)
        return result


class SegNet(nn.Module):
    """Autoencoder on normalised images of any size from 2^stages pixels.

    Args:
        width: Channels of the first stage; they double with each stage up to eight times.
        stages: 1 to 5. With width 64 and 5 stages its encoder is VGG-16's with batch
            normalisation.

    Raises:
        RangeError: Otherwise.
    """

    def __init__(self, width: int = 64, stages: int = 5) -> None:
        super().__init__()
        if width < 1:
            raise RangeError(f"width is {width}; expected a whole number from 1")
        if not 1 <= stages <= len(LAYERS):
            raise RangeError(f"stages is {stages}; expected 1 to {len(LAYERS)}")
        sizes = [width * min(2**i, 8) for i in range(stages)]
        self.stride = 2**stages
        self.encode, self.decode = Encoder(sizes), Decoder(sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct a batch (B, 3, H, W)."""
        result: Tensor = self.decode(*self.encode(x))
        return result
