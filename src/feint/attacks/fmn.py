"""Fast minimum norm (FMN)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from feint.attacks._ascent import Stop, Trace
from feint.attacks._boxed import ball_in_box, movable
from feint.attacks._minimal import (
    Answer,
    Rows,
    Search,
    check_count,
    check_number,
    goal_margin,
)
from feint.core.errors import RangeError
from feint.core.gradients import GradientEstimator, Model
from feint.core.norms import norm_of, project, steepest_ascent
from feint.core.registry import attack

__all__ = ["fmn"]

_NORMS = ("l2", "linf", "l1", "l0")
_DUAL = {"l2": "l2", "linf": "l1", "l1": "linf"}


@dataclass
class _State(Rows):
    rows: Tensor
    x: Tensor
    point: Tensor
    eps: Tensor
    most: Tensor


@attack(
    goal="minimal",
    knowledge="gradient",
    norms=_NORMS,
    paper="Pintor et al., 2021, arXiv:2102.12827",
)
def fmn(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    norm: str = "l2",
    steps: int = 100,
    step_size: float = 1.0,
    gamma: float = 0.05,
    refine: int = 2,
    targeted: bool = False,
    gradient: GradientEstimator | None = None,
    mask: Tensor | None = None,
    seed: int | Tensor = 0,
    stop: Stop | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """Fast minimum norm: a projected ascent whose radius follows the boundary, in any norm.

    Until the first success the radius is the distance of the linearised boundary times 1 + γ; from
    then on it shrinks by 1 − γ after a hit and grows by 1 + γ after none. γ falls along a cosine.

    Convention:
        Images are float RGB, NCHW, in [0, 1]. l0 counts changed pixels, whatever their channels.

    Args:
        model: Maps images in [0, 1] to logits (B, K); with `keys=` if it is stochastic.
            Probabilities are taken as if they were logits, with a logged warning.
        x: Images, (B, C, H, W), in [0, 1].
        y: True labels (B,), or targets if `targeted`.
        norm: `"l2"`, `"linf"`, `"l1"` or `"l0"`.
        steps: Number of steps.
        step_size: l2 length of the first step, whatever the norm (at most 1 for linf); it falls to
            a hundredth along a cosine.
        gamma: First relative change of the radius per step, γ; it falls to a fiftieth.
        refine: Forward passes at the end that move the point found back along the line to `x`, to
            where the margin is about to vanish (not for l0); none on a random model.
        targeted: Seek the class `y` instead of any other.
        gradient: Estimator; by default `backprop`. `eot(30)` for stochastic models.
        mask: Pixels that may change, bool (B or 1, 1 or C, H, W).
        seed: Integer, or one key per sample from `feint.core.random.keys`; only a random model or
            estimator uses it.
        stop: `"success"` leaves out samples that are adversarial as they are, `"never"` takes every
            step with them, too; by default `"success"` for a deterministic model.
        trace: Called as `trace(step, x_adv, logits, loss, active)` at every evaluated point; the
            loss is the margin.

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
        >>> fmn(model, x, model(x).argmax(1), norm="linf", steps=5).shape
        torch.Size([2, 3, 2, 2])

    References:
        Pintor, Roli, Brendel, Biggio, "Fast minimum-norm adversarial attacks through adaptive norm
        constraints", NeurIPS 2021, Algorithm 1.

    Deviations:
        The distance of the linearised boundary is exceeded by γ, since a model that is linear would
        else never be crossed. l0 counts pixels, not values: a projection keeps the pixels of
        largest l2 change. Values at an end of the box that would have to leave it are not part of a
        step, and the projection is onto the ball within the box (clipping after it shrinks what is
        left, so that l1 stands still on images with values at 0 and 1). The point after the last
        step is evaluated, too, and the point found is moved back (`refine`). No start from a given
        adversarial point.
    """
    check_count("steps", steps)
    check_count("refine", refine, least=0)
    check_number("step_size", step_size)
    check_number("gamma", gamma, high=1.0)
    search = Search(
        model,
        x,
        y,
        norm=norm,
        norms=_NORMS,
        targeted=targeted,
        gradient=gradient,
        mask=mask,
        seed=seed,
        stop=stop,
        trace=trace,
    )
    if norm == "linf" and step_size > 1:
        raise RangeError(
            f"step_size is {step_size:g} for linf; expected at most 1, the l2 length of the first "
            f"step; write {step_size:g}/255 if it is in 0…255 units"
        )
    if len(x) == 0:
        return x.clone()
    loss = goal_margin(targeted)
    x = search.x
    most = norm_of(torch.maximum(x, 1 - x), norm)
    eps = torch.full_like(most, 1.0 if norm == "l0" else torch.inf)
    state = _State(search.everyone, x, x, eps, most)
    for step in range(steps + 1):
        answer = search.ask(state.point, state.rows, loss, step, forward_only=step == steps)
        if step == steps:
            break
        if step == 0 and search.early:
            left = search.unsolved(state.rows)
            if len(left) == 0:
                break
            state.keep(left)
            answer = answer.take(left)
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        factor = gamma * (0.02 + 0.98 * cosine)
        state.eps = _radius(search, state, answer, norm, factor)
        length = step_size * (0.01 + 0.99 * cosine)
        slope = movable(answer.gradient, state.point)
        delta = state.point - state.x + length * steepest_ascent(slope, "l2")
        if norm == "l0":
            delta = project(delta.clamp(-state.x, 1 - state.x), norm, state.eps)
        else:
            delta = ball_in_box(delta, state.x, norm, state.eps)
        state.point = search.confine(state.x + delta, state.rows, state.x)
    return search.finish(0 if norm == "l0" else refine)


def _radius(search: Search, state: _State, answer: Answer, norm: str, gamma: float) -> Tensor:
    """The next radius of each row."""
    size = search.size[state.rows].to(state.eps.dtype)
    if norm == "l0":
        less = torch.minimum(state.eps - 1, (state.eps * (1 - gamma)).floor()).minimum(size)
        more = torch.maximum(state.eps + 1, (state.eps * (1 + gamma)).floor())
        return torch.where(answer.hit, less, more).clamp_min(0).minimum(state.most)
    slope = movable(answer.gradient, state.point)
    steepness = norm_of(slope, _DUAL[norm]).clamp_min(1e-12)
    ahead = norm_of(state.point - state.x, norm) + answer.loss.abs() / steepness
    missed = torch.where(size.isfinite(), state.eps, ahead) * (1 + gamma)
    inside = torch.minimum(state.eps * (1 - gamma), size)
    return torch.where(answer.hit, inside, missed).minimum(state.most)
