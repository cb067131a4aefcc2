"""Artificial Checkerboard Enhancer (ACE): a linear module that draws gradients to even pixels."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from feint.core.errors import RangeError, ShapeError
from feint.core.registry import defense
from feint.defenses.base import Defense, Params

__all__ = ["ACE"]


@defense("ace", paper="Anonymous, ICLR 2019 submission (ACE), §4.1")
class ACE(Defense):
    r"""Artificial Checkerboard Enhancer, the two-layer form for CIFAR.

    .. math:: ACE(x) = x + λ·D(E(x))

    `E` is a 1×1 convolution with stride 2 that reads only the pixels (even row, even column), the
    set C; `D` is a 3×3 transposed convolution with stride 2 whose last row and column are cropped.
    Both keep the channels and have no activation, so the module is affine. It is trained from
    scratch with the classifier that follows, one model per λ. With a large λ the input gradient
    lies almost wholly on C; a shift by one pixel then moves an attack's perturbation off C.

    Claim: at λ=100 and a one-pixel shift, 98.3 % of the clean accuracy survives PGD (ResNet-18,
    Table 3). Known break: an attacker who differentiates through the shift, or averages over the
    eight random shifts (EOT), leaves about 0 %.

    Args:
        lam: λ ≥ 0; `math.inf` removes the identity skip: ACE(x) = D(E(x)).
        channels: Channels of the input, kept by both convolutions.

    Convention:
        Works on whatever space it was trained in; the original puts it *behind* the normalisation,
        so `feint.models` nests it there. The output is a feature map of the image's shape, not an
        image: it is unbounded.

    Raises:
        RangeError: If λ is negative or NaN.
        ShapeError: If a side is shorter than 2 pixels or the channels differ.

    Cost: 2·9·C²·HW/4 multiply–adds forward (a thousandth of a ResNet-20).

    Example:
        >>> import torch
        >>> ACE(lam=10.0)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 3, 32, 32])

    References:
        "ACE: Artificial Checkerboard Enhancer to Induce and Evade Adversarial Attacks", anonymous
        ICLR 2019 submission, §4.1 and §5; original code, `Enhancer`.

    Deviations:
        Odd sides: the transposed convolution gives 2·⌈n/2⌉+1 ≥ n+1 rows; all beyond n are cropped.
    """

    differentiable: ClassVar[bool] = True
    stochastic: ClassVar[bool] = False
    bounded: ClassVar[bool] = False

    def __init__(self, *, lam: float = 100.0, channels: int = 3) -> None:
        super().__init__()
        if not lam >= 0:
            raise RangeError(f"lam is {lam}; expected λ ≥ 0, or math.inf for no skip connection")
        self.lam, self.channels = float(lam), channels
        self.encode = nn.Conv2d(channels, channels, 1, stride=2)
        self.decode = nn.ConvTranspose2d(channels, channels, 3, stride=2)

    def transform(self, x: Tensor, params: Params) -> Tensor:
        """X + λ·D(E(x)), or D(E(x)) for λ = ∞."""
        height, width = x.shape[-2:]
        if x.shape[1] != self.channels or min(height, width) < 2:
            raise ShapeError(
                f"x has shape {tuple(x.shape)}; expected {self.channels} channels and sides ≥ 2"
            )
        board = self.decode(self.encode(x))[..., :height, :width]
        return board if math.isinf(self.lam) else x + self.lam * board

    def connected(self, height: int, width: int) -> Tensor:
        """The set C of pixels that the encoder reads: bool, (1, 1, height, width)."""
        mask = torch.zeros(1, 1, height, width, dtype=torch.bool)
        mask[..., ::2, ::2] = True
        return mask

    def extra_repr(self) -> str:
        """λ and the channels."""
        return f"lam={self.lam:g}, channels={self.channels}"
