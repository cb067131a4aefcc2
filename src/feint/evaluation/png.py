"""Images through a PNG file and back: what an attacker who must hand in a file really hands in."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from feint.core.quantise import from_uint8, to_uint8

__all__ = ["png_round_trip"]


def png_round_trip(x: Tensor) -> Tensor:
    """Images as they come back from PNG files, in memory, one for each image.

    PNG keeps 8-bit values as they are, so that this is the rounding to 8 bits and nothing else, as
    long as writer and reader do what they should: the evaluation checks rather than assumes it.

    Convention:
        One channel is written as gray, three as RGB; any other number as gray files, one per
        channel.

    Args:
        x: Images, (B, C, H, W), in [0, 1]; rounded to the nearest 8-bit value.

    Returns:
        Images in the dtype and on the device of `x`.

    Example:
        >>> x = torch.rand(2, 3, 4, 4)
        >>> float((png_round_trip(x) - x).abs().max()) <= 0.5 / 255 + 1e-6
        True
    """
    values = to_uint8(x).cpu()
    wide = values if values.shape[1] in (1, 3) else values.flatten(0, 1)[:, None]
    back = [_through(image.permute(1, 2, 0).numpy()) for image in wide]
    read = torch.from_numpy(np.stack(back)) if back else wide.permute(0, 2, 3, 1)
    return from_uint8(read.permute(0, 3, 1, 2).reshape(values.shape), x.dtype).to(x.device)


def _through(pixels: np.ndarray) -> np.ndarray:
    """One image, (H, W, 1 or 3), written and read."""
    file = io.BytesIO()
    mode = "L" if pixels.shape[2] == 1 else "RGB"
    data = np.ascontiguousarray(pixels[..., 0] if mode == "L" else pixels)
    Image.fromarray(data).save(file, "png", compress_level=1)
    file.seek(0)
    with Image.open(file) as image:
        read = np.asarray(image.convert(mode))
    return read.reshape(pixels.shape)
