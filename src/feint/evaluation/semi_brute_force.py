"""Semi-brute force: gradients from what is differentiable, every round tried against the whole."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from feint.attacks._ascent import Trace
from feint.attacks.pgd import pgd
from feint.core import random
from feint.core.errors import RangeError
from feint.core.gradients import (
    Estimate,
    GradientEstimator,
    Model,
    backprop,
    call,
    eot,
    is_stochastic,
    require_gradient,
)
from feint.core.losses import Loss
from feint.defenses.base import Defense
from feint.defenses.chain import Chain
from feint.evaluation.judge import Judgement, judge
from feint.evaluation.metrics import Rate, rate
from feint.evaluation.pipeline import Pipeline
from feint.evaluation.rounds import History, watched

__all__ = ["Campaign", "differentiable_parts", "round_by_round", "semi_brute_force"]


def differentiable_parts(defense: Defense) -> Defense | None:
    """Those parts of a defense that declare themselves differentiable, in order; None if none."""
    members = defense.members if isinstance(defense, Chain) else (defense,)
    kept = [part for part in members if part.differentiable]
    if len(kept) == len(members):
        return defense
    return None if not kept else kept[0] if len(kept) == 1 else Chain(kept).eval()


def round_by_round(part: nn.Module, base: GradientEstimator = backprop) -> GradientEstimator:
    """Gradients and losses of `part`, while the attacked model only says who has fallen.

    Whatever gradient attack runs under it, with `stop="success"`, is a semi-brute force: every
    point that it evaluates is tried against the whole once, with one fresh draw, and a sample
    leaves with the first image that gets through.

    Args:
        part: Maps images in [0, 1] to logits and is differentiable.
        base: How `part` is differentiated.

    Cost: that of `base` on `part`, and one forward pass of the whole.
    """
    checked = False

    def estimate(
        model: Model, x: Tensor, y: Tensor, loss: Loss, keys: Tensor, *, forward_only: bool = False
    ) -> Estimate:
        nonlocal checked
        with torch.no_grad():
            logits = call(model, x, random.fold(keys, "tried"))
        found = base(part, x, y, loss, keys, forward_only=forward_only)
        if not (checked or forward_only):
            require_gradient(part, x, keys, found.gradient)
            checked = True
        return Estimate(logits[:, None], found.gradient, found.loss)

    estimate.__qualname__ = "round_by_round"
    # Its zeros were looked at already, on the part that they come from.
    estimate.scores_only = True  # type: ignore[attr-defined]
    return estimate


@dataclass(frozen=True, kw_only=True)
class Campaign(History):
    """A semi-brute force, round by round, and what its hits are worth on fresh draws."""

    x_adv: Tensor
    """(N, C, H, W): the first image that got through, or the last one tried."""
    verified: Judgement
    """Every `x_adv`, judged on draws that no round has seen."""
    target: Tensor | None

    @property
    def held(self) -> Rate:
        """Share of fresh draws on which the images that were hit succeed again.

        Raises:
            RangeError: If no image was hit.
        """
        hit = self.first_hit >= 0
        if not hit.any():
            raise RangeError("no image was hit, so there is nothing to verify")
        return rate(self._wins()[hit], self.verified.draws)

    @property
    def honest(self) -> Rate:
        """Share of fresh draws on which the attack succeeds, over all images."""
        return rate(self._wins(), self.verified.draws)

    def _wins(self) -> NDArray[np.float64]:
        judged = self.verified
        if self.target is None:
            found = 1 - judged.correct.double() / judged.draws
        else:
            found = judged.hits(self.target.cpu()).double() / judged.draws
        return np.asarray(found.numpy())


def semi_brute_force(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    defense: Defense | None = None,
    target: Tensor | None = None,
    rounds: int = 50,
    draws: int = 8,
    norm: str = "linf",
    eps: float = 8 / 255,
    step_size: float | None = None,
    loss: str = "cross_entropy",
    judge_draws: int = 100,
    seed: int = 0,
    index: Tensor | None = None,
    batch_size: int = 64,
) -> Campaign:
    """Attack what is differentiable, try against the whole, round after round (S1 §VI-D).

    Each round takes one step of PGD on the pipeline without its non-differentiable parts, and tries
    the image against the whole pipeline with one fresh draw. A sample leaves with the first image
    that gets through. Such a hit is luck in part: every image is therefore judged on fresh draws.

    Args:
        model: Maps images in [0, 1] to logits.
        x: Images, (N, C, H, W), in [0, 1].
        y: True labels, (N,).
        defense: What stands in front of the model.
        target: Targets, (N,), for a targeted attack.
        rounds: Steps of the attack; round 0 is its start, the clean image.
        draws: Draws that a gradient is averaged over where the differentiable parts are random.
        norm: The threat model's norm: `"linf"`, `"l2"` or `"l1"`.
        eps: Its budget; S1's rms of 0.05 is `eps=rms_budget(0.05, x.shape)` with `norm="l2"`.
        step_size: As for `feint.attacks.pgd`.
        loss: As there.
        judge_draws: Fresh draws on which every image is judged in the end.
        seed: Seed of every draw.
        index: Indices of the samples in their data set, (N,); by default 0 … N−1.
        batch_size: Images per call of the attack.

    Returns:
        Hits by round (S1 Fig. 3 e–f), rounds to a share of hits (S1 Table II) and what the hits
        hold on fresh draws.

    Raises:
        ConfigError, RangeError, ShapeError, DtypeError: On bad arguments.
        GradientError: If the differentiable parts give no gradient.

    Cost: Per sample and round `draws` (or 1) forward and backward passes of the differentiable
        parts and one forward pass of the whole; `judge_draws` forward passes in the end.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
        >>> x = torch.rand(4, 3, 2, 2)
        >>> found = semi_brute_force(model, x, model(x).argmax(1), rounds=5, eps=0.5)
        >>> len(found.success), found.success[-1].value >= found.success[0].value
        (6, True)

    References:
        Qiu, Zeng, Zheng, Gong, Zhang, Qiu, "Mitigating advanced adversarial attacks with more
        advanced gradient obfuscation techniques", arXiv 2005.13712, §VI-D, Fig. 3 e–f, Table II.

    Deviations:
        Steps are projected; the original adds raw gradients and gives an image up once it leaves
        the ball. No random start. Every hit is judged again; the original counts it as it is.
    """
    if rounds < 1 or batch_size < 1:
        raise RangeError(f"rounds, batch_size are {rounds}, {batch_size}; expected at least 1")
    whole = Pipeline(model, defense)
    part = Pipeline(model, None if defense is None else differentiable_parts(defense)).view()
    base = eot(draws) if is_stochastic(part) else backprop
    index = torch.arange(len(x), device=x.device) if index is None else index
    keys = random.keys(seed, index).to(x.device)
    goal = y if target is None else target

    def attack(pick: slice, trace: Trace) -> Tensor:
        return pgd(
            whole,
            x[pick],
            goal[pick],
            eps=eps,
            norm=norm,
            steps=rounds,
            step_size=step_size,
            random_start=False,
            targeted=target is not None,
            loss=loss,
            gradient=round_by_round(part, base),
            seed=random.fold(keys[pick], "attack"),
            stop="success",
            trace=trace,
        )

    x_adv, found = watched(attack, x, y, target, rounds=rounds, batch_size=batch_size)
    verified = judge(whole, x_adv, y, keys, draws=judge_draws, batch_size=4 * batch_size)
    return Campaign(
        first_hit=found.first_hit, right=found.right, x_adv=x_adv, verified=verified, target=target
    )
