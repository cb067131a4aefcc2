"""ME-Net: drop pixels at random, fill them in by low-rank matrix estimation."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from feint.core import random
from feint.core.errors import ConfigError, RangeError
from feint.core.registry import defense
from feint.defenses._spectral import soft_threshold, truncate
from feint.defenses.base import Defense, Params, backward_rule

__all__ = ["MENet"]

_ROUNDING = 1e-9


@defense(
    "me_net",
    paper="Yang, Zhang, Katabi, Xu, 2019, arXiv:1905.11971",
    presets={"repo": {"keep": 0.9}, "robust": {"keep": 0.5}},
)
class MENet(Defense):
    """ME-Net: entries of the image are dropped at random and estimated from a low-rank matrix.

    The image, scaled to [−1, 1], is one matrix of H rows with its channels side by side.

    Claim: it outperforms earlier defenses against black-box and white-box attacks (Yang et al.,
    abstract). Known break: on adversarially trained weights BPDA with the identity leaves 49.7 %,
    averaged over 40 draws (EOT) 26.0 % (Tramèr et al. 2020, their notebook; S1 Table IV has 13 %).

    Backward rules:
        `exact`, the default: for given draws the estimate is smooth wherever singular values are
        distinct, and autograd gives its true gradient. Entries that a draw drops have none, so use
        it with EOT. `identity`: the published break's.

    Args:
        preset: `"repo"` (default) is the authors' code as it runs by default: at test time the mean
            of the training's 0.8 and 1. `"robust"`: the weights that Tramèr et al. attacked, made
            with shares from 0.4 to 0.6.
        keep: Probability that an entry is observed, in (0, 1].
        method: `"usvt"`: the largest singular values are kept, the result divided by the share of
            observed entries. `"nuclear"`: the minimum of μ‖W‖_* + Σ over observed (W − A)².
        rank: Share of the H singular values that `"usvt"` keeps, in (0, 1].
        mu: μ of `"nuclear"`.
        steps: Accelerated proximal steps of `"nuclear"`.
        channels: `"concat"`: one matrix (H, C·W), each entry dropped by itself. `"separate"`: one
            matrix per channel, pixels dropped with all their channels.

    Convention:
        At least one singular value is kept; if nothing is observed the result is mid-gray. Any
        size, any number of channels. The estimate is computed in float64.

    Raises:
        RangeError: If `keep` or `rank` is not in (0, 1], `mu` not above 0, `steps` below 1.
        ConfigError: If `method` or `channels` is unknown.

    Cost: An eigendecomposition of an H×H matrix per image, in float64: 13 % of a ResNet-50 forward
        pass for 224×224, 8 % for 32×32 (one CPU thread). `"nuclear"` has one per step: 100 steps
        take ten forward passes for 224×224.

    Example:
        >>> import torch
        >>> x = torch.rand(2, 3, 16, 16)
        >>> MENet()(x).shape
        torch.Size([2, 3, 16, 16])

    References:
        Yang, Zhang, Katabi, Xu, "ME-Net: towards effective adversarial robustness with matrix
        estimation", ICML 2019; original code, `train_pure.py`. Chatterjee, "Matrix estimation by
        universal singular value thresholding", 2015. Beck, Teboulle, 2009 (acceleration). Tramèr,
        Carlini, Brendel, Madry, "On adaptive attacks to adversarial example defenses", 2020.

    Deviations:
        The code's USVT keeps ⌊rank·H⌋ values, whatever their size, and so it is here; Chatterjee's
        threshold is not used. The code solves `"nuclear"` by a conic solver; the minimum is the
        same. The result is not rounded to 8 bits, as the code's stored data are.
    """

    differentiable: ClassVar[bool] = True
    stochastic: ClassVar[bool] = True

    def __init__(
        self,
        *,
        preset: str | None = "repo",
        keep: float = 0.9,
        method: Literal["usvt", "nuclear"] = "usvt",
        rank: float = 0.8,
        mu: float = 1.0,
        steps: int = 100,
        channels: Literal["concat", "separate"] = "concat",
    ) -> None:
        super().__init__()
        for name, value in (("keep", keep), ("rank", rank)):
            if not 0 < value <= 1:
                raise RangeError(f"{name} is {value}; expected a share in (0, 1]")
        if method not in ("usvt", "nuclear"):
            raise ConfigError(f"method is {method!r}; expected 'usvt' or 'nuclear'")
        if channels not in ("concat", "separate"):
            raise ConfigError(f"channels is {channels!r}; expected 'concat' or 'separate'")
        if not 0 < mu < float("inf"):
            raise RangeError(f"mu is {mu}; expected a finite μ > 0")
        if type(steps) is not int or steps < 1:
            raise RangeError(f"steps is {steps!r}; expected a whole number ≥ 1")
        self.keep, self.rank, self.mu = float(keep), float(rank), float(mu)
        self.method, self.steps, self.channels = method, steps, channels
        self.stochastic = keep < 1  # type: ignore[misc]

    def draw(self, keys: Tensor, shape: torch.Size) -> Params:
        """`mask`: what is observed, bool, (B, C or 1, H, W)."""
        c = shape[1] if self.channels == "concat" else 1
        return {"mask": random.uniform(keys, (c, *shape[2:])) < self.keep}

    def transform(self, x: Tensor, params: Params) -> Tensor:
        """The estimate."""
        if x.numel() == 0:
            return x.clone()
        a = 2 * x.double() - 1
        mask = params["mask"].expand_as(x) if self.stochastic else torch.ones_like(x)
        estimate = self._folded(
            self._estimate(self._matrix(a), self._matrix(mask.to(a.dtype))), x.shape
        )
        return _cut((estimate + 1) / 2).to(x.dtype)

    def _matrix(self, a: Tensor) -> Tensor:
        """(B, H, C·W), or (B, C, H, W) as it is."""
        return a.transpose(1, 2).flatten(2) if self.channels == "concat" else a

    def _folded(self, a: Tensor, shape: torch.Size) -> Tensor:
        if self.channels == "separate":
            return a
        return a.unflatten(2, (shape[1], shape[3])).transpose(1, 2)

    def _estimate(self, a: Tensor, mask: Tensor) -> Tensor:
        if self.method == "usvt":
            height, width = a.shape[-2:]
            observed = mask.mean((-2, -1), keepdim=True)
            kept = min(max(1, int(self.rank * height)), width)
            return truncate(a * mask, kept) / observed.clamp_min(0.5 / (height * width))
        found = ahead = a * mask
        weight = 1.0
        for _ in range(self.steps):
            last, old = found, weight
            found = soft_threshold(ahead + mask * (a - ahead), self.mu / 2)
            weight = (1 + (1 + 4 * old**2) ** 0.5) / 2
            ahead = found + (old - 1) / weight * (found - last)
        return found

    @backward_rule("identity")
    def identity(self, x: Tensor, params: Params) -> Tensor:
        """The image itself."""
        return x


def _cut(y: Tensor) -> Tensor:
    """`y` cut to [0, 1]; black and white, beyond it by rounding alone, keep their gradient."""
    y = torch.where(y < -_ROUNDING, 0.0, torch.where(y > 1 + _ROUNDING, 1.0, y))
    return y + (y.detach().clamp(0, 1) - y.detach())
