"""Region-based classification: uniform samples of a hypercube around the image."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from feint.core import random
from feint.core.clip import clip
from feint.core.errors import ConfigError, RangeError
from feint.core.registry import defense
from feint.defenses.base import Defense, Params, backward_rule

__all__ = ["RegionBased"]


@defense(
    "region_based",
    paper="Cao, Gong, 2017, arXiv:1709.05583",
    presets={
        "paper": {"radius": 0.02, "edge": "cut"},
        "ace": {"radius": 0.02 * 0.226, "edge": "clip"},
    },
)
class RegionBased(Defense):
    """Region-based classification: a point drawn uniformly from the hypercube around the image.

    One draw is one point; the paper's classifier is the majority vote over many:
    `Pipeline(model, RegionBased(), votes=1000, combine="majority")`.

    Claim: accuracy on clean images is kept and small adversarial changes are undone (Cao & Gong;
    S0 Table 8: 65 % on one-pixel examples). Known break: an attack that looks for hypercubes, not
    points, on the wrong side (He, Li & Song 2018), or EOT; S0 Table 8: 0 % against PGD as it is.

    Backward rules:
        `exact` (autograd), with EOT over the draws. `identity`: the image itself.

    Args:
        preset: `"paper"` (default): the paper's hypercube and its CIFAR-10 radius. `"ace"`: as S0's
            code, 0.02 in normalized units (0.0045 in image units) and no intersection.
        radius: r, half the side of the hypercube, in image units (0.02 on CIFAR-10, 0.3 on MNIST).
        edge: `"cut"`: uniform on what of the hypercube lies in [0, 1]; `"clip"`: uniform on the
            whole hypercube, then clipped.

    Raises:
        RangeError: If `radius` is not in [0, 1].
        ConfigError: If `edge` is unknown.

    Cost: One random number per value and vote: on a 224×224 image 3 % of a ResNet-50 forward pass
        (one CPU thread), nearly all of it in the keyed generator. The vote is the cost: 1000
        forward passes of the classifier (10 000 in the paper).

    Example:
        >>> import torch
        >>> from feint.core import random
        >>> x = torch.full((2, 3, 8, 8), 0.5)
        >>> y = RegionBased(radius=0.1)(x, keys=random.keys(0, 2))
        >>> bool(((y - x).abs() <= 0.1).all())
        True

    References:
        Cao, Gong, "Mitigating evasion attacks to deep neural networks via region-based
        classification", ACSAC 2017, §4. He, Li, Song, "Decision boundary analysis of adversarial
        examples", ICLR 2018. Original code of S0, region-based baseline.

    Deviations:
        S0's radius is the same number in each normalized channel; here it is 0.02 times the mean
        of the three standard deviations (0.229, 0.224, 0.225), and values are clipped to [0, 1].
    """

    differentiable: ClassVar[bool] = True
    stochastic: ClassVar[bool] = True

    def __init__(
        self,
        *,
        preset: str | None = "paper",
        radius: float = 0.02,
        edge: Literal["cut", "clip"] = "cut",
    ) -> None:
        super().__init__()
        if not 0 <= radius <= 1:
            raise RangeError(f"radius is {radius}; expected r in [0, 1], in image units")
        if edge not in ("cut", "clip"):
            raise ConfigError(f"edge is {edge!r}; expected 'cut' or 'clip'")
        self.radius, self.edge = float(radius), edge
        self.stochastic = radius > 0  # type: ignore[misc]

    def draw(self, keys: Tensor, shape: torch.Size) -> Params:
        """`place`: position along each side of the hypercube, in [0, 1), (B, C, H, W)."""
        return {"place": random.uniform(keys, shape[1:])}

    def transform(self, x: Tensor, params: Params) -> Tensor:
        """The point of the hypercube."""
        if not self.stochastic:
            return x
        place = params["place"].to(x.dtype)
        if self.edge == "clip":
            return clip(x + self.radius * (2 * place - 1))
        low, high = clip(x - self.radius), clip(x + self.radius)
        return low + (high - low) * place

    @backward_rule("identity")
    def identity(self, x: Tensor, params: Params) -> Tensor:
        """The image itself."""
        return x
