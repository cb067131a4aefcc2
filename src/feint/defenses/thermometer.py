"""Thermometer encoding: values become levels, levels become bits."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from feint.core.clip import clip
from feint.core.errors import ConfigError, RangeError, ShapeError
from feint.core.registry import defense
from feint.defenses.base import Defense, Params, backward_rule

__all__ = ["Thermometer"]

MAX_LEVELS = 256


@defense("thermometer", paper="Buckman, Roy, Raffel, Goodfellow, 2018, ICLR")
class Thermometer(Defense):
    """Thermometer or one-hot encoding of every value, for networks trained on it or for any.

    A value in level j of L has the thermometer code of j + 1 ones and L − j − 1 zeros. With
    `output="code"` the defense gives these bits, L channels for each one of the image: it stands in
    front of a network trained on codes, and is the one defense whose output has another shape than
    its input. With `output="image"` (default) the bits are decoded again, to the middle of the
    level: what the encoding tells a network, as an image for pretrained ones. Both are step
    functions of the same input, and `decode(code)` is the image.

    Claim: networks trained on codes withstand white-box attacks, above all with adversarial
    training (Buckman et al.). Known break: BPDA with a soft encoding leaves 0 % on CIFAR-10 at linf
    0.031, without adversarial training (Athalye et al. 2018, table 1).

    Backward rules:
        `ramp`: the published break's: each bit rises linearly over the level below its threshold;
        it has no gradient in the topmost level. `surrogate`: the bits' ramps cover [0, 1] without
        a gap. `identity`: the image itself, with codes for each bit. For images all three have the
        gradient of the identity (but for a factor (L − 1)/L and ramp's dead top level), because
        ramps add up to a straight line; for codes use `surrogate`.

    Args:
        levels: L, 2 to 256.
        encoding: `"thermometer"` or `"one_hot"`; the image that they decode to is the same.
        output: `"image"` or `"code"`.

    Convention:
        Level j holds [j/L, (j + 1)/L), the last one also 1. Codes have the bits of a channel side
        by side: channel c·L + j. Bit 0 of a thermometer is always one. Any number of channels.

    Raises:
        RangeError: If `levels` is not 2 to 256.
        ConfigError: If `encoding` or `output` is unknown.

    Cost: One rounding per value for images, L comparisons per value for codes: 0.2 % and, with
        16 levels (2.4 M values), 18 % of a ResNet-50 forward pass for a 224×224 image on one CPU
        thread.

    Example:
        >>> import torch
        >>> x = torch.tensor([0.0, 0.3, 1.0]).view(1, 1, 1, 3)
        >>> Thermometer(levels=4)(x).flatten()
        tensor([0.1250, 0.3750, 0.8750])
        >>> Thermometer(levels=4, output="code")(x)[0, :, 0, 1]
        tensor([1., 1., 0., 0.])

    References:
        Buckman, Roy, Raffel, Goodfellow, "Thermometer encoding: one hot way to resist adversarial
        examples", ICLR 2018, §3. Athalye, Carlini, Wagner, "Obfuscated gradients give a false
        sense of security", ICML 2018, §5.1.1; their attack code (16 levels).

    Deviations:
        The paper puts a value on a threshold into the level below, and fills its bits from the
        other end; here it is as in the authors' released code: the level above, from the front.
    """

    differentiable: ClassVar[bool] = False
    stochastic: ClassVar[bool] = False
    best_rule: ClassVar[str | None] = "identity"

    def __init__(
        self,
        *,
        levels: int = 16,
        encoding: Literal["thermometer", "one_hot"] = "thermometer",
        output: Literal["image", "code"] = "image",
    ) -> None:
        super().__init__()
        if type(levels) is not int or not 2 <= levels <= MAX_LEVELS:
            raise RangeError(f"levels is {levels!r}; expected a whole number, 2 to {MAX_LEVELS}")
        if encoding not in ("thermometer", "one_hot"):
            raise ConfigError(f"encoding is {encoding!r}; expected 'thermometer' or 'one_hot'")
        if output not in ("image", "code"):
            raise ConfigError(f"output is {output!r}; expected 'image' or 'code'")
        self.levels, self.encoding, self.output = levels, encoding, output
        if output == "code":
            self.best_rule = "surrogate"  # type: ignore[misc]

    def level(self, x: Tensor) -> Tensor:
        """The level of each value, 0 … L − 1, in the dtype of `x`; no gradient."""
        return (x.detach() * self.levels).floor().clamp(0, self.levels - 1)

    def transform(self, x: Tensor, params: Params) -> Tensor:
        """The image of the levels' middles, or the bits."""
        if self.output == "image":
            return (self.level(x) + 0.5) / self.levels
        return self.encode(x)

    def encode(self, x: Tensor) -> Tensor:
        """The bits of `x`, (B, C·L, H, W), 0 or 1 in the dtype of `x`; no gradient.

        Args:
            x: Images, (B, C, H, W), in [0, 1].
        """
        number = torch.arange(self.levels, device=x.device, dtype=x.dtype)[:, None, None]
        level = self.level(x)[:, :, None]
        bits = level == number if self.encoding == "one_hot" else level >= number
        return bits.to(x.dtype).flatten(1, 2)

    def decode(self, code: Tensor) -> Tensor:
        """Images of the levels' middles, (B, C, H, W); linear in `code`, so soft codes go, too.

        Args:
            code: (B, C·L, H, W).

        Raises:
            ShapeError: If the channels are no multiple of L.
        """
        if code.ndim != 4 or code.shape[1] % self.levels:
            raise ShapeError(
                f"code has shape {tuple(code.shape)}; expected (B, C·{self.levels}, H, W), "
                f"a multiple of {self.levels} channels"
            )
        bits = code.unflatten(1, (-1, self.levels))
        if self.encoding == "one_hot":
            number = torch.arange(self.levels, device=code.device, dtype=code.dtype)
            level = (bits * number[:, None, None]).sum(2)
        else:
            level = bits.sum(2) - 1
        return (level + 0.5) / self.levels

    def _soft(self, x: Tensor, steps: int) -> Tensor:
        """Bits with ramps: bit j ≥ 1 rises from (j − 1)/steps to j/steps, bit 0 is one."""
        number = torch.arange(1, self.levels, device=x.device, dtype=x.dtype)[:, None, None]
        rising = clip(x[:, :, None] * steps - (number - 1))
        bits = torch.cat([torch.ones_like(rising[:, :, :1]), rising], 2)
        if self.encoding == "one_hot":
            bits = bits - torch.cat([rising, torch.zeros_like(rising[:, :, :1])], 2)
        code = bits.flatten(1, 2)
        return code if self.output == "code" else self.decode(code)

    @backward_rule("identity")
    def identity(self, x: Tensor, params: Params) -> Tensor:
        """The image itself, or for codes each bit's own copy of it."""
        return x if self.output == "image" else x.repeat_interleave(self.levels, 1)

    @backward_rule("ramp")
    def ramp(self, x: Tensor, params: Params) -> Tensor:
        """Athalye et al.'s soft encoding: bit j rises over level j − 1."""
        return self._soft(x, self.levels)

    @backward_rule("surrogate")
    def surrogate(self, x: Tensor, params: Params) -> Tensor:
        """Soft encoding whose ramps share [0, 1] among them, each across its bit's threshold."""
        return self._soft(x, self.levels - 1)
