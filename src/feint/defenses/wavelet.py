"""Wavelet denoising by shrinkage of Haar coefficients, with the semantics of 2018."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist
from typing import ClassVar, Literal

import torch
from torch import Tensor

from feint.core.clip import clip
from feint.core.color import FROM_RGB
from feint.core.errors import ConfigError, RangeError, ShapeError
from feint.core.pieces import in_pieces
from feint.core.registry import defense
from feint.defenses.base import Defense, Params, backward_rule

__all__ = ["Wavelet", "haar", "haar_inverse"]

Method = Literal["bayes", "visu", "sure", "hard"]

_METHODS = ("bayes", "visu", "sure", "hard")
_EPS = 2.0**-52  # of float64, in which the original computes
_MEDIAN = NormalDist().inv_cdf(0.75)  # median size of a standard normal number
_PIECE = 1 << 20  # values at a time: fewer calls, and still in the cache


@defense("wavelet", paper="Prakash et al. 2018, CVPR, arXiv 1801.08926, §7 and §8")
class Wavelet(Defense):
    r"""Wavelet denoiser: shrink the detail coefficients of each color channel.

    The image goes to YCbCr; each channel is stretched to [0, 1] by its own minimum and maximum,
    decomposed by a Haar transform with symmetric borders, its detail sub-bands shrunk, recomposed,
    clipped to [0, 1] and put back; RGB is clipped to [0, 1]. σ is used as it stands on the
    *stretched* channels. The thresholds:

    - `bayes`: per sub-band, T = σ² / √max(mean(d²) − σ², 2⁻⁵²), soft; a sub-band weaker than the
      noise vanishes altogether.
    - `visu`: T = σ·√(2 ln N) for N pixels in the channel, soft.
    - `sure`: per sub-band of n coefficients, the |d| ≤ σ·√(2 ln n) with the least Stein risk
      n − 2·#{\|d_i\| ≤ T} + Σ min(\|d_i\|, T)²/σ², soft; σ·√(2 ln n) itself if the band is sparse,
      mean(d²/σ²) − 1 ≤ log₂(n)^1.5/√n.
    - `hard`: the threshold of `visu`, but what exceeds it is kept whole.

    Claim: behind Pixel Deflection, 98.9 % of the clean accuracy stays and 81 to 98 % of adversarial
    examples are recovered (S2, Table 4, Bayes). Known break: BPDA with the identity, or simply its
    gradient, since shrinkage is differentiable almost everywhere.

    Backward rules:
        `exact` (autograd; `hard` and the choice made by `sure` jump, but have that derivative in
        between) is the best one; `identity` is the published break's.

    Args:
        method: `"bayes"` (the paper's choice), `"visu"`, `"sure"` or `"hard"`.
        sigma: Noise level σ > 0; the paper's 0.04. None: that of each channel by itself, the median
            size of the finest diagonal coefficients that are not zero over 0.6745 (scikit-image's
            default, with which `visu` comes far nearer to S2's Table 4 than with 0.04).
        wavelet: `"db1"`, also called `"haar"`.
        levels: Depth; by default max(⌊log₂ min(H, W)⌋ − 3, 1): 2 for 32 px, 4 for 224, 5 for 299.
        color: `"ycbcr"`; or `"rgb"`: the channels as they are, neither turned nor stretched.

    Convention:
        Sides of any length; odd ones are extended by their last row or column, then cropped.

    Raises:
        ConfigError: If a name is unknown.
        RangeError: If σ ≤ 0 or `levels` < 1.
        ShapeError: If there are not three channels for YCbCr.

    Cost: O(pixels), some thirty passes over the image: in batches of 64 at 224 or 299 px `bayes`,
        `visu` and `hard` take about 2 % of the time of a ResNet-50 forward pass on the same images
        (`sure`, which sorts every sub-band, several times that). On two threads that is 6 to 8
        times as fast as scikit-image image by image at 224 and 299 px, 28 times at 32 px. The peer
        is compiled C; the first of the levels alone, in the fewest tensor operations that we know,
        would be 9 times as fast at 299 px (`benchmarks/results/defenses.md`), so 20 times would
        take a compiled kernel of our own.

    Example:
        >>> import torch
        >>> Wavelet(sigma=0.04)(torch.rand(2, 3, 37, 32)).shape
        torch.Size([2, 3, 37, 32])

    References:
        Prakash, Moran, Garber, DiLillo, Storer, "Deflecting adversarial attacks with pixel
        deflection", CVPR 2018, §7. Chang, Yu, Vetterli, "Adaptive wavelet thresholding for image
        denoising and compression", IEEE Trans. Image Processing 9, 2000 (bayes). Donoho, Johnstone,
        "Ideal spatial adaptation by wavelet shrinkage", Biometrika 81, 1994 (visu, hard), and
        "Adapting to unknown smoothness via wavelet shrinkage", JASA 90, 1995 (sure).

    Deviations:
        The original calls `denoise_wavelet` of scikit-image 0.13 or 0.14, which is what this does;
        since 0.16 that function rescales σ and gives another, with `rescale_sigma=False` hardly
        any denoising. The paper leaves the hard rule open; its own one costs 60 % of the clean
        accuracy, so it was more aggressive than this universal one. A constant channel is left as
        it is; the original divided zero by zero.
    """

    differentiable: ClassVar[bool] = True
    stochastic: ClassVar[bool] = False

    def __init__(
        self,
        *,
        method: Method = "bayes",
        sigma: float | None = 0.04,
        wavelet: Literal["db1", "haar"] = "db1",
        levels: int | None = None,
        color: Literal["ycbcr", "rgb"] = "ycbcr",
    ) -> None:
        super().__init__()
        if method not in _METHODS:
            raise ConfigError(f"method is {method!r}; expected one of {', '.join(_METHODS)}")
        if wavelet not in ("db1", "haar"):
            raise ConfigError(f"wavelet is {wavelet!r}; expected 'db1' (the same as 'haar')")
        if color not in ("ycbcr", "rgb"):
            raise ConfigError(f"color is {color!r}; expected 'ycbcr' or 'rgb'")
        if sigma is not None and not sigma > 0:
            raise RangeError(f"sigma is {sigma}; expected a noise level > 0, such as 0.04, or None")
        if levels is not None and levels < 1:
            raise RangeError(f"levels is {levels}; expected at least 1, or None")
        self.method, self.color = method, color
        self.sigma = None if sigma is None else float(sigma)
        self.wavelet, self.levels = wavelet, levels

    def transform(self, x: Tensor, params: Params) -> Tensor:
        """Denoise every channel."""
        return in_pieces(self._whole, x, values=_PIECE) if x.numel() else x

    def _whole(self, x: Tensor) -> Tensor:
        if self.color == "ycbcr" and x.shape[1] != 3:
            raise ShapeError(
                f"x has shape {tuple(x.shape)}; expected three channels for YCbCr; "
                "use color='rgb' for other images"
            )
        height, width = x.shape[-2:]
        padded = _even(x)  # repeats values, so that it moves no extremum
        if self.color == "rgb":
            ones = x.new_ones(1, 1, 1, 1)
            return _between(self._denoise(padded, ones, x.shape[-2:])[..., :height, :width] / 4)
        # What is affine in YCbCr commutes with the transform: its offset has no effect, and the
        # stretch to [0, 1] is one of the thresholds. The factor 4 of `_denoise` goes into the
        # last matrix.
        forth, back = _matrices()
        y = _mix(padded, forth)
        low, high = y.amin((2, 3), keepdim=True), y.amax((2, 3), keepdim=True)
        span = torch.where(high > low, high - low, 1.0)
        y = _between(self._denoise(y, span, x.shape[-2:]), 4 * low, 4 * high)
        return _between(_mix(y, back)[..., :height, :width])

    def _denoise(self, x: Tensor, span: Tensor, size: torch.Size) -> Tensor:
        """Decompose, shrink, recompose, times 4.

        Args:
            x: (B, C, H, W) of any range, even sides.
            span: What is to count as 1 in each channel, (B or 1, C or 1, 1, 1).
            size: Of the image before its sides were made even.
        """
        side, pixels = min(size), size[0] * size[1]
        depth = max(side.bit_length() - 1 - 3, 1) if self.levels is None else self.levels
        sizes, details = [], []
        noise: Tensor | float | None = self.sigma
        for k in range(depth):
            sizes.append(x.shape[-2:])
            x, detail = _split(_even(x))
            unit = span[..., None] * 2 ** (k + 1)
            if noise is None:
                noise = _noise(detail[:, :, 2:]) / unit
            details.append(self._shrink(detail, unit, noise, pixels))
        for k in reversed(range(depth)):
            x = _join(x, details[k])[..., : sizes[k][0], : sizes[k][1]]
            if k:
                x = _scaled(x, 0.25)
        return x

    def _shrink(self, d: Tensor, unit: Tensor, noise: Tensor | float, pixels: int) -> Tensor:
        """Threshold the sub-bands d, (B, C, 3, h, w), each by itself, in units of `unit`."""
        sigma = noise * unit
        if self.method == "hard":
            return torch.where(d.abs() > sigma * math.sqrt(2 * math.log(pixels)), d, 0.0)
        if self.method == "visu":
            return _soft(d, sigma * math.sqrt(2 * math.log(pixels)))
        if self.method == "bayes":
            norm = torch.linalg.vector_norm(d.flatten(-2), dim=-1)[..., None, None]
            signal = norm**2 / (d.shape[-2] * d.shape[-1]) - sigma**2
            return _soft(d, sigma**2 / torch.maximum(signal, _EPS * unit**2).sqrt())
        return _soft(d, sigma * _sure((d / sigma).flatten(-2))[..., None, None])

    @backward_rule("identity")
    def identity(self, x: Tensor, params: Params) -> Tensor:
        """The image itself (Athalye and Carlini's BPDA)."""
        return x


@lru_cache(maxsize=1)
def _matrices() -> tuple[Tensor, Tensor]:
    """From RGB to YCbCr without its offset, and back from four times that."""
    with torch.inference_mode(False):
        forth = torch.tensor(FROM_RGB, dtype=torch.float64)
        return forth, forth.inverse() / 4


def _in_place(x: Tensor) -> bool:
    """Whether nobody will ask for a derivative of `x`, so that memory may be used again."""
    return not x.requires_grad


def _soft(d: Tensor, threshold: Tensor) -> Tensor:
    """Toward zero by the threshold; may overwrite `d`."""
    if not _in_place(d):
        return d - torch.clamp(d, -threshold, threshold)
    kept = torch.minimum(d, threshold)
    return d.sub_(torch.maximum(kept, -threshold, out=kept))


def _between(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """`x` within bounds, [0, 1] by default; may overwrite `x`."""
    if not _in_place(x):
        if low is None or high is None:
            return clip(x)
        return torch.where(x < low, low, torch.where(x > high, high, x))
    if low is not None and high is not None:  # much faster than clamp with tensors
        torch.maximum(x, low, out=x)
        return torch.minimum(x, high, out=x)
    return x.clamp_(0, 1)


def _noise(d: Tensor) -> Tensor:
    """The standard deviation that normal coefficients of this median size have, per channel.

    Zeros do not count (flat parts of the image); where there is nothing else it is next to none.
    """
    size = d.abs().flatten(-2)
    median = torch.where(size > 0, size, math.nan).nanquantile(0.5, -1)[..., None, None]
    return (median / _MEDIAN).nan_to_num(0.0).clamp_min(_EPS)


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x.mul_(factor) if _in_place(x) else x * factor


def _mix(x: Tensor, matrix: Tensor) -> Tensor:
    """Each pixel's channels times a matrix."""
    return (matrix.to(x.device, x.dtype) @ x.flatten(2)).unflatten(2, x.shape[-2:])


def _sure(d: Tensor) -> Tensor:
    """SureShrink's threshold for coefficients with unit noise, along the last axis."""
    n = d.shape[-1]
    universal = math.sqrt(2 * math.log(n))
    size = d.abs().sort(-1).values
    square = size * size
    below = torch.arange(1, n + 1, device=d.device, dtype=d.dtype)
    risk = n - 2 * below + square.cumsum(-1) + (n - below) * square
    risk = torch.where(size <= universal, risk, math.inf)
    risk = torch.cat([torch.full_like(risk[..., :1], n), risk], -1)  # T = 0 has the risk n
    candidates = torch.cat([torch.zeros_like(size[..., :1]), size], -1)
    best = candidates.gather(-1, risk.argmin(-1, keepdim=True))[..., 0]
    sparse = square.mean(-1) - 1 <= math.log2(n) ** 1.5 / math.sqrt(n)
    return torch.where(sparse, universal, best)


def haar(x: Tensor) -> tuple[Tensor, Tensor]:
    """One level of the orthonormal 2-D Haar transform with symmetric borders.

    Args:
        x: (…, H, W).

    Returns:
        Approximation (…, ⌈H/2⌉, ⌈W/2⌉), and details (…, 3, ⌈H/2⌉, ⌈W/2⌉): differences along the
        rows' axis, along the columns' axis, along both (`da`, `ad`, `dd` of PyWavelets).

    Example:
        >>> haar(torch.ones(2, 2))[0]
        tensor([[2.]])
    """
    approximation, details = _split(_even(x))
    return approximation / 2, details / 2


def haar_inverse(approximation: Tensor, details: Tensor) -> Tensor:
    """Inverse of `haar`, (…, 2h, 2w); for an odd side the caller drops the last row or column."""
    return _join(approximation, details) / 2


def _even(x: Tensor) -> Tensor:
    """`x` with its last row and column repeated where their number is odd."""
    if x.shape[-2] % 2:
        x = torch.cat([x, x[..., -1:, :]], -2)
    if x.shape[-1] % 2:
        x = torch.cat([x, x[..., -1:]], -1)
    return x


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and differences over 2×2 squares: `haar` of even sides, times 2."""
    top, bottom = x[..., 0::2, :], x[..., 1::2, :]
    s, d = top + bottom, top - bottom
    left, right = s[..., 0::2], s[..., 1::2]
    first, second = d[..., 0::2], d[..., 1::2]
    if not _in_place(x):
        return left + right, torch.stack([first + second, left - right, first - second], -3)
    details = x.new_empty(*x.shape[:-2], 3, x.shape[-2] // 2, x.shape[-1] // 2)
    da, ad, dd = details.unbind(-3)
    torch.add(first, second, out=da)
    torch.sub(left, right, out=ad)
    torch.sub(first, second, out=dd)
    return left + right, details


def _join(approximation: Tensor, details: Tensor) -> Tensor:
    """Inverse of `_split`, times 4."""
    da, ad, dd = details.unbind(-3)
    return _weave(_weave(approximation, ad, -1), _weave(da, dd, -1), -2)


def _weave(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Sums a + b and differences a − b, alternating along an axis."""
    if not (_in_place(a) and _in_place(b)):
        return torch.stack([a + b, a - b], dim if dim == -1 else -2).flatten(dim - 1, dim)
    size = list(a.shape)
    size[dim] *= 2
    out = a.new_empty(size)
    even, odd = (out[..., k::2] if dim == -1 else out[..., k::2, :] for k in (0, 1))
    torch.add(a, b, out=even)
    torch.sub(a, b, out=odd)
    return out
