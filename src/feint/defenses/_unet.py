"""The UNet of ACE and PRM: an autoencoder whose first layer reads a part of the pixels only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feint.core.errors import ConfigError, RangeError

__all__ = ["CHECKERBOARD", "UNet", "tile_mask"]

CHECKERBOARD = ((1, 0), (0, 0))
"""The pixels (even row, even column), which a 1×1 convolution with stride 2 reads."""


def tile_mask(tile: Sequence[Sequence[int]], height: int, width: int) -> Tensor:
    """A tile of zeros and ones, repeated from the upper left: bool, (1, 1, height, width)."""
    small = torch.tensor(tile, dtype=torch.bool)
    rows, columns = torch.arange(height) % small.shape[0], torch.arange(width) % small.shape[1]
    return small[rows][:, columns][None, None]


class _Double(nn.Module):
    """Two 3×3 convolutions, each with a ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))))


class _Up(nn.Module):
    """Upsample by a transposed convolution, join the encoder's features, two convolutions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.raise_ = nn.ConvTranspose2d(inputs, outputs, 2, stride=2)
        self.convs = _Double(2 * outputs, outputs)

    def forward(self, x: Tensor, skipped: Tensor) -> Tensor:
        y: Tensor = self.convs(torch.cat([self.raise_(x), skipped], 1))
        return y


class UNet(nn.Module):
    """Sparse first layer with stride 2, `depth` levels of `width·2^i` channels, linear output.

    Args:
        width: Channels of the first level; 64 in the papers.
        depth: Levels; 5 in the papers.
        mask: A tile of zeros and ones, repeated over the image: the pixels that the first layer
            reads. The default is ACE's, read by a 1×1 convolution; others are read by a 2×2
            convolution over the image with the other pixels set to 0 (the mean color).

    Convention:
        Any size from 2^depth pixels: others than multiples of it are extended at the right and at
        the bottom by their border, and the output is cropped.

    Raises:
        RangeError: A width or depth below 1.
        ConfigError: A mask that is no tile of zeros and ones, or all zeros.
    """

    def __init__(
        self,
        width: int = 64,
        depth: int = 5,
        mask: Sequence[Sequence[int]] = CHECKERBOARD,
    ) -> None:
        super().__init__()
        if width < 1 or depth < 1:
            raise RangeError(f"width, depth are {width}, {depth}; expected whole numbers from 1")
        self.mask = _tile(mask)
        self.stride = 2**depth
        sparse = self.mask == CHECKERBOARD
        self.first = nn.Conv2d(3, 3, 1 if sparse else 2, stride=2)
        sizes = [width * 2**i for i in range(depth)]
        self.down = nn.ModuleList(
            _Double(a, b) for a, b in zip([3, *sizes[:-1]], sizes, strict=True)
        )
        self.up = nn.ModuleList(_Up(b, a) for a, b in zip(sizes[-2::-1], sizes[:0:-1], strict=True))
        self.last = nn.ConvTranspose2d(width, 3, 3, stride=2, padding=1, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct a batch (B, 3, H, W) in normalised space."""
        height, width = x.shape[-2:]
        below, right = -height % self.stride, -width % self.stride
        if self.mask != CHECKERBOARD:
            x = x * tile_mask(self.mask, height, width).to(x)
        if below or right:
            x = F.pad(x, (0, right, 0, below), mode="replicate")
        x = self.first(x)
        kept: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            kept.append(x)
        for block, skipped in zip(self.up, kept[-2::-1], strict=True):
            x = block(x, skipped)
        result: Tensor = self.last(x)[..., :height, :width]
        return result


def _tile(mask: object) -> tuple[tuple[int, ...], ...]:
    what = "expected a tile of zeros and ones such as [[1, 0], [0, 0]], not all zeros"
    if not isinstance(mask, list | tuple) or not mask:
        raise ConfigError(f"mask is {mask!r}; {what}")
    rows = [tuple(row) if isinstance(row, list | tuple) else () for row in mask]
    values = [value for row in rows for value in row]
    if not rows[0] or len({len(row) for row in rows}) > 1:
        raise ConfigError(f"mask is {mask!r}, with rows of different or no length; {what}")
    if any(value not in (0, 1) for value in values) or not any(values):
        raise ConfigError(f"mask is {mask!r}; {what}")
    return tuple(tuple(int(value) for value in row) for row in rows)
