"""Crop–rescale: a random crop, resized to the input's size."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from feint.core import random
from feint.core.errors import RangeError
from feint.core.registry import defense
from feint.defenses.base import Defense, Params, backward_rule

__all__ = ["CropEnsemble"]

MAX_SUPPORT = 512
"""Most positions that `support` writes out."""


@defense(
    "crop_ensemble",
    paper="Guo, Rana, Cissé, van der Maaten, 2018, arXiv:1711.00117",
    presets={"guo": {"crop": 90, "side": 224}, "qiu": {"crop": 90, "side": 299}},
)
class CropEnsemble(Defense):
    """Crop–rescale: a random crop of the image, resized to the image's size.

    One draw is one crop; the paper's classifier averages the predictions of 30:
    `Pipeline(model, CropEnsemble(), votes=30)`.

    Claim: one of five transformations, the best of which undoes 60 % of strong gray-box and 90 % of
    strong black-box attacks on ImageNet (Guo et al., abstract). Known break: EOT over the crops
    leaves 0 % at a normalized L2 distance of 0.05 (Athalye et al. 2018, as in their notebook; their
    README's table has 0.005); S1 Fig. 3: 0 % accuracy, 98 % target hits after 49 rounds.

    Backward rules:
        `exact` (autograd; a crop and its resize are linear), with EOT over the draws; where the
        positions are few, the expectation can be taken exactly (`support`). `identity`: the image
        itself, which is displaced and too large by the crop's factor.

    Args:
        preset: `"guo"` (default): crops of 90×90 from 224×224, as in the paper and its code.
            `"qiu"`: 90×90 from 299×299, as in S1.
        crop: Side of the crop, for images of side `side`.
        side: Side of the images that `crop` is meant for.

    Convention:
        An axis of n pixels is cropped to round(crop·n/side), at least 1, each axis by itself; the
        position is uniform. Bilinear, pixel centers at half integers, without antialiasing, as
        `torch.nn.functional.interpolate` does by default.

    Raises:
        RangeError: Unless 1 ≤ crop ≤ side.

    Cost: Two matrix products, H·W·(H + W) multiply–adds per channel: 0.07 G for 224×224×3, 2 % of
        a ResNet-50 forward pass. The ensemble is the cost: 30 forward passes of the classifier.

    Example:
        >>> import torch
        >>> CropEnsemble()(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 3, 32, 32])

    References:
        Guo, Rana, Cissé, van der Maaten, "Countering adversarial images using input
        transformations", ICLR 2018, §4; original code, `constants.py` (30 crops of 90 pixels).
        Qiu et al., arXiv:2005.13712, Fig. 3; original code, random crop of 90 pixels.
    """

    differentiable: ClassVar[bool] = True
    stochastic: ClassVar[bool] = True

    def __init__(self, *, preset: str | None = "guo", crop: int = 90, side: int = 224) -> None:
        super().__init__()
        if not all(type(n) is int for n in (crop, side)) or not 1 <= crop <= side:
            raise RangeError(
                f"crop and side are {crop}, {side}; expected whole numbers, 1 ≤ crop ≤ side"
            )
        self.crop, self.side = crop, side
        self.stochastic = crop < side  # type: ignore[misc]

    def size(self, n: int) -> int:
        """Side of the crop along an axis of n pixels."""
        return max(1, (2 * self.crop * n + self.side) // (2 * self.side))

    def _room(self, shape: torch.Size) -> tuple[int, int]:
        """How many positions there are, down and across."""
        down, across = (n - self.size(n) + 1 if n else 1 for n in shape[-2:])
        return down, across

    def draw(self, keys: Tensor, shape: torch.Size) -> Params:
        """`top` and `left`, int64 (B,)."""
        down, across = self._room(shape)
        return {
            "top": random.integers(random.fold(keys, "top"), 0, down),
            "left": random.integers(random.fold(keys, "left"), 0, across),
        }

    def support(
        self, shape: torch.Size, device: torch.device | str | None = None
    ) -> tuple[Params, ...] | None:
        """Every position, if they are at most 512 (at 32 px: 400)."""
        if not self.stochastic:
            return ({},)
        down, across = self._room(shape)
        if down * across > MAX_SUPPORT:
            return None
        return tuple(
            {
                "top": torch.full(shape[:1], top, dtype=torch.int64, device=device),
                "left": torch.full(shape[:1], left, dtype=torch.int64, device=device),
            }
            for top in range(down)
            for left in range(across)
        )

    def transform(self, x: Tensor, params: Params) -> Tensor:
        """Crop and resize, as two matrices per image."""
        if x.numel() == 0 or not self.stochastic:
            return x.clone()
        rows = self._matrix(params["top"], x.shape[-2], x.dtype)
        columns = self._matrix(params["left"], x.shape[-1], x.dtype)
        y = rows[:, None] @ x @ columns[:, None].transpose(-1, -2)
        return y + (y.detach().clamp(0, 1) - y.detach())  # rounding beyond [0, 1] cut off

    def _matrix(self, start: Tensor, n: int, dtype: torch.dtype) -> Tensor:
        """Crop at `start` and linear resize along one axis: (B, n, n) from input to output."""
        size = self.size(n)
        at = (torch.arange(n, device=start.device, dtype=torch.float64) + 0.5) * size / n - 0.5
        at = at.clamp(0, size - 1)
        low = at.floor().long()
        share = at - low
        index = torch.stack([low, (low + 1).clamp_max(size - 1)], -1)
        weight = torch.stack([1 - share, share], -1).expand(len(start), -1, -1)
        matrix = weight.new_zeros(len(start), n, n)
        return matrix.scatter_add_(2, index + start[:, None, None], weight).to(dtype)

    @backward_rule("identity")
    def identity(self, x: Tensor, params: Params) -> Tensor:
        """The image itself."""
        return x
