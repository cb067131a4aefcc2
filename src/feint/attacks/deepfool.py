"""DeepFool."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from feint.attacks._ascent import Stop, Trace
from feint.attacks._minimal import (
    Rows,
    Search,
    check_count,
    check_number,
    column,
    flag,
    goal_margin,
)
from feint.core.errors import RangeError
from feint.core.gradients import GradientEstimator, Model, backprop, call, is_stochastic
from feint.core.norms import norm_of
from feint.core.registry import attack

__all__ = ["deepfool"]

_NORMS = ("l2", "linf")
_NUDGE, _NUDGE_GROWTH, _NUDGE_MOST = 1e-5, 1.25, 1e-3
"""Least length of a step beyond the boundary, which rounding might stop short of it; it grows from
step to step, since a model of steps and ties, such as one behind a rounding, needs more."""
_CODE = 1 << 24
"""A label and a rival class travel through an estimator as one number: label · _CODE + rival."""


@attack(
    goal="minimal",
    knowledge="gradient",
    norms=_NORMS,
    paper="Moosavi-Dezfooli et al., 2016, arXiv:1511.04599",
    presets={
        "original": {"norm": "l2", "steps": 50, "overshoot": 0.02, "classes": 10, "follow": 10},
        "ace": {
            "norm": "l2",
            "steps": 50,
            "overshoot": 0.0,
            "classes": "all",
            "follow": 1000,
            "refine": 0,
        },
        "qiu": {"norm": "l2", "steps": 50, "overshoot": 0.02, "classes": 10, "follow": 10},
    },
)
def deepfool(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    preset: str | None = None,
    norm: str = "l2",
    steps: int = 50,
    overshoot: float = 0.02,
    classes: Literal["all"] | int = "all",
    follow: int | None = None,
    refine: int = 1,
    targeted: bool = False,
    gradient: GradientEstimator | None = None,
    mask: Tensor | None = None,
    seed: int | Tensor = 0,
    stop: Stop | None = None,
    trace: Trace | None = None,
) -> Tensor:
    r"""DeepFool: step to the nearest boundary of the linearised model until it is crossed.

    At every step each rival class k has a linearised boundary at distance (z_y − z_k) / ‖∇(z_k −
    z_y)‖ (dual norm); the step goes to the nearest one and is clipped to the box.

    Convention:
        Images are float RGB, NCHW, in [0, 1].

    Args:
        model: Maps images in [0, 1] to logits (B, K); with `keys=` if it is stochastic.
            Probabilities are taken as if they were logits, with a logged warning.
        x: Images, (B, C, H, W), in [0, 1].
        y: True labels (B,), or targets if `targeted`.
        preset: `"original"` (the authors' code) and `"qiu"` (cleverhans as S1 called it): the ten
            likeliest classes, all of them followed; `"ace"` (S0's code): every class, no overshoot.
            Keywords that are given win over the preset's. None by default.
        norm: `"l2"` or `"linf"`.
        steps: Most steps per sample.
        overshoot: Share of each step by which it goes beyond the linearised boundary.
        classes: `"all"`, or only so many of the likeliest classes at `x`, the label's included.
        follow: After the first step only the so many nearest rivals are looked at; by default 1,
            or 2 where gradients are random, so that an accident of the first one does not decide.
            On CIFAR-10 the mean distance with 1 was that with all on a ResNet-20, and 0.1 % less on
            an adversarially trained one (48 images each).
        refine: Forward passes that move the point found back along the line to `x`, to where the
            margin is about to vanish; none on a random model.
        targeted: Step to the boundary of the class `y` instead, against its strongest rival.
        gradient: Estimator; by default `backprop`. Others are asked once per rival and step, in
            one batch: `eot(30)` averages the Jacobian over 30 draws.
        mask: Pixels that may change, bool (B or 1, 1 or C, H, W).
        seed: Integer, or one key per sample from `feint.core.random.keys`; only a random model or
            estimator uses it.
        stop: `"success"` drops a sample once adversarial; `"never"` goes on to step towards the
            boundary, from either side, for all `steps`. By default `"success"` for a deterministic
            model.
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
        Per sample and step one forward pass and a backward pass per rival class: K − 1 at the
        first step, `follow` at every later one (about three steps on CIFAR-10); then `refine`
        forward passes. The backward passes share one forward pass one after the other, which was
        1.9 times as fast on a CPU as a batched backward pass (`is_grads_batched`), and 3.7 times
        as fast as repeating the batch. The gradients of all rivals that are followed are held
        together: for ImageNet's thousand classes 0.6 GB per image of 224 px, so name `classes`.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> x = torch.rand(2, 3, 2, 2)
        >>> y = model(x).argmax(1)
        >>> deepfool(model, x, y).shape
        torch.Size([2, 3, 2, 2])

    References:
        Moosavi-Dezfooli, Fawzi, Frossard, "DeepFool: a simple and accurate method to fool deep
        neural networks", CVPR 2016, Algorithm 2 and §3.3 (other norms).

    Deviations:
        The result stays in [0, 1] (the original does not clip), also with `preset="ace"`. The
        point found is moved back (`refine`). Only the nearest rivals of the first step are followed
        unless `follow` says otherwise. The label is `y`, not the prediction: S0's and the authors'
        code attack the predicted class, so pass it as `y` to do the same. A step goes at least
        10⁻⁵ beyond the boundary, and a quarter more each time, up to 10⁻³ (the authors' code:
        10⁻⁴).
    """
    check_count("steps", steps)
    if follow is not None:
        check_count("follow", follow)
    check_number("overshoot", overshoot)
    check_count("refine", refine, least=0)
    if classes != "all" and (not isinstance(classes, int) or classes < 2):
        raise RangeError(f"classes is {classes!r}; expected 'all' or a whole number ≥ 2")
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
    if len(x) == 0:
        return x.clone()
    if follow is None:
        follow = 1 if search.estimator is backprop and not is_stochastic(model) else 2
    state = _State(search.everyone, search.x, None)
    goal = goal_margin(targeted)
    for step in range(steps):
        found = _look(search, state, classes, step)
        loss = goal(found.logits, search.y[state.rows]).mean(1)
        none = torch.zeros_like(state.point)
        hit = search.note(state.point, state.rows, found.logits, loss, none).hit
        left = (~hit).nonzero()[:, 0] if search.early else None
        if left is not None and len(left) == 0:
            break
        near = _nearest(search, state, found, hit, step)
        if left is not None and len(left) < len(hit):
            state.keep(left)
            near.keep(left)
            hit = hit[left]
        # From the outside it stops short of the boundary by as much as it oversteps from within.
        out = torch.where(hit, -1.0, 1.0).to(x.dtype)
        nudge = min(_NUDGE * _NUDGE_GROWTH**step, _NUDGE_MOST)
        length = (near.distance * (1 + out * overshoot) + out * nudge).clamp_min(0) * out
        length = length.masked_fill(~length.isfinite(), 0)
        moved = state.point + column(length, state.point) * near.direction
        state.point = search.confine(moved, state.rows, search.x[state.rows])
        if state.rivals is not None and state.rivals.shape[1] > follow:
            nearest = near.scores.topk(follow, dim=1, largest=False).indices
            state.rivals = state.rivals.gather(1, nearest)
    else:
        search.ask(state.point, state.rows, goal, steps, forward_only=True)
    return search.finish(refine)


@dataclass
class _State(Rows):
    """Samples in the loop: their points, and the rival classes looked at, (R, C)."""

    rows: Tensor
    point: Tensor
    rivals: Tensor | None


@dataclass(frozen=True)
class _Found:
    """What a forward pass told, before any backward pass."""

    logits: Tensor
    """(R, D, K)."""
    gaps: Tensor
    """(R, C): how far each rival's score is above the label's; targeted: one column, the margin."""
    slopes: Iterator[Tensor]
    """The gaps' gradients, one after the other: no Jacobian of all classes is ever in memory."""


@dataclass
class _Nearest(Rows):
    """The nearest linearised boundary of each row."""

    scores: Tensor
    """(R, C): the less, the nearer the rival."""
    distance: Tensor
    direction: Tensor
    """Unit step towards the rival."""


def _look(search: Search, state: _State, classes: Literal["all"] | int, step: int) -> _Found:
    """Evaluate the rows' points; chooses the rivals at the first step."""
    y, keys = search.y[state.rows], search.keys_for(state.rows, "step", step)
    by = _by_autograd if search.estimator is backprop else _by_estimator
    return by(search, state, classes, y, keys)


def _nearest(search: Search, state: _State, found: _Found, hit: Tensor, step: int) -> _Nearest:
    """The nearest boundary of the linearised model; of rows outside, the one they crossed."""
    point, rows = state.point, state.rows
    scores: list[Tensor] = []
    best = distance = direction = torch.empty(0)
    for j, raw in enumerate(found.slopes):
        if step == 0 and j == 0:
            keys = search.keys_for(rows, "step", step)
            search.check_gradient(found.logits, raw, point, keys)
        slope, gap = search.clean(raw, rows), found.gaps[:, j]
        size = norm_of(slope, "l2" if search.norm == "l2" else "l1")
        away = gap.abs() / size
        score = torch.where(hit, -gap, away)
        unit = slope / column(size, slope) if search.norm == "l2" else slope.sign()
        nearer = score < best if j else torch.ones_like(hit)
        best = torch.where(nearer, score, best) if j else score
        distance = torch.where(nearer, away, distance) if j else away
        direction = torch.where(flag(nearer, unit), unit, direction) if j else unit
        scores.append(score)
    return _Nearest(torch.stack(scores, 1), distance, direction.nan_to_num())


def _rivals(
    logits: Tensor, y: Tensor, classes: Literal["all"] | int, targeted: bool
) -> Tensor | None:
    """The classes to compare `y` with, (R, C); none if it is a target."""
    if targeted:
        return None
    count = logits.shape[-1]
    if classes == "all" or classes >= count:
        return (y[:, None] + torch.arange(1, count, device=y.device)) % max(1, count)
    likely = logits.mean(1).scatter(1, y[:, None], -torch.inf)
    return likely.topk(classes - 1, dim=1).indices


def _by_autograd(
    search: Search, state: _State, classes: Literal["all"] | int, y: Tensor, keys: Tensor
) -> _Found:
    """One forward pass; a backward pass per gap, when it is asked for."""
    leaf = state.point.detach().requires_grad_()
    with torch.enable_grad():
        logits = call(search.model, leaf, keys)
        search.check_logits(logits.detach())
        if state.rivals is None:
            state.rivals = _rivals(logits.detach()[:, None], y, classes, search.targeted)
        if state.rivals is None:
            gaps = goal_margin(True)(logits, y)[:, None]
        else:
            gaps = logits.gather(1, state.rivals) - logits.gather(1, y[:, None])

    def slopes() -> Iterator[Tensor]:
        count = gaps.shape[1]
        for j in range(count):
            slope = None
            if gaps.requires_grad:
                with torch.enable_grad():
                    gap = gaps[:, j].sum()
                (slope,) = torch.autograd.grad(
                    gap, leaf, retain_graph=j + 1 < count, allow_unused=True
                )
            if slope is None:  # raises an error that names where the gradient is lost
                slope = backprop(search.model, state.point, y, goal_margin(False), keys).gradient
            yield slope

    return _Found(logits.detach()[:, None], gaps.detach(), slopes())


def _by_estimator(
    search: Search, state: _State, classes: Literal["all"] | int, y: Tensor, keys: Tensor
) -> _Found:
    """The same by any estimator: rivals are further rows of one batch, with the same draws."""
    if state.rivals is None and not search.targeted:
        first = search.estimator(
            search.model, state.point, y, goal_margin(False), keys, forward_only=True
        )
        search.check_logits(first.logits)
        state.rivals = _rivals(first.logits, y, classes, search.targeted)
    count = 1 if state.rivals is None else state.rivals.shape[1]
    code = y if state.rivals is None else (y[:, None] * _CODE + state.rivals).flatten()

    def gap(logits: Tensor, code: Tensor) -> Tensor:
        while code.ndim < logits.ndim - 1:
            code = code[..., None]
        code = code.expand(logits.shape[:-1])[..., None]
        pair = logits.gather(-1, code % _CODE) - logits.gather(-1, code // _CODE)
        return pair[..., 0]

    wide = search.estimator(
        search.model,
        state.point.repeat_interleave(count, 0),
        code,
        search.checked(goal_margin(True)) if state.rivals is None else gap,
        keys.repeat_interleave(count, 0),
    )
    gradient = wide.gradient.unflatten(0, (-1, count))
    return _Found(wide.logits[::count], wide.loss.view(-1, count), iter(gradient.unbind(1)))
