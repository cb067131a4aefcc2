"""Noise in front of the classifier: Gaussian, uniform or sign."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from feint.core import random
from feint.core.clip import clip
from feint.core.errors import ConfigError, RangeError
from feint.core.registry import defense
from feint.defenses.base import Defense, Params, backward_rule

__all__ = ["Noise"]


@defense("noise", paper="Folz et al. 2018, arXiv 1803.07994 (S2SNet), noise layer")
class Noise(Defense):
    """Independent noise on every value, then clipping to [0, 1].

    At equal `scale` σ, Gaussian N(0, σ²) and sign noise σ·{−1, +1} have the same variance σ², and
    uniform U(−σ, σ) a third of it.

    Claim: a noise layer blunts attacks made without it (S3). Known break: averaging the loss over
    draws (EOT).

    Backward rules:
        `exact` (autograd; zero where the clipping bites) is the best one; `identity` ignores noise
        and clipping.

    Args:
        kind: `"gaussian"`, `"uniform"` or `"sign"`.
        scale: σ in image units, such as 8/255; 0 leaves the image as it is.

    Convention:
        The sum is clipped to [0, 1], so that the output is an image; values at the ends of the
        range lose half of the noise.

    Raises:
        ConfigError: If the kind is unknown.
        RangeError: If the scale is negative.

    Cost: One random number per value: on a 299×299 image Gaussian noise takes 6 %, uniform 4 %
        and sign noise 1 % of a ResNet-50 forward pass at 224×224 (one CPU thread), nearly all of
        it in the keyed generator.

    Example:
        >>> import torch
        >>> from feint.core import random
        >>> x = torch.full((2, 3, 8, 8), 0.5)
        >>> noisy = Noise(kind="sign", scale=0.1)(x, keys=random.keys(0, 2))
        >>> bool(torch.allclose((noisy - x).abs(), torch.tensor(0.1)))
        True

    References:
        Folz, Palacio, Hees, Dengel, "Adversarial defense based on structure-to-signal
        autoencoders", arXiv 1803.07994, section on random noise.

    Deviations:
        The paper does not say whether it clips, nor its scales in image units.
    """

    differentiable: ClassVar[bool] = True
    stochastic: ClassVar[bool] = True

    def __init__(
        self, *, kind: Literal["gaussian", "uniform", "sign"] = "gaussian", scale: float = 8 / 255
    ) -> None:
        super().__init__()
        if kind not in ("gaussian", "uniform", "sign"):
            raise ConfigError(f"kind is {kind!r}; expected 'gaussian', 'uniform' or 'sign'")
        if not scale >= 0:
            raise RangeError(f"scale is {scale}; expected σ ≥ 0 in image units")
        self.kind, self.scale = kind, float(scale)
        self.stochastic = scale > 0  # type: ignore[misc]

    def draw(self, keys: Tensor, shape: torch.Size) -> Params:
        """`noise`: of unit scale, (B, C, H, W)."""
        if self.kind == "gaussian":
            return {"noise": random.normal(keys, shape[1:])}
        if self.kind == "uniform":
            return {"noise": random.uniform(keys, shape[1:], -1.0, 1.0)}
        count = shape[1:].numel()
        packed = random.words(keys, -(-count // 32))
        bits = (packed[..., None] >> torch.arange(32, device=keys.device)) & 1
        signs = 2.0 * bits.flatten(-2)[..., :count] - 1.0
        return {"noise": signs.reshape(*keys.shape, *shape[1:])}

    def transform(self, x: Tensor, params: Params) -> Tensor:
        """X + σ·noise, clipped."""
        if not self.stochastic:
            return x
        return clip(x + self.scale * params["noise"].to(x.dtype))

    @backward_rule("identity")
    def identity(self, x: Tensor, params: Params) -> Tensor:
        """The image itself."""
        return x
