"""The papers' transformations as their descriptions read: one image, loops over pixels or blocks.

Written for comparison of speed, from the papers' text: no batch, no tensors, numpy's own generator.
Every function takes an image (H, W, 3), float64 in [0, 1], and returns one.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import fft

Picture = NDArray[np.float64]
RNG = np.random.default_rng(0)


def pixel_deflection(image: Picture, moves: int = 200, window: int = 10) -> Picture:
    """Move by move, S2's Algorithm 1 without a map."""
    out = image.copy()
    height, width, channels = out.shape
    while moves > 0:
        for c in range(channels):
            row, column = RNG.integers(0, height), RNG.integers(0, width)
            while True:
                a, b = RNG.integers(-window, window + 1, 2)
                if 0 < row + a < height and 0 < column + b < width:
                    break
            out[row, column, c] = out[row + a, column + b, c]
            moves -= 1
    return out


def fd(image: Picture) -> Picture:
    """Block by block and channel by channel: DCT, quantise, inverse DCT; crop as S1's code does."""
    height, width, channels = image.shape
    pads = [(-n % 8) for n in (height, width)]
    before = [p // 2 for p in pads]
    sides = [(b, p - b) for b, p in zip(before, pads, strict=True)]
    canvas = np.pad(image * 255, [*sides, (0, 0)], mode="reflect")
    table = np.full((8, 8), 30.0)
    table[:4, :4] = 25.0
    for c in range(channels):
        for i in range(0, canvas.shape[0], 8):
            for j in range(0, canvas.shape[1], 8):
                block = fft.dctn(canvas[i : i + 8, j : j + 8, c], norm="ortho")
                block = np.round(block / table) * table
                canvas[i : i + 8, j : j + 8, c] = fft.idctn(block, norm="ortho")
    return np.clip(canvas / 255, 0, 1)[:height, :width]


def _strips(n: int, delta: float, strips: int = 10) -> NDArray[np.int64]:
    width, line, start = n // strips, np.zeros(n), 0.0
    for first in range(0, n, width):
        end = min(first + width, n)
        stop = start + width * (1 + RNG.uniform(-delta, delta)) if end - first == width else n
        line[first:end] = np.linspace(start, stop, end - first)
        start = stop
    return np.clip(np.round(line), 0, n - 1).astype(np.int64)


def rdg(image: Picture, delta: float = 0.25) -> Picture:
    """Pixel by pixel, S1's Algorithm 1."""
    height, width, _ = image.shape
    rows, columns = _strips(height, delta), _strips(width, delta)
    out = np.empty_like(image)
    for i in range(height):
        for j in range(width):
            out[i, j] = image[rows[i], columns[j]]
    return out


def rdg_remap(image: Picture, delta: float = 0.25) -> Picture:
    """The same with OpenCV's remap, as S1's code has it."""
    import cv2

    rows, columns = (_strips(n, delta).astype(np.float32) for n in image.shape[:2])
    x, y = np.meshgrid(columns, rows)
    return cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


def rand(image: Picture) -> Picture:
    """Resize, place on a canvas, resize back with scikit-image, as S1's code has it."""
    from skimage.transform import resize

    n = image.shape[0]
    board = -(-400 * n // 299)
    side = int(RNG.integers(n, max(n + 1, 399 * n // 299)))
    top, left = RNG.integers(0, board - side + 1, 2)
    canvas = np.full((board, board, 3), 0.5)
    canvas[top : top + side, left : left + side] = resize(image, (side, side), order=1)
    return resize(canvas, image.shape[:2], order=1)


def wavelet(image: Picture) -> Picture:
    """scikit-image's function, which S2 calls (today's, whose σ is rescaled)."""
    from skimage.restoration import denoise_wavelet

    return denoise_wavelet(
        image,
        sigma=0.04,
        wavelet="db1",
        method="BayesShrink",
        mode="soft",
        convert2ycbcr=True,
        rescale_sigma=True,
        channel_axis=-1,
    )


def jpeg(image: Picture, quality: int = 75) -> Picture:
    """Pillow's codec."""
    buffer = io.BytesIO()
    Image.fromarray((image * 255).round().astype(np.uint8)).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer)) / 255.0


def shield(image: Picture) -> Picture:
    """Four qualities, and one of them for every 8×8 block, block by block."""
    versions = [jpeg(image, q) for q in (20, 40, 60, 80)]
    out = np.empty_like(image)
    for i in range(0, image.shape[0], 8):
        for j in range(0, image.shape[1], 8):
            out[i : i + 8, j : j + 8] = versions[RNG.integers(4)][i : i + 8, j : j + 8]
    return out


def bit_depth(image: Picture) -> Picture:
    """Three bits."""
    return np.round(image * 7) / 7


def tv_bregman(image: Picture) -> Picture:
    """scikit-image's split Bregman, with a mask of dropped pixels taken from the image before."""
    from skimage.restoration import denoise_tv_bregman

    kept = RNG.random(image.shape[:2]) < 0.5
    return denoise_tv_bregman(image * kept[..., None], weight=2 / 0.03, channel_axis=-1)
