"""Decoupled direction and norm (DDN)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from feint.attacks._ascent import Stop, Trace
from feint.attacks._minimal import Rows, Search, check_count, check_number, column, goal_log_odds
from feint.core.gradients import GradientEstimator, Model
from feint.core.losses import Loss, get_loss
from feint.core.norms import norm_of, steepest_ascent
from feint.core.registry import attack

__all__ = ["ddn"]

_NORMS = ("l2",)


@dataclass
class _State(Rows):
    rows: Tensor
    x: Tensor
    point: Tensor
    eps: Tensor
    most: Tensor


@attack(
    goal="minimal", knowledge="gradient", norms=_NORMS, paper="Rony et al., 2019, arXiv:1811.09600"
)
def ddn(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    steps: int = 100,
    step_size: float = 1.0,
    gamma: float = 0.05,
    initial_norm: float = 1.0,
    refine: int = 2,
    targeted: bool = False,
    loss: str | Loss = "cross_entropy",
    gradient: GradientEstimator | None = None,
    mask: Tensor | None = None,
    seed: int | Tensor = 0,
    stop: Stop | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """Decoupled direction and norm: walk on a sphere that shrinks after a hit and grows after none.

    Each step follows the normalised gradient, then rescales the perturbation to a radius that is
    multiplied by 1 − γ if the point was adversarial and by 1 + γ if not.

    Convention:
        Images are float RGB, NCHW, in [0, 1]; lengths are l2 norms in the same units.

    Args:
        model: Maps images in [0, 1] to logits (B, K); with `keys=` if it is stochastic.
            Probabilities are taken as if they were logits, with a logged warning.
        x: Images, (B, C, H, W), in [0, 1].
        y: True labels (B,), or targets if `targeted`.
        steps: Number of steps.
        step_size: Length of the first step; it falls to a hundredth along a cosine.
        gamma: Relative change of the radius per step, γ.
        initial_norm: First radius.
        refine: Forward passes at the end that move the point found back along the line to `x`, to
            where the margin is about to vanish; none on a random model.
        targeted: Seek the class `y` instead of any other.
        loss: `"cross_entropy"` (the paper's), `"margin"`, which comes nearer where several classes
            are about as likely, `"dlr"`, or a function to maximise.
        gradient: Estimator; by default `backprop`. `eot(30)` for stochastic models.
        mask: Pixels that may change, bool (B or 1, 1 or C, H, W).
        seed: Integer, or one key per sample from `feint.core.random.keys`; only a random model or
            estimator uses it.
        stop: `"success"` leaves out samples that are adversarial as they are, `"never"` takes every
            step with them, too; by default `"success"` for a deterministic model.
        trace: Called as `trace(step, x_adv, logits, loss, active)` at every evaluated point; the
            loss is the log odds of the attacker's classes, or the loss given.

    Returns:
        x_adv: Like `x`, in [0, 1]: the nearest adversarial point evaluated, or `x` itself where
        there was none or `x` is one. On a random model the point found is moved
        outwards, up to six times as far, until it fools three further estimates, too.

    Raises:
        ConfigError, RangeError, ShapeError, DtypeError, DeviceError: On bad arguments.
        GradientError: If no gradient reaches the input, or one that is not finite.
        ModelError: If the logits are NaN or have the wrong shape.

    Cost:
        Per sample steps + 1 + `refine` forward and `steps` backward passes, times the
        estimator's draws.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> x = torch.rand(2, 3, 2, 2)
        >>> ddn(model, x, model(x).argmax(1), steps=5).shape
        torch.Size([2, 3, 2, 2])

    References:
        Rony, Hafemann, Oliveira, Ben Ayed, Sabourin, Granger, "Decoupling direction and norm for
        efficient gradient-based L2 adversarial attacks and defenses", CVPR 2019, Algorithm 1.

    Deviations:
        Cross-entropy is computed as log odds: their gradient has the same direction, which is all
        that is used, and does not underflow on confident models. No rounding to 256 levels. The
        point after the last step is evaluated, too, and the point found is moved back (`refine`).
    """
    check_count("steps", steps)
    check_count("refine", refine, least=0)
    check_number("step_size", step_size)
    check_number("gamma", gamma, high=1.0)
    check_number("initial_norm", initial_norm)
    search = Search(
        model,
        x,
        y,
        norm="l2",
        norms=_NORMS,
        targeted=targeted,
        gradient=gradient,
        mask=mask,
        seed=seed,
        stop=stop,
        trace=trace,
    )
    rise = goal_log_odds(targeted) if loss == "cross_entropy" else get_loss(loss, targeted)
    if len(x) == 0:
        return x.clone()
    x = search.x
    most = norm_of(torch.maximum(x, 1 - x), "l2")
    state = _State(search.everyone, x, x, torch.full_like(most, initial_norm), most)
    for step in range(steps + 1):
        answer = search.ask(state.point, state.rows, rise, step, forward_only=step == steps)
        if step == steps:
            break
        slope, hit = answer.gradient, answer.hit
        if step == 0 and search.early:
            left = search.unsolved(state.rows)
            if len(left) == 0:
                break
            state.keep(left)
            slope, hit = slope[left], hit[left]
        length = step_size * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)
        delta = state.point - state.x + length * steepest_ascent(slope, "l2")
        factor = torch.where(hit, 1 - gamma, 1 + gamma)
        state.eps = torch.minimum(state.eps * factor, state.most)
        delta = column(state.eps, delta) * steepest_ascent(delta, "l2")
        state.point = search.confine(state.x + delta, state.rows, state.x)
    return search.finish(refine)
