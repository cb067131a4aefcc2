"""SHIELD: every block of the image from JPEG at a random quality."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from feint.core import random
from feint.core.errors import ConfigError, RangeError
from feint.core.quantise import Rounding, to_uint8
from feint.core.registry import defense
from feint.defenses.base import Defense, Params, backward_rule
from feint.defenses.jpeg import JPEG, Subsampling, pillow_jpeg, tensor_jpeg

__all__ = ["Shield"]

MAX_SUPPORT = 256
"""Most choices of qualities that `support` writes out."""


@defense(
    "shield",
    paper="Das, Shanbhogue, Chen, Hohman, Li, Chen, Kounavis, Chau, 2018, arXiv:1802.06816",
    presets={"paper": {"rounding": "nearest"}, "qiu": {"rounding": "truncate"}},
)
class Shield(Defense):
    """SHIELD: JPEG at several qualities, every block taken from one of them at random.

    One draw is one image. SHIELD's ensemble is `Pipeline(model, Shield(), votes=…,
    combine="majority")`, on models that were retrained on JPEG images ("vaccinated") if there are
    any.

    Claim: up to 94 % of black-box and 98 % of gray-box attacks undone (Das et al., abstract).
    Known break: an adaptive white-box attack leaves 0.1 % accuracy (Cornelius et al. 2019, arXiv
    1902.00541, abstract of the first version; the second: 64.3 % of its targets hit).

    Backward rules:
        `identity`: the image itself. `surrogate`, the default: the same choice among differentiable
        codecs, see `JPEG`; to be used with EOT.

    Args:
        preset: `"paper"` (default), as in the authors' code. `"qiu"`: S1's, 8-bit values by
            truncation.
        qualities: JPEG qualities, one or more, each as likely as the others.
        region: Side in pixels of the squares that are chosen apart: 8 is JPEG's own block; a
            square as large as the image gives one quality to all of it.
        subsampling: See `JPEG`.
        rounding: See `JPEG`.

    Convention:
        Squares start at the upper left; those at the right and lower border may be incomplete.
        Squares are cut from whole coded images, so that the chroma of a square of 8 pixels belongs
        to a block of 16. One channel or three; any size.

    Raises:
        RangeError: If a quality is not 1 to 100, or `region` is not a whole number ≥ 1.
        ConfigError: If there is no quality, or one of them twice.
        ShapeError: If there are neither one nor three channels.

    Cost: As many JPEG codecs as there are qualities: four take 4 ms of one CPU core for a 224×224
        image, 5 % of a ResNet-50 forward pass (0.8 ms and 40 % for 32×32, where Pillow's overhead
        per image counts); a view's backward pass through the surrogate four
        times that of `JPEG`.

    Example:
        >>> import torch
        >>> x = torch.full((1, 3, 16, 16), 0.5)
        >>> Shield()(x).unique() * 255
        tensor([128.])

    References:
        Das et al., "SHIELD: fast, practical defense and vaccination for deep learning using JPEG
        compression", KDD 2018, §3; original code, `slq`. Cornelius, "The efficacy of SHIELD under
        different threat models", 2019, arXiv:1902.00541. Qiu et al., arXiv:2005.13712, Table I.

    Deviations:
        The authors' code crops images to whole squares; here the incomplete ones stay.
    """

    differentiable: ClassVar[bool] = False
    stochastic: ClassVar[bool] = True

    def __init__(
        self,
        *,
        preset: str | None = "paper",
        qualities: Sequence[int] = (20, 40, 60, 80),
        region: int = 8,
        subsampling: Subsampling = "4:2:0",
        rounding: Rounding = "nearest",
    ) -> None:
        super().__init__()
        if isinstance(qualities, int) or not qualities or len({*qualities}) < len(qualities):
            raise ConfigError(f"qualities are {qualities!r}; expected different ones, at least one")
        for quality in qualities:
            JPEG(quality=quality, subsampling=subsampling)  # raises if they make no sense
        if type(region) is not int or region < 1:
            raise RangeError(f"region is {region!r}; expected a side in pixels, a whole number ≥ 1")
        to_uint8(torch.zeros(0), rounding)
        self.qualities, self.region = tuple(qualities), region
        self.subsampling, self.rounding = subsampling, rounding
        self.stochastic = len(self.qualities) > 1  # type: ignore[misc]

    def _grid(self, shape: torch.Size) -> tuple[int, int]:
        return -(-shape[-2] // self.region), -(-shape[-1] // self.region)

    def draw(self, keys: Tensor, shape: torch.Size) -> Params:
        """`choice`: which quality each square gets, int64 (B, rows, columns)."""
        return {"choice": random.integers(keys, 0, len(self.qualities), self._grid(shape))}

    def support(
        self, shape: torch.Size, device: torch.device | str | None = None
    ) -> tuple[Params, ...] | None:
        """Every choice, if they are at most 256: up to four squares of four qualities."""
        if not self.stochastic:
            return ({},)
        rows, columns = self._grid(shape)
        # Logarithms would do; the bound keeps the power small.
        if rows * columns > MAX_SUPPORT or len(self.qualities) ** (rows * columns) > MAX_SUPPORT:
            return None
        each = itertools.product(range(len(self.qualities)), repeat=rows * columns)
        return tuple(
            {
                "choice": torch.tensor(choice, device=device)
                .view(1, rows, columns)
                .repeat(shape[0], 1, 1)
            }
            for choice in each
        )

    def transform(self, x: Tensor, params: Params) -> Tensor:
        """Through Pillow's codec at every quality."""

        def codec(images: Tensor, quality: Tensor) -> Tensor:
            return pillow_jpeg(images, quality, self.subsampling, self.rounding)

        return self._mixed(x, params, codec)

    def _mixed(
        self, x: Tensor, params: Params, codec: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """The chosen squares of the images that `codec` makes of `x`."""
        count = len(self.qualities)
        quality = torch.tensor(self.qualities).repeat(len(x))
        coded = codec(x.repeat_interleave(count, 0), quality).unflatten(0, (len(x), count))
        if not self.stochastic or x.numel() == 0:
            return coded[:, 0]
        choice = params["choice"].repeat_interleave(self.region, 1)
        choice = choice.repeat_interleave(self.region, 2)[:, : x.shape[-2], : x.shape[-1]]
        index = choice[:, None, None].expand(-1, 1, x.shape[1], -1, -1)
        return coded.gather(1, index)[:, 0]

    @backward_rule("identity")
    def identity(self, x: Tensor, params: Params) -> Tensor:
        """The image itself."""
        return x

    @backward_rule("surrogate")
    def surrogate(self, x: Tensor, params: Params) -> Tensor:
        """The codecs in tensors, with cubic rounding."""

        def codec(images: Tensor, quality: Tensor) -> Tensor:
            return tensor_jpeg(images, quality, self.subsampling)

        return self._mixed(x, params, codec)
