"""Wavelet denoising by shrinkage of Haar coefficients, with the semantics of 2018."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from feint.core.clip import clip
from feint.core.color import rgb_to_ycbcr, ycbcr_to_rgb
from feint.core.errors import ConfigError, RangeError, ShapeError
from feint.core.pieces import in_pieces
from feint.core.registry import defense
from feint.defenses.base import Defense, Params, backward_rule

__all__ = ["Wavelet", "haar", "haar_inverse"]

Method = Literal["bayes", "visu", "sure", "hard"]

_METHODS = ("bayes", "visu", "sure", "hard")
_EPS = 2.0**-52  # of float64, in which the original computes


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
        sigma: Noise level σ > 0; the paper's 0.04.
        wavelet: `"db1"`, also called `"haar"`.
        levels: Depth; by default max(⌊log₂ min(H, W)⌋ − 3, 1): 2 for 32 px, 4 for 224, 5 for 299.
        color: `"ycbcr"`; or `"rgb"`: the channels as they are, neither turned nor stretched.

    Convention:
        Sides of any length; odd ones are extended by their last row or column, then cropped.

    Raises:
        ConfigError: If a name is unknown.
        RangeError: If σ ≤ 0 or `levels` < 1.
        ShapeError: If there are not three channels for YCbCr.

    Cost: O(pixels); for a 299×299 image `bayes`, `visu` and `hard` take 2 to 5 % of a ResNet-50
        forward pass at 224×224 (one CPU thread), `sure`, which sorts every sub-band, 20 to 25 %.

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
        sigma: float = 0.04,
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
        if not sigma > 0:
            raise RangeError(f"sigma is {sigma}; expected a noise level > 0, such as 0.04")
        if levels is not None and levels < 1:
            raise RangeError(f"levels is {levels}; expected at least 1, or None")
        self.method, self.sigma, self.color = method, float(sigma), color
        self.wavelet, self.levels = wavelet, levels

    def transform(self, x: Tensor, params: Params) -> Tensor:
        """Denoise every channel."""
        return in_pieces(self._whole, x) if x.numel() else x

    def _whole(self, x: Tensor) -> Tensor:
        if self.color == "rgb":
            return clip(self._denoise(x))
        if x.shape[1] != 3:
            raise ShapeError(
                f"x has shape {tuple(x.shape)}; expected three channels for YCbCr; "
                "use color='rgb' for other images"
            )
        y = rgb_to_ycbcr(x)
        low, high = y.amin((2, 3), keepdim=True), y.amax((2, 3), keepdim=True)
        span = torch.where(high > low, high - low, 1.0)
        y = clip(self._denoise((y - low) / span))
        return clip(ycbcr_to_rgb(y * span + low))

    def _denoise(self, x: Tensor) -> Tensor:
        """Decompose, shrink, recompose; (B, C, H, W) of any range."""
        side = min(x.shape[-2:])
        depth = max(side.bit_length() - 1 - 3, 1) if self.levels is None else self.levels
        pixels = x.shape[-2] * x.shape[-1]
        sizes, details = [], []
        for _ in range(depth):
            sizes.append(x.shape[-2:])
            x, detail = haar(x)
            details.append(self._shrink(detail, pixels))
        for size, detail in zip(reversed(sizes), reversed(details), strict=True):
            x = haar_inverse(x, detail)[..., : size[0], : size[1]]
        return x

    def _shrink(self, d: Tensor, pixels: int) -> Tensor:
        """Threshold the sub-bands d, (B, C, 3, h, w), each by itself."""
        sigma = self.sigma
        if self.method == "hard":
            return torch.where(d.abs() > sigma * math.sqrt(2 * math.log(pixels)), d, 0.0)
        if self.method == "visu":
            return _soft(d, sigma * math.sqrt(2 * math.log(pixels)))
        if self.method == "bayes":
            signal = (d * d).mean((-2, -1), keepdim=True) - sigma**2
            return _soft(d, sigma**2 / signal.clamp(min=_EPS).sqrt())
        return _soft(d, sigma * _sure(d.flatten(-2) / sigma)[..., None, None])

    @backward_rule("identity")
    def identity(self, x: Tensor, params: Params) -> Tensor:
        """The image itself (Athalye and Carlini's BPDA)."""
        return x


def _soft(d: Tensor, threshold: Tensor | float) -> Tensor:
    bound = threshold if isinstance(threshold, Tensor) else d.new_tensor(threshold)
    return d - d.clamp(-bound, bound)


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
    height, width = x.shape[-2:]
    if height % 2:
        x = torch.cat([x, x[..., -1:, :]], -2)
    if width % 2:
        x = torch.cat([x, x[..., -1:]], -1)
    h, w = x.shape[-2] // 2, x.shape[-1] // 2
    squares = x.unflatten(-1, (w, 2)).unflatten(-3, (h, 2))  # (…, h, 2, w, 2)
    corners = squares.movedim((-3, -1), (-4, -3)).flatten(-4, -3)  # (…, 4, h, w)
    parts = (_butterfly(x) @ corners.flatten(-2)).unflatten(-1, (h, w))
    return parts[..., 0, :, :], parts[..., 1:, :, :]


def _butterfly(like: Tensor) -> Tensor:
    """From the corners of a square to sum and differences, halved; its own inverse."""
    signs = [[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]
    return like.new_tensor(signs) / 2


def haar_inverse(approximation: Tensor, details: Tensor) -> Tensor:
    """Inverse of `haar`, (…, 2h, 2w); for an odd side the caller drops the last row or column."""
    h, w = approximation.shape[-2:]
    parts = torch.cat([approximation.unsqueeze(-3), details], -3)
    corners = (_butterfly(parts) @ parts.flatten(-2)).unflatten(-1, (h, w)).unflatten(-3, (2, 2))
    return corners.movedim((-4, -3), (-3, -1)).flatten(-4, -3).flatten(-2)
