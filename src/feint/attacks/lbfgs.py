"""Box-constrained L-BFGS attack."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from feint.attacks._ascent import Stop, Trace
from feint.attacks._minimal import (
    Answer,
    Constants,
    Rows,
    Search,
    check_count,
    check_number,
    column,
    dot,
    flag,
    goal_log_odds,
)
from feint.core.gradients import GradientEstimator, Model
from feint.core.registry import attack

__all__ = ["lbfgs"]

_NORMS = ("l2",)
_COMPACT = 10
_ARMIJO = 1e-4
_FLAT = 1e-5
"""A projected gradient below this is zero (scipy's `pgtol`)."""
_STILL = 2.2e-9
"""A relative decrease below this is none (scipy's `factr` times the machine epsilon)."""
_TRIALS = 20
"""Most shortenings of one step."""


@dataclass
class _State(Rows):
    rows: Tensor
    x: Tensor
    trial: Tensor
    """The point to evaluate: `point` + `length` · `direction`, in the box."""
    point: Tensor
    value: Tensor
    slope: Tensor
    direction: Tensor
    length: Tensor
    shortened: Tensor
    """Times that the present step was shortened."""
    moves: Tensor
    """(R, M, …): the last moves, and the changes of the gradient over them; newest last."""
    changes: Tensor
    clock: Tensor
    """Evaluations in this round."""
    fell: Tensor


@attack(
    goal="minimal",
    knowledge="gradient",
    norms=_NORMS,
    paper="Szegedy et al., 2014, arXiv:1312.6199",
    presets={"qiu": {"search_steps": 4, "steps": 1000, "initial_const": 1e-2, "targeted": True}},
)
def lbfgs(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    preset: str | None = None,
    search_steps: int = 5,
    steps: int = 1000,
    initial_const: float = 1e-2,
    history: int = 10,
    refine: int = 2,
    targeted: bool = False,
    gradient: GradientEstimator | None = None,
    mask: Tensor | None = None,
    seed: int | Tensor = 0,
    stop: Stop | None = None,
    trace: Trace | None = None,
) -> Tensor:
    r"""L-BFGS attack: least ‖δ‖₂² + c·cross-entropy in the box, by a projected quasi-Newton method.

    The weight c of each sample grows tenfold until a round ends with an adversarial point on its
    way, then it is bisected. Every sample has its own history, line search and clock, and samples
    share nothing but the passes of the batch.

    Convention:
        Images are float RGB, NCHW, in [0, 1].

    Args:
        model: Maps images in [0, 1] to logits (B, K); with `keys=` if it is stochastic.
            Probabilities are taken as if they were logits, with a logged warning.
        x: Images, (B, C, H, W), in [0, 1].
        y: True labels (B,), or targets if `targeted`, as in the paper.
        preset: `"qiu"` (cleverhans as S1 called it): targeted, 4 rounds. Keywords that are given
            win over the preset's. None by default: cleverhans' 5 rounds.
        search_steps: Rounds of the search for c.
        steps: Most evaluations in a round, those of the line search included.
        initial_const: First c.
        history: Pairs of moves and gradient changes that describe the curvature.
        refine: Forward passes at the end that move the point found back along the line to `x`, to
            where the margin is about to vanish; none on a random model.
        targeted: Minimise −log p of the class `y`. Otherwise −log(1 − p) of it, which is the same
            for two classes.
        gradient: Estimator; by default `backprop`. `eot(30)` for stochastic models.
        mask: Pixels that may change, bool (B or 1, 1 or C, H, W).
        seed: Integer, or one key per sample from `feint.core.random.keys`; only a random model or
            estimator uses it.
        stop: `"success"` ends a sample's round when it has converged, and leaves out samples that
            are adversarial as they are; `"never"` takes every step. By default `"success"` for a
            deterministic model.
        trace: Called as `trace(step, x_adv, logits, loss, active)` at every evaluated point; the
            loss is the log probability of success.

    Returns:
        x_adv: Like `x`, in [0, 1]: the nearest adversarial point evaluated, or `x` itself where
        there was none or `x` is one. On a random model the point found is moved
        outwards, up to six times as far, until it fools three further estimates, too.

    Raises:
        ConfigError, RangeError, ShapeError, DtypeError, DeviceError: On bad arguments.
        GradientError: If no gradient reaches the input, or one that is not finite.
        ModelError: If the logits are NaN or have the wrong shape.

    Cost:
        Per sample at most search_steps · steps forward and backward passes, times the estimator's
        draws; samples end their rounds and the search one by one. Then `refine` forward passes.
        Memory: 2·history + 6 images per sample.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> x = torch.rand(2, 3, 2, 2)
        >>> lbfgs(model, x, model(x).argmax(1), steps=20).shape
        torch.Size([2, 3, 2, 2])

    References:
        Szegedy, Zaremba, Sutskever, Bruna, Erhan, Goodfellow, Fergus, "Intriguing properties of
        neural networks", ICLR 2014, §4.1. Optimiser: Liu, Nocedal, "On the limited memory BFGS
        method for large scale optimization", 1989; projection and active set: Bertsekas,
        "Projected Newton methods for optimization problems with simple constraints", 1982.

    Deviations:
        Nearest adversarial point of all evaluated ones, not of the rounds' ends. The squared norm
        of cleverhans instead of the paper's norm. Not the generalised Cauchy point of L-BFGS-B but
        a projected line search on the variables that are free; the minima agree. One problem per
        sample (cleverhans and S1 solve one joint problem for the batch). The point found is moved
        back (`refine`).
    """
    for name, count in (("search_steps", search_steps), ("steps", steps), ("history", history)):
        check_count(name, count)
    check_count("refine", refine, least=0)
    check_number("initial_const", initial_const)
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
    if len(x) == 0:
        return x.clone()
    odds = goal_log_odds(targeted)
    x, zero = search.x, torch.zeros_like(search.start)
    empty = x.new_zeros(len(x), history, *x.shape[1:])
    state = _State(
        rows=search.everyone,
        x=x,
        trial=x,
        point=x,
        value=zero,
        slope=torch.zeros_like(x),
        direction=torch.zeros_like(x),
        length=zero,
        shortened=torch.zeros_like(search.everyone),
        moves=empty,
        changes=empty,
        clock=torch.zeros_like(search.everyone),
        fell=zero.bool(),
    )
    weights = Constants.start(len(x), initial_const, zero)
    for step in range(search_steps * steps):
        if search.early and (step == 1 or (step and step % _COMPACT == 0)):
            going = (weights.round < search_steps) & (search.size[state.rows] > 0)
            left = going.nonzero()[:, 0]
            if len(left) == 0:
                break
            if len(left) < len(state.rows):
                state.keep(left)
                weights.keep(left)
        answer = search.ask(state.trial, state.rows, lambda z, y: logsigmoid(odds(z, y)), step)
        state.fell = state.fell | answer.hit
        state.clock = state.clock + 1
        done = _judge(search, state, weights.c, answer)
        ended = (state.clock >= steps) | (done & search.early)
        weights.advance(ended, state.fell)
        _restart(state, ended)
    return search.finish(refine)


def _judge(search: Search, state: _State, c: Tensor, answer: Answer) -> Tensor:
    """Take or refuse the trial points, choose the next ones; which rows have converged."""
    delta = state.trial - state.x
    value = dot(delta, delta) - c * answer.loss
    slope = 2 * delta - column(c, delta) * answer.gradient
    if search.mask is not None:
        slope = slope * search.mask[state.rows]
    move, first = state.trial - state.point, state.clock == 1
    taken = first | (value <= state.value + _ARMIJO * dot(state.slope, move))
    decrease = state.value - value
    scale = torch.maximum(state.value.abs(), value.abs()).clamp_min(1)
    still = taken & ~first & (decrease <= _STILL * scale)
    _remember(state, move, slope - state.slope, taken & ~first)
    wide = flag(taken, delta)
    old_value, uphill = state.value, dot(state.slope, state.direction)
    state.point = torch.where(wide, state.trial, state.point)
    state.slope = torch.where(wide, slope, state.slope)
    state.value = torch.where(taken, value, state.value)
    state.shortened = torch.where(taken, 0, state.shortened + 1)
    fresh, length = _direction(state)
    state.direction = torch.where(wide, fresh, state.direction)
    # The minimum of the parabola through what is known, within a tenth and a half of the step.
    bend = (value - old_value - uphill * state.length).clamp_min(1e-30)
    shorter = -uphill * state.length.square() / (2 * bend)
    shorter = torch.maximum(torch.minimum(shorter, state.length / 2), state.length / 10)
    state.length = torch.where(taken, length, shorter)
    trial = state.point + column(state.length, delta) * state.direction
    state.trial = search.confine(trial, state.rows, state.x)
    flat = (state.point - (state.point - state.slope).clamp(0, 1)).abs().flatten(1).amax(1) <= _FLAT
    return still | flat | (state.shortened > _TRIALS)


def _remember(state: _State, move: Tensor, change: Tensor, taken: Tensor) -> None:
    """Push a move to the history where it was taken and the curvature along it is positive."""
    curved = dot(move, change) > torch.finfo(move.dtype).eps * dot(change, change)
    wide = flag(taken & curved, state.moves)
    state.moves = torch.where(wide, torch.cat([state.moves[:, 1:], move[:, None]], 1), state.moves)
    pushed = torch.cat([state.changes[:, 1:], change[:, None]], 1)
    state.changes = torch.where(wide, pushed, state.changes)


def _direction(state: _State) -> tuple[Tensor, Tensor]:
    """The quasi-Newton direction on the free variables, and the length to try first.

    Variables at an end of the box that the gradient pushes out are held; the history is seen
    through the free ones only.
    """
    held = ((state.point <= 0) & (state.slope > 0)) | ((state.point >= 1) & (state.slope < 0))
    free = (~held).to(state.slope.dtype)
    downhill = -state.slope * free
    moves, changes = state.moves * free[:, None], state.changes * free[:, None]
    product = (moves * changes).flatten(2).sum(2)
    useful = product > 1e-12 * changes.square().flatten(2).sum(2)
    rho = torch.where(useful, 1 / torch.where(useful, product, 1), 0)
    count = moves.shape[1]
    d, alphas = downhill, []
    for i in reversed(range(count)):
        alpha = rho[:, i] * dot(moves[:, i], d)
        alphas.append(alpha)
        d = d - column(alpha, d) * changes[:, i]
    gamma, known = torch.ones_like(state.value), torch.zeros_like(state.fell)
    for i in range(count):  # the newest useful pair gives the scale
        size = changes[:, i].square().flatten(1).sum(1)
        gamma = torch.where(useful[:, i], product[:, i] / torch.where(useful[:, i], size, 1), gamma)
        known = known | useful[:, i]
    d = d * column(gamma, d)
    for i in range(count):
        beta = rho[:, i] * dot(changes[:, i], d)
        d = d + column(alphas[count - 1 - i] - beta, d) * moves[:, i]
    good = known & (dot(d, downhill) > 0)
    d = torch.where(flag(good, d), d, downhill)
    steepness = dot(downhill, downhill).sqrt().clamp_min(1e-30)
    return d, torch.where(good, 1.0, (1 / steepness).clamp_max(1))


def _restart(state: _State, ended: Tensor) -> None:
    """Begin another round from the clean image where one has ended."""
    wide = flag(ended, state.x)
    state.trial = torch.where(wide, state.x, state.trial)
    state.point = torch.where(wide, state.x, state.point)
    state.slope = state.slope.masked_fill(wide, 0)
    state.direction = state.direction.masked_fill(wide, 0)
    state.moves = state.moves.masked_fill(wide[:, None], 0)
    state.changes = state.changes.masked_fill(wide[:, None], 0)
    state.value = state.value.masked_fill(ended, 0)
    state.length = state.length.masked_fill(ended, 0)
    state.shortened = state.shortened.masked_fill(ended, 0)
    state.clock = state.clock.masked_fill(ended, 0)
    state.fell = state.fell & ~ended
