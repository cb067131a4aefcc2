"""Elastic-net attack to deep networks (EAD)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from feint.attacks._ascent import Stop, Trace
from feint.attacks._minimal import (
    Constants,
    Rows,
    Search,
    check_count,
    check_number,
    column,
    dot,
    flag,
    goal_margin,
)
from feint.core.errors import ConfigError
from feint.core.gradients import GradientEstimator, Model
from feint.core.norms import norm_of
from feint.core.registry import attack

__all__ = ["ead"]

_NORMS = ("l1",)
_CHECKS, _PATIENCE = 10, 2
"""Progress is looked at so often in a round; one that never was adversarial ends after so many
looks in a row without any."""
_GAIN, _VAIN = 0.999, 2
"""So many successful rounds in a row may fail to lessen the size to this share of itself."""
_COMPACT = 10


@dataclass
class _State(Rows):
    rows: Tensor
    x: Tensor
    point: Tensor
    """Where the gradient is taken: the iterate and its momentum."""
    iterate: Tensor
    clock: Tensor
    fell: Tensor
    """Whether a point of this round was adversarial, and one since the last look."""
    late: Tensor
    least: Tensor
    """Least objective of this round, now and at the last look."""
    before: Tensor
    idle: Tensor
    """Looks in a row that it did not fall at."""
    known: Tensor
    """Least size when the last round ended."""
    vain: Tensor
    """Successful rounds in a row that hardly lessened it."""


@attack(
    goal="minimal", knowledge="gradient", norms=_NORMS, paper="Chen et al., 2018, arXiv:1709.04114"
)
def ead(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    beta: float = 0.01,
    rule: Literal["l1", "elastic_net"] = "l1",
    search_steps: int = 9,
    steps: int = 1000,
    step_size: float = 0.01,
    initial_const: float = 1e-3,
    kappa: float = 0.0,
    refine: int = 2,
    targeted: bool = False,
    gradient: GradientEstimator | None = None,
    mask: Tensor | None = None,
    seed: int | Tensor = 0,
    stop: Stop | None = None,
    trace: Trace | None = None,
) -> Tensor:
    r"""Elastic-net attack: least β‖δ‖₁ + ‖δ‖₂² + c·max(κ − margin, 0), by FISTA.

    The weight c of each sample grows tenfold until a round of `steps` ends among adversarial
    points, then it is bisected.

    Convention:
        Images are float RGB, NCHW, in [0, 1].

    Args:
        model: Maps images in [0, 1] to logits (B, K); with `keys=` if it is stochastic.
            Probabilities are taken as if they were logits, with a logged warning.
        x: Images, (B, C, H, W), in [0, 1].
        y: True labels (B,), or targets if `targeted`.
        beta: Weight of the l1 norm, β; the larger, the sparser.
        rule: Which adversarial point is the nearest: by `"l1"`, or by the `"elastic_net"` itself.
        search_steps: Rounds of the search for c.
        steps: Most steps in a round.
        step_size: First step; it falls with the square root of the steps left.
        initial_const: First c.
        kappa: Margin, in logits, that a point must reach to count, κ.
        refine: Forward passes at the end that move the point found back along the line to `x`, to
            where the margin is about to vanish; none on a random model.
        targeted: Seek the class `y` instead of any other.
        gradient: Estimator; by default `backprop`. `eot(30)` for stochastic models.
        mask: Pixels that may change, bool (B or 1, 1 or C, H, W).
        seed: Integer, or one key per sample from `feint.core.random.keys`; only a random model or
            estimator uses it.
        stop: `"success"` ends a sample's round when two tenths of the steps each gained less than
            0.01 % and none was adversarial, ends its search after two successful rounds that
            brought it nearer by less than 0.1 %, and leaves out samples that are adversarial as
            they are; `"never"` takes every step. By default `"success"` for a deterministic model.
        trace: Called as `trace(step, x_adv, logits, loss, active)` at every evaluated point; the
            loss is the margin, cut off at κ.

    Returns:
        x_adv: Like `x`, in [0, 1]: the nearest adversarial point evaluated, or `x` itself where
        there was none or `x` is one. On a random model the point found is moved
        outwards, up to six times as far, until it fools three further estimates, too.

    Raises:
        ConfigError, RangeError, ShapeError, DtypeError, DeviceError: On bad arguments.
        GradientError: If no gradient reaches the input, or one that is not finite.
        ModelError: If the logits are NaN or have the wrong shape.

    Cost:
        Per sample at most search_steps · (steps + 1) times two forward passes and a backward one,
        times the estimator's draws; samples end their rounds and the search one by one. Then
        `refine` forward passes.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> x = torch.rand(2, 3, 2, 2)
        >>> ead(model, x, model(x).argmax(1), steps=5).shape
        torch.Size([2, 3, 2, 2])

    References:
        Chen, Sharma, Zhang, Yi, Hsieh, "EAD: elastic-net attacks to deep neural networks via
        adversarial examples", AAAI 2018, §4, Algorithm 1.

    Deviations:
        The points at which gradients are taken are candidates, too. The threshold of the shrinkage
        is β whatever the step, as in the paper and its code, so that the weight of the l1 norm is
        in effect β over the step, which grows towards the end of a round: a successful round takes
        all of its steps (ended early as in the original, it left l1 norms 1.6 times as large on
        CIFAR-10). Progress is judged per sample. A round counts as a success if its last tenth held
        an adversarial point. The point found is moved back (`refine`).
    """
    for name, count in (("search_steps", search_steps), ("steps", steps)):
        check_count(name, count)
    check_count("refine", refine, least=0)
    settings = {"beta": beta, "step_size": step_size, "initial_const": initial_const}
    for name, value in (*settings.items(), ("kappa", kappa)):
        check_number(name, value)
    if rule not in ("l1", "elastic_net"):
        raise ConfigError(f"rule is {rule!r}; expected 'l1' or 'elastic_net'")
    elastic = rule == "elastic_net"
    search = Search(
        model,
        x,
        y,
        norm="l1",
        norms=_NORMS,
        targeted=targeted,
        gradient=gradient,
        mask=mask,
        seed=seed,
        stop=stop,
        trace=trace,
        measure=(lambda d: beta * norm_of(d, "l1") + dot(d, d)) if elastic else None,
        confidence=kappa,
    )
    if len(x) == 0:
        return x.clone()
    margin = goal_margin(targeted)
    x, zero = search.x, torch.zeros_like(search.start)
    state = _State(
        rows=search.everyone,
        x=x,
        point=x,
        iterate=x,
        clock=torch.zeros_like(search.everyone),
        fell=zero.bool(),
        late=zero.bool(),
        least=torch.full_like(zero, torch.inf),
        before=torch.full_like(zero, torch.inf),
        idle=torch.zeros_like(search.everyone),
        known=torch.full_like(search.size, torch.inf),
        vain=torch.zeros_like(search.everyone),
    )
    weights = Constants.start(len(x), initial_const, zero)
    interval = math.ceil(steps / _CHECKS)
    for step in range(search_steps * (steps + 1)):
        if search.early and (step == 1 or (step and step % _COMPACT == 0)):
            going = (weights.round < search_steps) & (search.size[state.rows] > 0)
            left = (going & (state.vain < _VAIN)).nonzero()[:, 0]
            if len(left) == 0:
                break
            if len(left) < len(state.rows):
                state.keep(left)
                weights.keep(left)
        answer = search.ask(
            state.point, state.rows, lambda z, y: margin(z, y).clamp_max(kappa), step
        )
        hit = answer.hit
        if step:  # both are the clean image at first
            other = search.ask(
                state.iterate, state.rows, margin, step, "iterate", forward_only=True
            )
            hit = hit | other.hit
        delta = state.point - state.x
        distance = dot(delta, delta) + beta * norm_of(delta, "l1")
        objective = distance + weights.c * (kappa - answer.loss)
        late = state.late | hit
        state.fell = state.fell | hit
        slope = 2 * delta - column(weights.c, x) * answer.gradient
        _shrink(search, state, slope, beta, step_size, steps)
        looked = (state.clock - 1) % interval == 0
        state.least = torch.minimum(state.least, objective)
        slow = looked & (state.least > 0.9999 * state.before)
        state.idle = torch.where(slow, state.idle + 1, state.idle.masked_fill(looked, 0))
        state.before = torch.where(looked, state.least, state.before)
        stalled = (state.idle >= _PATIENCE) & ~state.fell
        ended = (state.clock > steps) | (stalled & search.early)
        weights.advance(ended, late)
        state.late = torch.where(looked, hit, late)
        size = search.size[state.rows]
        vain = torch.where(size > _GAIN * state.known, state.vain + 1, 0)
        state.vain = torch.where(ended & late, vain, state.vain)
        state.known = torch.where(ended, size, state.known)
        _restart(state, ended)
    return search.finish(refine)


def _shrink(
    search: Search, state: _State, slope: Tensor, beta: float, step_size: float, steps: int
) -> None:
    """One step of FISTA: gradient, soft threshold towards the clean image, box, momentum."""
    left = (1 - state.clock / steps).clamp_min(0).sqrt()
    length = column(step_size * left, slope)
    delta = state.point - length * slope - state.x
    delta = delta.sign() * (delta.abs() - beta).clamp_min(0)
    iterate = search.confine(state.x + delta, state.rows, state.x)
    pull = column(state.clock / (state.clock + 3.0), slope)
    point = search.confine(iterate + pull * (iterate - state.iterate), state.rows, state.x)
    state.point, state.iterate, state.clock = point, iterate, state.clock + 1


def _restart(state: _State, ended: Tensor) -> None:
    """Begin another round where one has ended."""
    wide = flag(ended, state.x)
    state.point = torch.where(wide, state.x, state.point)
    state.iterate = torch.where(wide, state.x, state.iterate)
    state.clock = state.clock.masked_fill(ended, 0)
    state.fell, state.late = state.fell & ~ended, state.late & ~ended
    state.least = state.least.masked_fill(ended, torch.inf)
    state.before = state.before.masked_fill(ended, torch.inf)
    state.idle = state.idle.masked_fill(ended, 0)
