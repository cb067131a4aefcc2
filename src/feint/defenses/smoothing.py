"""Randomized smoothing: Gaussian noise, a vote, and a certificate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy import special
from torch import Tensor, nn

from feint.core import random
from feint.core.checks import check_images, check_keys, check_labels
from feint.core.clip import clip as clipped
from feint.core.errors import RangeError
from feint.core.gradients import call
from feint.core.registry import defense
from feint.defenses.base import Defense, Params, backward_rule

__all__ = ["ABSTAIN", "Certificate", "Smoothing", "certified_radius", "lower_bound"]

ABSTAIN = -1
"""The prediction of a smoothed classifier that is not sure enough."""


@dataclass(frozen=True)
class Certificate:
    """What `Smoothing.certify` found, sample by sample.

    Attributes:
        prediction: (B,) int64, a class or `ABSTAIN`.
        radius: (B,) float64, certified L2 radius in image units; 0 where it abstains.
        lower: (B,) float64, lower confidence bound of the probability of the class.
        hits: (B,) int64, draws out of `draws` that gave the class.
        draws: n.
        alpha: Chance per sample that the radius is too large.
    """

    prediction: Tensor
    radius: Tensor
    lower: Tensor
    hits: Tensor
    draws: int
    alpha: float

    def certified(self, y: Tensor, radius: float) -> Tensor:
        """Which samples are classified as `y` and certified at `radius` or more: (B,) bool.

        Args:
            y: (B,) int64 true labels.
            radius: L2 distance, in image units.
        """
        check_labels(y, len(self.prediction))
        return (self.prediction == y) & (self.radius >= radius)


@defense("smoothing", paper="Cohen, Rosenfeld, Kolter, 2019, arXiv:1902.02918")
class Smoothing(Defense):
    """Randomized smoothing: Gaussian noise of variance σ² on every value.

    One draw is one noisy image. The smoothed classifier, the class that the model gives most often,
    is `Pipeline(model, Smoothing(), votes=n, combine="majority")`; `predict` and `certify` are the
    paper's procedures, which may abstain.

    Claim: no change of L2 norm below σ·Φ⁻¹(p_A) alters the smoothed classifier's decision; an
    estimate from n draws errs with probability at most α. Known break: none inside of the radius.
    Beyond it an attack on the expected loss over draws (EOT; Salman et al. 2019) works as on any
    other classifier, and a vote of few draws has no certificate.

    Backward rules:
        `exact` (autograd), with EOT over the draws. `identity`: the image itself.

    Args:
        sigma: σ in image units; the paper's are 0.12, 0.25, 0.5 and 1.
        clip: Cut the noisy image to [0, 1]. The certificate holds all the same (the cut belongs to
            the model then), but a model trained on noise without it loses accuracy.

    Convention:
        Without `clip` the model gets values beyond [0, 1], as in the paper; it has to be trained
        on such noise to be of use.

    Raises:
        RangeError: If `sigma` is negative or not finite.

    Cost: One Gaussian number per value: on a 224×224 image 3 % of a ResNet-50 forward pass (one
        CPU thread), nearly all of it in the keyed generator. Certifying a sample takes n0 + n
        forward passes of the model, 100 100 by default.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from feint.core import random
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
        >>> x = torch.rand(3, 3, 2, 2)
        >>> found = Smoothing(sigma=0.5).certify(model, x, random.keys(0, 3), n0=10, n=100)
        >>> found.radius.shape
        torch.Size([3])

    References:
        Cohen, Rosenfeld, Kolter, "Certified adversarial robustness via randomized smoothing", ICML
        2019, Theorem 1 and §3.2. Clopper, Pearson, 1934. Salman et al., "Provably robust deep
        learning via adversarially trained smoothed classifiers", NeurIPS 2019.
    """

    differentiable: ClassVar[bool] = True
    stochastic: ClassVar[bool] = True
    bounded: ClassVar[bool] = False

    def __init__(self, *, sigma: float = 0.25, clip: bool = False) -> None:
        super().__init__()
        if not 0 <= sigma < float("inf"):
            raise RangeError(f"sigma is {sigma}; expected a finite σ ≥ 0 in image units")
        self.sigma, self.clip = float(sigma), bool(clip)
        self.bounded = self.clip  # type: ignore[misc]
        self.stochastic = sigma > 0  # type: ignore[misc]

    def draw(self, keys: Tensor, shape: torch.Size) -> Params:
        """`noise`: standard normal, (B, C, H, W)."""
        return {"noise": random.normal(keys, shape[1:])}

    def transform(self, x: Tensor, params: Params) -> Tensor:
        """X + σ·noise, clipped if that is wanted."""
        if not self.stochastic:
            return x
        noisy = x + self.sigma * params["noise"].to(x.dtype)
        return clipped(noisy) if self.clip else noisy

    @backward_rule("identity")
    def identity(self, x: Tensor, params: Params) -> Tensor:
        """The image itself."""
        return x

    @torch.no_grad()
    def counts(
        self, model: nn.Module, x: Tensor, keys: Tensor, *, n: int, chunk: int = 1024
    ) -> Tensor:
        """How often the model gives each class under noise: (B, K) int64, n in each row.

        Args:
            model: Maps noisy images to logits; gets keys if it takes them.
            x: Images, (B, C, H, W), in [0, 1].
            keys: (B,) int64; draw d of a sample hangs on its key and on d alone.
            n: Draws per sample.
            chunk: Images per forward pass, at most; it changes nothing but time and memory.

        Raises:
            ShapeError, DtypeError, RangeError: If the images, keys or numbers make no sense.

        Cost: n forward passes per sample.
        """
        check_images(x)
        check_keys(keys, len(x))
        if n < 1 or chunk < 1:
            raise RangeError(f"n and chunk are {n}, {chunk}; expected at least 1 each")
        if not self.stochastic:
            raise RangeError("sigma is 0; expected σ > 0: without noise there is nothing to count")
        total: Tensor | None = None
        step = max(1, chunk // max(1, len(x)))
        for start in range(0, n, step):  # chunks of draws that fit into memory
            number = torch.arange(start, min(start + step, n), device=x.device)
            wide = random.fold(keys, "noise", 0, number).flatten()
            images = x.repeat_interleave(len(number), 0)
            noisy = self.replay(images, self.draw(wide, images.shape))
            logits = call(model, noisy, random.fold(wide, "model"))
            votes = nn.functional.one_hot(logits.argmax(-1), logits.shape[-1])
            votes = votes.view(len(x), len(number), logits.shape[-1]).sum(1)
            total = votes if total is None else total + votes
        return total if total is not None else torch.zeros(len(x), 0, dtype=torch.int64)

    def predict(
        self,
        model: nn.Module,
        x: Tensor,
        keys: Tensor,
        *,
        n: int = 1000,
        alpha: float = 0.001,
        chunk: int = 1024,
    ) -> Tensor:
        """The smoothed classifier's class, or `ABSTAIN`: (B,) int64.

        A class is returned if a two-sided binomial test tells its count from the second one's; it
        is another than the smoothed classifier's with probability at most α.

        Args:
            model: See `counts`.
            x: See `counts`.
            keys: See `counts`.
            n: Draws per sample.
            alpha: α, in (0, 1).
            chunk: See `counts`.

        Cost: n forward passes per sample.
        """
        _check_alpha(alpha)
        found = self.counts(model, x, random.fold(keys, "predict"), n=n, chunk=chunk)
        if found.shape[1] < 2:
            return found.argmax(1) if found.shape[1] else _nothing(found)
        best, second = found.topk(2, dim=1).values.cpu().double().numpy().T
        tail = special.betainc(best, second + 1, 0.5)  # P(X ≥ best)
        sure = torch.from_numpy(2 * tail <= alpha).to(x.device)
        return torch.where(sure, found.argmax(1), ABSTAIN)

    def certify(
        self,
        model: nn.Module,
        x: Tensor,
        keys: Tensor,
        *,
        n0: int = 100,
        n: int = 100_000,
        alpha: float = 0.001,
        chunk: int = 1024,
    ) -> Certificate:
        """The smoothed classifier's class with a certified L2 radius, or an abstention.

        A class is chosen by n0 draws, its probability bounded from below by n others.

        Args:
            model: See `counts`.
            x: See `counts`.
            keys: See `counts`.
            n0: Draws per sample for the choice.
            n: Draws per sample for the bound.
            alpha: α, in (0, 1): chance per sample that the statement is wrong.
            chunk: See `counts`.

        Returns:
            The radius is at most σ·Φ⁻¹(α^(1/n)), 3.8 σ by default: what n equal votes can tell.

        Cost: n0 + n forward passes per sample.
        """
        _check_alpha(alpha)
        first = self.counts(model, x, random.fold(keys, "select"), n=n0, chunk=chunk)
        found = self.counts(model, x, random.fold(keys, "estimate"), n=n, chunk=chunk)
        if not first.shape[1]:  # an empty batch of a model that could not be asked
            nothing = _nothing(first)
            return Certificate(nothing, nothing.double(), nothing.double(), nothing, n, alpha)
        candidate = first.argmax(1)
        hits = found.gather(1, candidate[:, None])[:, 0]
        lower = lower_bound(hits, n, alpha)
        sure = lower > 0.5
        radius = certified_radius(lower.clamp_min(0.5), self.sigma)
        return Certificate(torch.where(sure, candidate, ABSTAIN), radius, lower, hits, n, alpha)


def lower_bound(hits: Tensor, n: int, alpha: float) -> Tensor:
    """One-sided Clopper–Pearson lower bound of a probability, at confidence 1 − α: float64.

    Args:
        hits: Successes, 0 … n, any shape.
        n: Trials.
        alpha: Chance that the bound is above the truth.

    Example:
        >>> lower_bound(torch.tensor([0, 100]), 100, 0.001)
        tensor([0.0000, 0.9333], dtype=torch.float64)
    """
    k = hits.cpu().double().numpy()
    bound = torch.as_tensor(special.betaincinv(k.clip(min=1), n - k.clip(min=1) + 1, alpha))
    return torch.where(hits > 0, bound.to(hits.device), 0.0)


def certified_radius(probability: Tensor, sigma: float) -> Tensor:
    """σ·Φ⁻¹(p): the L2 radius that a probability p ≥ ½ of the class certifies (Theorem 1).

    Example:
        >>> certified_radius(torch.tensor([0.5, 0.8413447460685429]).double(), 0.25)
        tensor([0.0000, 0.2500], dtype=torch.float64)
    """
    return sigma * torch.special.ndtri(probability)


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < 1:
        raise RangeError(f"alpha is {alpha}; expected a chance of error, between 0 and 1")


def _nothing(counts: Tensor) -> Tensor:
    """No predictions: (0,)."""
    return counts.new_zeros(len(counts))
