"""Random resizing and padding (Rand)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from feint.core import random
from feint.core.errors import ConfigError, RangeError
from feint.core.registry import defense
from feint.defenses.base import Defense, Params

__all__ = ["Rand"]

SIDE = 299
"""Sizes are given for images of this side."""


@defense(
    "rand",
    paper="Xie, Wang, Zhang, Ren, Yuille, 2018, arXiv:1711.01991; as used by Qiu et al. 2020",
    presets={
        "qiu": {"low": 299, "high": 399, "canvas": 400, "value": 0.5, "resize": "bilinear"},
        "paper": {"low": 299, "high": 330, "canvas": 400, "value": 0.0, "resize": "bilinear"},
        "xie": {"low": 310, "high": 330, "canvas": 331, "value": 0.5, "resize": "nearest"},
    },
)
class Rand(Defense):
    """Randomization layer: resize to a random size, place at random on a canvas, resize back.

    Claim: FD+Rand keeps 71 % accuracy against 50 rounds of BPDA, 52 % with EOT, 24 % against semi-
    brute force (S1 Fig. 3). Known break: the procedure is differentiable, so EOT leaves 0 %
    (Athalye et al. 2018; S1 Fig. 3: 93 % target hits after 49 rounds).

    Args:
        preset: `"qiu"` (default: it is what S1's code does, and S1's tables follow it); `"paper"`
            is the text of S1 §V; `"xie"` the original competition entry. All of them end with a
            resize to the input's size, which in the original of `"xie"` is left to the network.
        low: Smallest size r, for an image side of 299.
        high: Largest size, itself included.
        canvas: Side of the canvas.
        value: Gray level of the canvas outside of the image: 0.5 is zero in [−1, 1].
        resize: First resize, to r×r. `"bilinear"` maps corners to corners, as TensorFlow's
            `crop_and_resize` does; `"nearest"` takes pixel ⌊i·n/r⌋, as its `resize_images`.
        resize_back: Second resize, bilinear without antialiasing. `"legacy"` samples the canvas at
            i·canvas/n, as TensorFlow 1 does with `align_corners=False`; `"half_pixel"` at
            (i + ½)·canvas/n − ½, as PyTorch does, without the shift up and left by up to a sixth
            of a pixel.

    Convention:
        r is even on {low … high}; the canvas leaves r to canvas − r − 1 pixels above and to the
        left, as many positions as the original's integer draw (which excludes its upper end). For
        another side n all is drawn as for 299 and scaled: r·n/299 to the nearest, the canvas
        rounded up, the position in proportion to the room there is, so that rows and columns of an
        image that is not square scale each by its own side. At n = 32 that is 32…43 px on 43.

    Raises:
        RangeError: Unless 1 ≤ low ≤ high ≤ canvas, and `value` is in [0, 1].
        ConfigError: If `resize` or `resize_back` is unknown.

    Cost: Two matrix products, H·W·(H + W) multiply–adds per channel: 0.16 G for 299×299×3; 4 to 6 %
        of the time of a ResNet-50 forward pass on the same images from 224 px, 1 % in batches of 64
        at 32 px. One image of 32 px has 12 %, behind `fd` 15 %: some hundred small operations,
        most of them for its draw (CPU time, `benchmarks/results/defenses.md`).

    Example:
        >>> import torch
        >>> Rand()(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 3, 32, 32])

    References:
        Xie, Wang, Zhang, Ren, Yuille, "Mitigating adversarial effects through randomization",
        ICLR 2018. Qiu et al., arXiv:2005.13712, §V-B1, Tables V and IX; original code,
        `defend_randomization`.
    """

    differentiable: ClassVar[bool] = True
    stochastic: ClassVar[bool] = True

    def __init__(
        self,
        *,
        preset: str | None = "qiu",
        low: int = 299,
        high: int = 399,
        canvas: int = 400,
        value: float = 0.5,
        resize: Literal["bilinear", "nearest"] = "bilinear",
        resize_back: Literal["legacy", "half_pixel"] = "legacy",
    ) -> None:
        super().__init__()
        if not all(type(n) is int for n in (low, high, canvas)) or not 1 <= low <= high <= canvas:
            raise RangeError(
                f"low, high, canvas are {low}, {high}, {canvas}; "
                "expected whole numbers, 1 ≤ low ≤ high ≤ canvas"
            )
        if not 0 <= value <= 1:
            raise RangeError(f"value is {value}; expected a gray level in [0, 1]")
        if resize not in ("bilinear", "nearest"):
            raise ConfigError(f"resize is {resize!r}; expected 'bilinear' or 'nearest'")
        if resize_back not in ("legacy", "half_pixel"):
            raise ConfigError(f"resize_back is {resize_back!r}; expected 'legacy' or 'half_pixel'")
        self.low, self.high, self.canvas, self.value = low, high, canvas, float(value)
        self.resize, self.resize_back = resize, resize_back

    def draw(self, keys: Tensor, shape: torch.Size) -> Params:
        """`size`, `top` and `left` for a side of 299, int64 (B,)."""
        size = random.integers(random.fold(keys, "size"), self.low, self.high + 1)
        room = (self.canvas - size).clamp_min(1)
        u = random.uniform(random.fold(keys, "place"), (2,), dtype=torch.float64)
        top, left = (u * room[:, None]).long().unbind(-1)
        return {"size": size, "top": top, "left": left}

    def placement(self, params: Params, n: int, axis: Literal["top", "left"]) -> tuple[Any, ...]:
        """Size and position of the image along an axis of side n, (B,) each, and the canvas."""
        canvas = -(-self.canvas * n // SIDE)
        size = ((2 * n * params["size"] + SIDE) // (2 * SIDE)).clamp(1, canvas)
        room = (self.canvas - params["size"]).clamp_min(1)
        return size, params[axis] * (canvas - size + 1) // room, canvas

    def transform(self, x: Tensor, params: Params) -> Tensor:
        """Resize, place, resize back, as two matrices per image."""
        if x.numel() == 0:
            return x.clone()
        height, width = x.shape[-2:]
        rows, inside_rows = self._matrix(params, height, "top", x.dtype)
        columns, inside_columns = self._matrix(params, width, "left", x.dtype)
        image = rows[:, None] @ x @ columns[:, None].transpose(-1, -2)
        border = self.value * (1 - inside_rows[:, :, None] * inside_columns[:, None, :])
        return _trim(image + border[:, None])

    def _matrix(
        self, params: Params, n: int, axis: Literal["top", "left"], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The whole procedure along one axis.

        Returns:
            The matrix (B, n, n) from input to output, and the share (B, n) of each output value
            that comes from the image and not from the canvas.
        """
        size, start, canvas = self.placement(params, n, axis)
        size, start = size[:, None, None], start[:, None, None]
        i = torch.arange(n, device=size.device, dtype=torch.float64)
        if self.resize_back == "legacy":
            at = i * canvas / n
        else:
            at = ((i + 0.5) * canvas / n - 0.5).clamp_min(0)
        outer, outer_weight = _taps(at[None], canvas)  # (1, n, 2)
        own = outer - start  # position in the resized image, (B, n, 2)
        inside = (own >= 0) & (own < size)
        weight = outer_weight * inside
        if self.resize == "nearest":
            inner = (own * n // size).clamp(0, n - 1)[..., None]
            inner_weight = torch.ones_like(inner, dtype=torch.float64)
        else:
            at = own.double() * (n - 1) / (size - 1).clamp_min(1)
            inner, inner_weight = _taps(at.clamp(0, n - 1), n)  # (B, n, 2, 2)
        taps = (weight[..., None] * inner_weight).flatten(2)
        matrix = taps.new_zeros(len(taps), n, n).scatter_add_(2, inner.flatten(2), taps)
        return matrix.to(dtype), weight.sum(-1).to(dtype)


def _taps(at: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Linear interpolation at `at` among n samples: two indices and two weights, last axis."""
    low = at.floor().clamp(0, n - 1)
    share = at - low
    index = torch.stack([low, (low + 1).clamp_max(n - 1)], -1).long()
    return index, torch.stack([1 - share, share], -1)


def _trim(x: Tensor) -> Tensor:
    """Rounding beyond [0, 1] cut off; unlike a clamp, it leaves the gradient of white alone."""
    return x + (x.detach().clamp(0, 1) - x.detach())
