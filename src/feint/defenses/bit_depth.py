"""Bit-depth reduction: keep the highest bits of each value."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from feint.core.dct import soft_round
from feint.core.errors import ConfigError, RangeError
from feint.core.quantise import from_uint8, to_uint8
from feint.core.registry import defense
from feint.defenses.base import Defense, Params, backward_rule

__all__ = ["BitDepth"]


@defense(
    "bit_depth",
    paper="Xu, Evans, Qi, 2018, arXiv:1704.01155",
    presets={"xu": {"rounding": "nearest"}, "qiu": {"bits": 3, "rounding": "truncate"}},
)
class BitDepth(Defense):
    """Bit-depth reduction (feature squeezing), a step function of each value.

    Claim: 3 bits remove small perturbations (Xu et al. §3.1; S1 Table I: rms .0709). Known break:
    BPDA with the identity leaves 0 % (Athalye et al. 2018; S1 Fig. 3: 0 % after 49 rounds).

    Backward rules:
        `surrogate`: cubic rounding in place of rounding; its derivative is zero at the very levels,
        so an image that has already been squeezed gives it nothing. `identity`: the default, and
        the one to use.

    Args:
        preset: `"xu"` (default) rounds to the nearest of 2^bits levels that reach 0 and 1; `"qiu"`
            is S1's own code: 8-bit truncation, then a shift right and left by 8 − bits.
        bits: 1 to 8.
        rounding: `"nearest"`: round(x·(2^bits − 1)) / (2^bits − 1), half to even. `"truncate"`:
            the lowest 8 − bits bits of ⌊255x⌋ set to zero, at most 224/255 for 3 bits: the image
            grows darker by half a level on average.

    Raises:
        RangeError: If `bits` is not 1 to 8.
        ConfigError: If `rounding` is unknown.

    Cost: One rounding per value.

    Example:
        >>> import torch
        >>> BitDepth(bits=1)(torch.full((1, 1, 1, 2), 0.6)).flatten()
        tensor([1., 1.])
        >>> BitDepth(preset="qiu")(torch.ones(1, 1, 1, 1)) * 255
        tensor([[[[224.]]]])

    References:
        Xu, Evans, Qi, "Feature squeezing: detecting adversarial examples in deep neural networks",
        NDSS 2018, §3.1. Qiu et al., arXiv:2005.13712, Table I; original code, `defense.py`.
        Cubic rounding: Shin, Song, "JPEG-resistant adversarial images", 2017.
    """

    differentiable: ClassVar[bool] = False
    stochastic: ClassVar[bool] = False

    def __init__(
        self,
        *,
        preset: str | None = "xu",
        bits: int = 3,
        rounding: Literal["nearest", "truncate"] = "nearest",
    ) -> None:
        super().__init__()
        if type(bits) is not int or not 1 <= bits <= 8:
            raise RangeError(f"bits is {bits!r}; expected a whole number, 1 to 8")
        if rounding not in ("nearest", "truncate"):
            raise ConfigError(f"rounding is {rounding!r}; expected 'nearest' or 'truncate'")
        self.bits, self.rounding = bits, rounding

    def transform(self, x: Tensor, params: Params) -> Tensor:
        """The values that are left."""
        if self.rounding == "truncate":
            spare = 8 - self.bits
            return from_uint8((to_uint8(x, "truncate") >> spare) << spare, x.dtype)
        top = 2**self.bits - 1
        return (x * top).round() / top

    @backward_rule("surrogate")
    def surrogate(self, x: Tensor, params: Params) -> Tensor:
        """The same with cubic rounding."""
        if self.rounding == "truncate":
            size = 2 ** (8 - self.bits)
            return soft_round(x * (255 / size) - 0.5) * (size / 255)
        top = 2**self.bits - 1
        return soft_round(x * top) / top

    @backward_rule("identity")
    def identity(self, x: Tensor, params: Params) -> Tensor:
        """The image itself."""
        return x
