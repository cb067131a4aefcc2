"""JPEG compression: Pillow's codec forward, a differentiable one for the attacker's view."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import BinaryIO, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor, nn

from feint.core.dct import block_dct, block_idct, soft_round
from feint.core.errors import ConfigError, RangeError, ShapeError
from feint.core.pieces import fresh_like
from feint.core.quantise import Rounding, from_uint8, to_uint8, to_uint8_numpy
from feint.core.registry import defense
from feint.defenses.base import Defense, Params, backward_rule

__all__ = ["JPEG", "Subsampling", "pillow_jpeg", "quantisation_tables", "tensor_jpeg"]

Subsampling = Literal["4:4:4", "4:2:2", "4:2:0"]
_FACTORS: dict[str, tuple[int, int]] = {"4:4:4": (1, 1), "4:2:2": (1, 2), "4:2:0": (2, 2)}

# Annex K of the JPEG standard (ITU-T T.81), tables K.1 and K.2.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
_THREADED = 3 * 64 * 64  # values in an image from which on threads pay; smaller ones go together
_FROM_RGB = (  # JFIF: full range, without the offset of 128 for Cb and Cr
    (0.299, 0.587, 0.114),
    (-0.168735892, -0.331264108, 0.5),
    (0.5, -0.418687589, -0.081312411),
)
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136286, -0.714136286), (1.0, 1.772, 0.0))


@defense(
    "jpeg",
    paper="Dziugaite, Ghahramani, Roy, 2016, arXiv:1608.00853",
    presets={"qiu": {"quality": 75, "rounding": "truncate"}},
)
class JPEG(Defense):
    """JPEG compression and decompression, bit by bit that of Pillow (libjpeg-turbo).

    Claim: it removes small perturbations (Guo et al. 2018, quality 75). Known break: BPDA leaves
    0 % (Athalye et al. 2018; Shin & Song 2017 through a differentiable codec).

    Backward rules:
        `identity`: the image itself. `surrogate`, the default: the codec in tensors with cubic
        rounding of the coefficients; without the rounding to 8 bits and without the clipping at
        the end, which would hide the gradient of white and black areas.

    Args:
        preset: `"qiu"` is S1's own code: 8-bit values by truncation, quality 75.
        quality: 1 to 100, as libjpeg scales it.
        subsampling: Of the chroma: `"4:2:0"` (Pillow's default) keeps one value of 2×2, `"4:2:2"`
            one of two neighbours in a row, `"4:4:4"` all.
        rounding: How values become 8-bit before the codec, see `feint.core.quantise`.

    Convention:
        One channel (gray) or three (RGB), any size ≥ 1. The result has 8-bit levels. The codec
        runs on the CPU, on at most `torch.get_num_threads()` threads; images on another device
        travel there and back.

    Raises:
        RangeError: If `quality` is not 1 to 100.
        ConfigError: If `subsampling` is unknown.
        ShapeError: If there are neither one nor three channels.

    Cost: One run of libjpeg per image, spread over the threads: 1.4 to 2.8 % of the time of a
        ResNet-50 forward pass at 224 and 299 px, 6 % at 32 px. In batches of 64 on two threads that
        is 2.2 times as fast as ART at 299 px, 1.5 times at 224 px and no faster at 32 px
        (`benchmarks/results/defenses.md`): libjpeg itself takes most of it, and around small images
        Pillow's Python code. The surrogate's forward and backward pass take about six times as
        long.

    Example:
        >>> import torch
        >>> JPEG(quality=50)(torch.full((1, 3, 16, 16), 0.5)).unique() * 255
        tensor([128.])

    References:
        Dziugaite, Ghahramani, Roy, "A study of the effect of JPG compression on adversarial
        images", 2016. Guo, Rana, Cissé, van der Maaten, ICLR 2018. ITU-T T.81. Shin, Song,
        "JPEG-resistant adversarial images", 2017.
    """

    differentiable: ClassVar[bool] = False
    stochastic: ClassVar[bool] = False

    def __init__(
        self,
        *,
        preset: str | None = None,
        quality: int = 75,
        subsampling: Subsampling = "4:2:0",
        rounding: Rounding = "nearest",
    ) -> None:
        super().__init__()
        if type(quality) is not int or not 1 <= quality <= 100:
            raise RangeError(f"quality is {quality!r}; expected a whole number, 1 to 100")
        if subsampling not in _FACTORS:
            raise ConfigError(f"subsampling is {subsampling!r}; expected {', '.join(_FACTORS)}")
        to_uint8(torch.zeros(0), rounding)  # raises if it is unknown
        self.quality, self.subsampling, self.rounding = quality, subsampling, rounding

    def transform(self, x: Tensor, params: Params) -> Tensor:
        """Through Pillow's codec."""
        return pillow_jpeg(x, self.quality, self.subsampling, self.rounding)

    @backward_rule("identity")
    def identity(self, x: Tensor, params: Params) -> Tensor:
        """The image itself."""
        return x

    @backward_rule("surrogate")
    def surrogate(self, x: Tensor, params: Params) -> Tensor:
        """The codec in tensors, with cubic rounding."""
        return tensor_jpeg(x, self.quality, self.subsampling)


def pillow_jpeg(
    x: Tensor,
    quality: int | Tensor = 75,
    subsampling: Subsampling = "4:2:0",
    rounding: Rounding = "nearest",
) -> Tensor:
    """`x` through Pillow's JPEG codec, image by image on a pool of threads.

    Args:
        x: (B, 1 or 3, H, W) in [0, 1].
        quality: One for all, or one per image (B,).
        subsampling: See `JPEG`.
        rounding: See `JPEG`.

    Returns:
        8-bit levels in the dtype and on the device of `x`; no gradient.
    """
    _check_channels(x)
    if x.numel() == 0:
        return torch.zeros_like(x)
    x = x.detach()
    here = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    # On the CPU a few images at a time are converted, while they are in the cache, by numpy, since
    # torch would start threads within ours. Otherwise bytes travel in one piece.
    source = x.numpy() if here else to_uint8(x, rounding).cpu().numpy()
    out = fresh_like(x) if here else torch.empty(x.shape, dtype=torch.uint8)
    result = out.numpy()
    each = quality.tolist() if isinstance(quality, Tensor) else [quality] * len(x)
    step = max(_THREADED // x[0].numel(), 1)

    def code(begin: int, file: BinaryIO) -> None:
        some = slice(begin, begin + step)
        planes = to_uint8_numpy(source[some], rounding) if here else source[some]
        back = np.empty_like(planes) if here else result[some]
        for picture, coded, q in zip(planes, back, each[some], strict=True):
            channels = [Image.fromarray(plane) for plane in picture]
            image = channels[0] if len(channels) == 1 else Image.merge("RGB", channels)
            file.seek(0)
            image.save(file, "JPEG", quality=q, subsampling=subsampling)
            size = file.tell()  # beyond it may be the end of a larger one
            file.seek(0)
            with JpegImageFile(io.BytesIO(file.read(size))) as decoded:
                values = np.asarray(decoded)
            for k, plane in enumerate(coded):
                plane[...] = values if len(coded) == 1 else values[..., k]
        if here:
            np.divide(back, result.dtype.type(255), out=result[some])

    def code_all(starts: range) -> None:
        with _memory_file(workers > 1) as file:
            for begin in starts:
                code(begin, file)

    # Pillow frees the interpreter lock while it codes; for small images that is too short to help.
    enough = x[0].numel() >= _THREADED
    workers = min(len(x), torch.get_num_threads()) if enough else 1
    if workers > 1:
        shares = [range(k, len(x), workers) for k in range(workers)]
        list(_pool(workers, os.getpid()).map(code_all, shares))
    else:
        code_all(range(0, len(x), step))
    return out if here else from_uint8(out.to(x.device), x.dtype)


def _memory_file(shared: bool) -> BinaryIO:
    """A file in memory; for threads beside others with a descriptor, where there is such a thing.

    Only into a descriptor does Pillow encode without holding the interpreter lock.
    """
    if shared and hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("feint-jpeg"), "r+b", buffering=0)
    return io.BytesIO()


@lru_cache(maxsize=1)
def _pool(workers: int, process: int) -> ThreadPoolExecutor:
    """One pool per process: threads do not survive a fork."""
    return ThreadPoolExecutor(workers, thread_name_prefix="feint-jpeg")


def quantisation_tables(quality: int | Tensor) -> Tensor:
    """Luminance and chrominance tables, (…, 2, 8, 8) int64, by libjpeg's rule.

    Args:
        quality: 1 to 100; a tensor (B,) gives one pair of tables per image.

    Example:
        >>> quantisation_tables(50)[0, 0, :4]
        tensor([16, 11, 10, 16])
    """
    q = torch.as_tensor(quality, dtype=torch.int64)
    scale = torch.where(q < 50, 5000 // q.clamp_min(1), 200 - 2 * q)[..., None, None, None]
    base = torch.tensor((_LUMINANCE, _CHROMINANCE), device=q.device)
    return ((base * scale + 50) // 100).clamp(1, 255)


def tensor_jpeg(
    x: Tensor,
    quality: int | Tensor = 75,
    subsampling: Subsampling = "4:2:0",
    round_: Callable[[Tensor], Tensor] = soft_round,
    levels: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The JPEG codec in tensor operations, differentiable if `round_` is.

    RGB to YCbCr, chroma averaged over its cells, sides padded to whole blocks by repeating the
    border, 8×8 DCT, quantisation, and back, the chroma spread by libjpeg's triangle filter.

    Args:
        x: (B, 1 or 3, H, W) in [0, 1].
        quality: One for all, or one per image (B,).
        subsampling: See `JPEG`.
        round_: Rounds the quantised coefficients.
        levels: Brings the planes between the steps (in 0…255) to 8-bit values, as libjpeg does;
            by default they are left as they are.

    Returns:
        Values around [0, 1]; without `levels` neither rounded to 8 bits nor clipped.
    """
    _check_channels(x)
    if x.numel() == 0:
        return x.clone()
    tables = quantisation_tables(quality).to(x.device, x.dtype)[..., None, :, :]
    clean = levels or _unchanged

    def coded(planes: Tensor, table: Tensor) -> Tensor:
        """DCT, quantise, inverse DCT of planes around 128."""
        padded = _padded(planes - 128, 8, 8)
        wide = table.repeat(*[1] * (table.ndim - 2), *(n // 8 for n in padded.shape[-2:]))
        back = block_idct(round_(block_dct(padded) / wide) * wide)
        return clean(back[..., : planes.shape[-2], : planes.shape[-1]] + 128)

    luma_table, chroma_table = tables.unbind(-4)
    if x.shape[1] == 1:
        return coded(x * 255, luma_table) / 255
    height, width = x.shape[-2:]
    down, across = _FACTORS[subsampling]
    middle = x.new_tensor((0.0, 128.0, 128.0))[:, None, None]
    ycc = clean(torch.einsum("ij,bjhw->bihw", x.new_tensor(_FROM_RGB), x * 255) + middle)
    luma, chroma = ycc[:, :1], ycc[:, 1:]
    if (down, across) != (1, 1):
        cells = _padded(chroma, down, across)
        small = clean(nn.functional.avg_pool2d(cells, (down, across)))
        spread = nn.functional.interpolate(
            coded(small, chroma_table), cells.shape[-2:], mode="bilinear", align_corners=False
        )
        chroma = clean(spread)[..., :height, :width]
    else:
        chroma = coded(chroma, chroma_table)
    ycc = torch.cat([coded(luma, luma_table), chroma], 1) - middle
    return clean(torch.einsum("ij,bjhw->bihw", x.new_tensor(_TO_RGB), ycc)) / 255


def _unchanged(planes: Tensor) -> Tensor:
    return planes


def _padded(x: Tensor, down: int, across: int) -> Tensor:
    """`x` with the last row and column repeated up to multiples of `down` and `across`."""
    height, width = x.shape[-2:]
    return nn.functional.pad(x, (0, -width % across, 0, -height % down), mode="replicate")


def _check_channels(x: Tensor) -> None:
    if x.shape[1] not in (1, 3):
        raise ShapeError(f"x has shape {tuple(x.shape)}; expected 1 (gray) or 3 (RGB) channels")
