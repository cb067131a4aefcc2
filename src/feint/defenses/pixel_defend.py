"""PixelDefend: every pixel becomes what a generative model finds likeliest, near its old value."""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
from torch import Tensor

from feint.core.errors import RangeError
from feint.core.registry import defense
from feint.defenses._learned import Learned
from feint.defenses._pixelcnn import Mixture, PixelCNN, Raster, bits
from feint.defenses.base import Params, backward_rule

__all__ = ["PixelDefend"]


@defense("pixel_defend", paper="Song, Kim, Nowozin, Ermon, Kushman, 2018, arXiv:1710.10766")
class PixelDefend(Learned):
    """PixelDefend: greedy purification by an autoregressive model of clean images.

    In raster order, channel by channel, every value is replaced by the one that is likeliest given
    the values already chosen, out of those within `eps` of the old one. The model is a small
    PixelCNN with a mixture of logistics per pixel.

    Claim: on CIFAR-10 the accuracy under the strongest attack rises from 32 % to 70 % (Song et al.,
    abstract). Known break: BPDA with the identity leaves 9 % at linf 8/255 (Athalye et al. 2018).
    Measured with `cifar10-pixelcnn` (4.23 bits per value) before the bundled plain ResNet-20: of
    500 clean test images 84.8 % [81.4, 87.7] are right, without it 92.0 % [89.3, 94.1].
    Of 40 attacked by 10 steps of PGD at linf 8/255, 22.5 % [12.3, 37.5] if the bare model was
    attacked (it gets none of them right), 0 % [0, 8.8] if the whole was, with `identity`.

    Backward rules:
        `identity`, the break's: the purified image is within `eps` of the image.

    Args:
        weights: Name of bundled weights, `trained:NAME`, a `.safetensors` file of `feint train`, or
            `"untrained"`; by default `cifar10-pixelcnn`.
        eps: ε_defend in image units, rounded down to whole 255ths.
        threshold: Images that need fewer bits per value than this stay as they are: the paper's
            adaptive variant. None purifies every image.
        width: Channels of the PixelCNN; by default as the weights say, 32 if untrained.
        layers: Its gated layers; by default as the weights say, 4 if untrained.
        mixtures: Logistics per pixel; by default as the weights say, 5 if untrained.

    Convention:
        The image is first rounded to 8 bits, which its values stay. Of equally likely values the
        smallest is taken. Likelihoods are computed in float64, so that the many choices do not hang
        on rounding. Any size; a model of 32-pixel images means little elsewhere.

    Raises:
        RangeError: `eps` outside [0, 1], a `threshold` that is not positive, a structure below 1.
        UnknownNameError, DataError, ConfigError: Weights that cannot be, see `s2snet`.
        ShapeError: Images without three channels.

    Cost: Height × width steps one after the other, whatever the size of the batch, with the
        multiplications of one forward pass of the PixelCNN in all (79 M at 32×32, twice a
        ResNet-20), and 3·(2·255·eps + 1)·mixtures logistics per pixel.

    Example:
        >>> import torch
        >>> small = PixelDefend(weights="untrained", width=2, layers=1, mixtures=1, eps=2 / 255)
        >>> small(torch.rand(2, 3, 4, 5)).shape
        torch.Size([2, 3, 4, 5])

    References:
        Song, Kim, Nowozin, Ermon, Kushman, "PixelDefend: leveraging generative models to understand
        and defend against adversarial examples", ICLR 2018, §4, algorithm 1. Van den Oord et al.,
        "Conditional image generation with PixelCNN decoders", 2016 (stacks, gates). Salimans,
        Karpathy, Chen, Kingma, "PixelCNN++", ICLR 2017 (logistics). Athalye, Carlini, Wagner,
        "Obfuscated gradients give a false sense of security", ICML 2018.

    Deviations:
        The original's PixelCNN++ has 50 M parameters; ours has no down- and upsampling, and its
        likelihoods are worse (see the card of its weights). The original's values are 16/255 for
        `eps`, and so it is here.
    """

    differentiable: ClassVar[bool] = False
    stochastic: ClassVar[bool] = False
    bounded: ClassVar[bool] = True
    family: ClassVar[str] = "pixelcnn"
    bundled: ClassVar[str] = "cifar10-pixelcnn"

    network: PixelCNN

    def __init__(
        self,
        *,
        weights: str | None = None,
        eps: float = 16 / 255,
        threshold: float | None = None,
        width: int | None = None,
        layers: int | None = None,
        mixtures: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= eps <= 1:
            raise RangeError(f"eps is {eps}; expected 0 ≤ eps ≤ 1 in image units, such as 16/255")
        if threshold is not None and not threshold > 0:
            raise RangeError(f"threshold is {threshold}; expected bits per value above 0")
        self.radius = int(255 * eps + 1e-6)
        self.threshold = threshold
        asked = {"width": width, "layers": layers, "mixtures": mixtures}
        self.open(weights, asked, {"width": 32, "layers": 4, "mixtures": 5}, PixelCNN)

    @torch.no_grad()
    def transform(self, x: Tensor, params: Params) -> Tensor:
        """The purified image."""
        self.check_shape(x, 1)
        old = (x.double() * 255).round()
        if not x.numel() or not self.radius:
            return (old / 255).to(x.dtype)
        network = copy.deepcopy(self.network).double()
        new = purified(network, old, self.radius)
        if self.threshold is not None:
            need = bits(network.log_likelihood(old / 255), x[0].numel())
            new = torch.where((need < self.threshold).view(-1, 1, 1, 1), old, new)
        return (new / 255).to(x.dtype)

    def log_likelihood(self, x: Tensor) -> Tensor:
        """Of the images, by their nearest 8-bit values: (B,) in nats; what training maximises."""
        self.check_shape(x, 1)
        return self.network.log_likelihood(x)

    @backward_rule("identity")
    def identity(self, x: Tensor, params: Params) -> Tensor:
        """The image itself."""
        return x


def purified(network: PixelCNN, old: Tensor, radius: int) -> Tensor:
    """Algorithm 1 of the paper on 8-bit values, (B, 3, H, W), in the network's dtype."""
    new = torch.empty_like(old)
    raster = Raster(network, old)
    around = torch.arange(-radius, radius + 1, dtype=old.dtype, device=old.device)[:, None]
    for row in range(raster.height):
        raster.start_row(row)
        for column in range(raster.width):
            mixture = Mixture(raster.predict(row, column))
            for channel in range(3):
                value = old[:, channel, row, column] + around  # (2·radius + 1, B)
                mass = (mixture.weight + mixture.log_mass(channel, value.clamp(0, 255))).logsumexp(
                    -1
                )
                best = mass.masked_fill((value < 0) | (value > 255), -torch.inf).argmax(0)
                chosen = value.gather(0, best[None])[0]
                mixture.take(channel, chosen)
                new[:, channel, row, column] = chosen
            raster.give(row, column, new[:, :, row, column])
    return new
