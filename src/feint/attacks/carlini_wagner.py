"""Carlini and Wagner's L2 attack."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
from feint.core.gradients import GradientEstimator, Model
from feint.core.registry import attack

__all__ = ["carlini_wagner"]

_NORMS = ("l2",)
_REACH = 0.505
"""Images are ½ + _REACH · tanh(w): it reaches beyond the box, so that the ends have a slope."""
_CHECKS, _APART = 50, 10
"""Progress is looked at so often in a round, but at least so many steps apart."""
_PROGRESS = 0.999
"""Between two looks the least objective must fall below this share of itself."""
_SHORTER = 0.2
"""Where it did not, the steps shrink to this share."""
_SHORTEST = 0.05
"""The least share of `step_size` that is still shortened."""
_GAIN, _PATIENCE = 0.999, 1
"""So many rounds in a row may fail to lessen the distance to this share of itself."""
_COMPACT = 10
"""Steps between two compactions of the batch."""


@dataclass
class _State(Rows):
    rows: Tensor
    x: Tensor
    origin: Tensor
    """The clean image in the space of the optimiser."""
    w: Tensor
    first: Tensor
    """Adam's moments."""
    second: Tensor
    clock: Tensor
    """Steps taken in this round."""
    age: Tensor
    """Adam's steps since its moments were last forgotten."""
    length: Tensor
    """Adam's present learning rate."""
    fell: Tensor
    """Whether a point since the last look was adversarial."""
    least: Tensor
    """Least objective of this round, now and at the last look."""
    before: Tensor
    known: Tensor
    """Least distance when the last round ended."""
    idle: Tensor
    """Rounds in a row that hardly lessened it."""


@attack(
    goal="minimal",
    knowledge="gradient",
    norms=_NORMS,
    paper="Carlini and Wagner, 2017, arXiv:1608.04644",
    presets={
        "original": {"search_steps": 9, "steps": 10000, "step_size": 0.01, "initial_const": 1e-3},
        "ace": {"search_steps": 10, "steps": 100, "step_size": 0.01, "initial_const": 1e-3},
        "qiu": {
            "search_steps": 5,
            "steps": 1000,
            "step_size": 0.1,
            "initial_const": 1e-2,
            "kappa": 10.0,
            "targeted": True,
        },
    },
)
def carlini_wagner(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    preset: str | None = None,
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
    r"""Carlini and Wagner's L2 attack: least ‖δ‖₂² + c·max(κ − margin, 0), by Adam in tanh space.

    The weight c of each sample grows tenfold until a round of `steps` ends among adversarial
    points, then it is bisected. Every sample has its own clock: its rounds begin and end, and it
    leaves the batch, whatever the others do.

    Convention:
        Images are float RGB, NCHW, in [0, 1].

    Args:
        model: Maps images in [0, 1] to logits (B, K); with `keys=` if it is stochastic.
            Probabilities are taken as if they were logits, with a logged warning.
        x: Images, (B, C, H, W), in [0, 1].
        y: True labels (B,), or targets if `targeted`.
        preset: `"original"` (the authors' code: up to 10 000 steps a round; add `targeted=True` for
            its default), `"ace"` (S0's code: 10 rounds of 100 steps) or `"qiu"` (cleverhans as S1
            called it: targeted, κ = 10, steps of 0.1). Keywords that are given win over the
            preset's. None by default: the authors' settings with 1000 steps.
        search_steps: Rounds of the search for c; 1 takes `initial_const` for all samples.
        steps: Most steps in a round.
        step_size: Adam's first learning rate of a round; where a fiftieth of the steps gains less
            than 0.1 %, it falls to a fifth, twice at most, and Adam's moments are forgotten.
        initial_const: First c.
        kappa: Margin, in logits, that a point must reach to count, κ.
        refine: Forward passes at the end that move the point found back along the line to `x`, to
            where the margin is about to fall below κ; none on a random model.
        targeted: Seek the class `y` instead of any other.
        gradient: Estimator; by default `backprop`. `eot(30)` for stochastic models.
        mask: Pixels that may change, bool (B or 1, 1 or C, H, W).
        seed: Integer, or one key per sample from `feint.core.random.keys`; only a random model or
            estimator uses it.
        stop: `"success"` ends a sample's round when a fiftieth of its steps (ten at least) gained
            less than 0.1 % and it has no shorter ones, ends its search after a round that brought
            it nearer by less than 0.1 %, and leaves out samples that are adversarial as they are;
            `"never"` takes every step of every round. By default `"success"` for a deterministic
            model.
        trace: Called as `trace(step, x_adv, logits, loss, active)` at every evaluated point; the
            loss is the margin, cut off at κ.

    Returns:
        x_adv: Like `x`, in [0, 1]: the nearest evaluated point of margin κ, or `x` itself where
        there was none or `x` is one. On a random model the point found is moved
        outwards, up to six times as far, until it fools three further estimates, too.

    Raises:
        ConfigError, RangeError, ShapeError, DtypeError, DeviceError: On bad arguments.
        GradientError: If no gradient reaches the input, or one that is not finite.
        ModelError: If the logits are NaN or have the wrong shape.

    Cost:
        Per sample at most search_steps · (steps + 1) forward and backward passes, times the
        estimator's draws. Then `refine` forward passes, or 24 on a random model.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> x = torch.rand(2, 3, 2, 2)
        >>> carlini_wagner(model, x, model(x).argmax(1), search_steps=2, steps=5).shape
        torch.Size([2, 3, 2, 2])

    References:
        Carlini, Wagner, "Towards evaluating the robustness of neural networks", S&P 2017, §V-VI.

    Deviations:
        The tanh reaches 1 % beyond the box and its argument is bounded instead, so that values at 0
        and 1 can move (arctanh of 0.999999 leaves them a slope of 2·10⁻⁶). A round counts as a
        success if its end held an adversarial point: Adam's first steps cross the boundary
        whatever c is. The learning rate falls, since one of 0.01 moves CIFAR-10 images by more than
        their whole distance in one step. Progress is judged per sample, and a search that no
        longer gains ends. The point found is moved back (`refine`).
        S0's weight decay of 5·10⁻⁴, an accident of its code, is left out of `"ace"`.
    """
    for name, count in (("search_steps", search_steps), ("steps", steps)):
        check_count(name, count)
    check_count("refine", refine, least=0)
    settings = {"step_size": step_size, "initial_const": initial_const, "kappa": kappa}
    for name, value in settings.items():
        check_number(name, value)
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
        confidence=kappa,
    )
    if len(x) == 0:
        return x.clone()
    margin = goal_margin(targeted)

    def goal(logits: Tensor, y: Tensor) -> Tensor:
        return margin(logits, y).clamp_max(kappa)

    x = search.x
    origin = torch.atanh((x.double() - 0.5) / _REACH).to(x.dtype)
    zero = torch.zeros_like(search.start)
    state = _State(
        rows=search.everyone,
        x=x,
        origin=origin,
        w=origin,
        first=torch.zeros_like(x),
        second=torch.zeros_like(x),
        clock=torch.zeros_like(search.everyone),
        age=torch.zeros_like(search.everyone),
        length=torch.full_like(zero, step_size),
        fell=zero.bool(),
        least=torch.full_like(zero, torch.inf),
        before=torch.full_like(zero, torch.inf),
        known=torch.full_like(search.size, torch.inf),
        idle=torch.zeros_like(search.everyone),
    )
    weights = Constants.start(len(x), initial_const, zero)
    interval = max(_APART, math.ceil(steps / _CHECKS))
    for step in range(search_steps * (steps + 1)):
        if search.early and (step == 1 or (step and step % _COMPACT == 0)):
            size = search.size[state.rows]
            going = (weights.round < search_steps) & (size > 0) & (state.idle < _PATIENCE)
            left = going.nonzero()[:, 0]
            if len(left) == 0:
                break
            if len(left) < len(state.rows):
                state.keep(left)
                weights.keep(left)
        tanh = torch.tanh(state.w.double()).to(x.dtype)  # float32 kernels differ with alignment
        point = torch.where(flag(state.clock == 0, x), state.x, 0.5 + _REACH * tanh)
        point = search.confine(point, state.rows, state.x)
        answer = search.ask(point, state.rows, goal, step)
        delta = point - state.x
        objective = dot(delta, delta) + weights.c * (kappa - answer.loss)
        slope = (2 * delta - column(weights.c, x) * answer.gradient) * (1 - tanh * tanh) * _REACH
        looked = state.clock % interval == 0
        stalled, fell = _look(state, objective, looked, answer.hit, step_size)
        _adam(state, slope)
        ended = (state.clock > steps) | (stalled & search.early)
        weights.advance(ended, fell)
        _restart(state, ended, search.size[state.rows], step_size)
    return search.finish(refine)


def _look(
    state: _State, objective: Tensor, looked: Tensor, hit: Tensor, step_size: float
) -> tuple[Tensor, Tensor]:
    """Where progress is looked at and there is none, shorten the steps.

    Returns:
        stalled: (R,) bool: no progress with the shortest steps, or on the wrong side of the
            boundary, where finer steps would lead nowhere else.
        fell: (R,) bool: adversarial since the last look.
    """
    state.least = torch.minimum(state.least, objective)
    fell = state.fell | hit
    slow = looked & (state.least > _PROGRESS * state.before)
    shorten = slow & fell & (state.length > _SHORTEST * step_size)
    state.length = torch.where(shorten, _SHORTER * state.length, state.length)
    _forget(state, shorten)
    state.before = torch.where(looked, state.least, state.before)
    state.fell = torch.where(looked, hit, fell)
    return slow & ~shorten, fell


def _forget(state: _State, which: Tensor) -> None:
    """Let Adam begin anew: gradients of the way in would shorten the steps of the way back."""
    wide = flag(which, state.w)
    state.first = state.first.masked_fill(wide, 0)
    state.second = state.second.masked_fill(wide, 0)
    state.age = state.age.masked_fill(which, 0)


def _adam(state: _State, gradient: Tensor) -> None:
    """One step of Adam, on each sample's own clock."""
    state.clock, state.age = state.clock + 1, state.age + 1
    state.first = torch.lerp(gradient, state.first, 0.9)
    state.second = torch.lerp(gradient * gradient, state.second, 0.999)
    age = state.age.double()
    first = state.first / column(1 - 0.9**age, gradient)
    second = state.second / column(1 - 0.999**age, gradient)
    w = state.w - column(state.length, gradient) * first / (second.sqrt() + 1e-8)
    limit = math.atanh(0.5 / _REACH)
    state.w = w.clamp(-limit, limit)


def _restart(state: _State, ended: Tensor, size: Tensor, step_size: float) -> None:
    """Begin another round from the clean image where one has ended."""
    wide = flag(ended, state.w)
    state.w = torch.where(wide, state.origin, state.w)
    _forget(state, ended)
    state.clock = state.clock.masked_fill(ended, 0)
    state.fell = state.fell & ~ended
    state.length = state.length.masked_fill(ended, step_size)
    state.least = state.least.masked_fill(ended, torch.inf)
    state.before = state.before.masked_fill(ended, torch.inf)
    gained = size.isinf() | (size < _GAIN * state.known)
    state.idle = torch.where(ended, torch.where(gained, 0, state.idle + 1), state.idle)
    state.known = torch.where(ended, size, state.known)
