"""Artificial Checkerboard Enhancer (ACE): a module that draws gradients to even pixels."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from feint.core.errors import ConfigError, RangeError, ShapeError
from feint.core.registry import defense
from feint.defenses._learned import Learned
from feint.defenses._unet import CHECKERBOARD, UNet, tile_mask
from feint.defenses.base import Params, backward_rule

__all__ = ["ACE"]


@defense("ace", paper="Anonymous, ICLR 2019 submission (ACE), §4.1", version=2)
class ACE(Learned):
    r"""Artificial Checkerboard Enhancer in its two forms.

    `form="linear"`, for CIFAR:

    .. math:: ACE(x) = x + λ·D(E(x))

    `E` is a 1×1 convolution with stride 2 that reads only the pixels (even row, even column), the
    set C; `D` is a 3×3 transposed convolution with stride 2 whose last row and column are cropped.
    Both keep the channels and have no activation, so the module is affine. It is trained from
    scratch with the classifier that follows, one model per λ.

    `form="unet"`, in front of any pretrained classifier, which stays as it is:

    .. math:: ACE(x) = (1 − λ)·x + λ·A(x)

    `A` is a UNet autoencoder whose first layer reads only C, trained to reproduce images.

    With a large λ the input gradient lies almost wholly on C; a shift by one pixel then moves an
    attack's perturbation off C.

    Claim: at λ=100 and a one-pixel shift, 98.3 % of the clean accuracy survives PGD (ResNet-18,
    Table 3); with the UNet at λ=0.99 88.1 % (ImageNet, ResNet-152, Table 4). Known break: an
    attacker who differentiates through the shift, or averages over the eight random shifts (EOT),
    leaves about 0 %; and the UNet does not change the classifier, so that attacks on the bare
    classifier pass it.

    The bundled UNet shows the form and no more: a quarter of the pixels of a 32×32 image is 16×16,
    and of the CIFAR-10 test set the bundled plain ResNet-20 classifies 50.8 % behind it at λ=0.99
    (90.8 % without; rms 0.061).

    Backward rules:
        `exact` is autograd. `identity` passes the classifier's gradient straight through, past the
        checkerboard: BPDA, as A(x) ≈ x.

    Args:
        lam: λ ≥ 0 for the linear form (default 100, S0: 0, 1, 2, 5,
            10, 20, 100 and ∞ in Tables 2 and 5); `math.inf` removes the identity skip:
            ACE(x) = D(E(x)). For the UNet 0 ≤ λ ≤ 1 (default 0.99; 0, 0.5 and 0.99 in
            Table 4); 1 removes the skip.
        channels: Channels of the input, kept by both convolutions; 3 for the UNet.
        form: `"linear"` or `"unet"`.
        weights: Of the UNet: name of bundled weights, `trained:NAME`, a file of `feint train`,
            or `"untrained"`; by default `cifar10-unet`. The linear form's are its classifier's.
        width: Channels of the UNet's first level; by default as the weights say, 64 if untrained.
        depth: Levels of the UNet; by default as the weights say, 5 if untrained.

    Convention:
        The linear form works on whatever space it was trained in; the original puts it *behind* the
        normalisation, so `feint.models` nests it there. The UNet form takes images in [0, 1] and
        normalises inside (ImageNet's constants, as the original); (1 − λ)x + λA(x) is the same in
        both spaces. The output is unbounded: features, or an image that is not clipped.

    Raises:
        RangeError: If λ is NaN or outside its range; a width or depth below 1.
        ShapeError: If the channels differ, or a side is shorter than 2 pixels or, for the UNet,
            than its stride of 2^depth.
        ConfigError: Weights, width or depth for the linear form; weights of another network.
        UnknownNameError, DataError: Weights that are not there, or damaged.

    Cost: Linear: 2·9·C²·HW/4 multiply–adds forward (a thousandth of a ResNet-20). UNet: the
        paper's has 31 M parameters and takes 9.2 G multiply–adds at 224×224, 2.3 times a
        ResNet-50; the bundled one has 0.12 M and takes 16 % of a ResNet-20.

    Example:
        >>> import torch
        >>> ACE(lam=10.0)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 3, 32, 32])
        >>> unet = ACE(form="unet", weights="untrained", width=4, depth=2, lam=0.5)
        >>> unet(torch.rand(2, 3, 31, 30)).shape
        torch.Size([2, 3, 31, 30])

    References:
        "ACE: Artificial Checkerboard Enhancer to Induce and Evade Adversarial Attacks", anonymous
        ICLR 2019 submission, §4.1, §4.2 and §5; original code, `Enhancer`, `AENet`, `UNet`.

    Deviations:
        Odd sides: the transposed convolution gives 2·⌈n/2⌉+1 ≥ n+1 rows; all beyond n are cropped.
        The original UNet takes multiples of its stride only; ours extends other images at the right
        and at the bottom by their border, so that C stays where it is, and crops the result.
    """

    differentiable: ClassVar[bool] = True
    stochastic: ClassVar[bool] = False
    bounded: ClassVar[bool] = False
    family: ClassVar[str] = "unet"
    bundled: ClassVar[str] = "cifar10-unet"

    network: UNet

    def __init__(
        self,
        *,
        lam: float | None = None,
        channels: int = 3,
        form: Literal["linear", "unet"] = "linear",
        weights: str | None = None,
        width: int | None = None,
        depth: int | None = None,
    ) -> None:
        super().__init__()
        if form not in ("linear", "unet"):
            raise ConfigError(f"form is {form!r}; expected 'linear' or 'unet'")
        self.form: str = form
        lam = self._config["lam"] = self.usual["lam"] if lam is None else float(lam)
        self.lam, self.channels = lam, channels
        if form == "linear":
            if not lam >= 0:
                raise RangeError(
                    f"lam is {lam}; expected λ ≥ 0, or math.inf for no skip connection"
                )
            if (weights, width, depth) != (None, None, None):
                raise ConfigError(
                    "weights, width and depth are for form='unet'; the linear form is trained with "
                    "its classifier and loaded with it"
                )
            self.encode = nn.Conv2d(channels, channels, 1, stride=2)
            self.decode = nn.ConvTranspose2d(channels, channels, 3, stride=2)
            return
        if not 0 <= lam <= 1:
            raise RangeError(f"lam is {lam}; expected 0 ≤ λ ≤ 1 for form='unet'")
        if channels != 3:
            raise ConfigError(f"channels is {channels}; expected 3 for form='unet'")
        usual = {"width": 64, "depth": 5, "mask": CHECKERBOARD}
        self.open(weights, {"width": width, "depth": depth}, usual, UNet)

    @property
    def usual(self) -> dict[str, Any]:
        """λ of the form: S0's largest of each."""
        return {"lam": 100.0 if self.form == "linear" else 0.99}

    def transform(self, x: Tensor, params: Params) -> Tensor:
        """The skip connection plus what the module makes of the connected pixels."""
        if self.form == "unet":
            made = self.learn(x, params)
            return made if self.lam == 1 else (1 - self.lam) * x + self.lam * made
        height, width = x.shape[-2:]
        if x.shape[1] != self.channels or min(height, width) < 2:
            raise ShapeError(
                f"x has shape {tuple(x.shape)}; expected {self.channels} channels and sides ≥ 2"
            )
        board = self.decode(self.encode(x))[..., :height, :width]
        return board if math.isinf(self.lam) else x + self.lam * board

    def learn(self, x: Tensor, params: Params) -> Tensor:
        """The autoencoder alone, which training compares with the image."""
        self.check_shape(x, self.network.stride)
        return self.on_normalized(self.network, x)

    @backward_rule("identity")
    def identity(self, x: Tensor, params: Params) -> Tensor:
        """The image itself."""
        return x

    def connected(self, height: int, width: int) -> Tensor:
        """The set C of pixels that the encoder reads: bool, (1, 1, height, width)."""
        tile = CHECKERBOARD if self.form == "linear" else self.network.mask
        return tile_mask(tile, height, width)

    def extra_repr(self) -> str:
        """λ and the channels of the linear form; the whole configuration of the other."""
        if self.form == "unet":
            return super().extra_repr()
        return f"lam={self.lam:g}, channels={self.channels}"
