"""Jacobian-based saliency map attack (JSMA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from feint.attacks._ascent import Stop, Trace
from feint.attacks._minimal import Rows, Search, check_number
from feint.attacks._pairs import best_pair, best_single
from feint.core.errors import RangeError
from feint.core.gradients import Estimate, GradientEstimator, Model, backprop, call
from feint.core.losses import Loss, margin
from feint.core.registry import attack

__all__ = ["jsma"]

_NORMS = ("l0",)


@dataclass
class _State(Rows):
    """Samples in the loop: their points, the classes they are led to, and who cannot go on."""

    rows: Tensor
    point: Tensor
    target: Tensor
    stuck: Tensor


@attack(
    goal="minimal",
    knowledge="gradient",
    norms=_NORMS,
    paper="Papernot et al., 2016, arXiv:1511.07528",
    presets={
        "original": {"theta": 1.0, "gamma": 0.145, "features": 2, "both": False},
        # S0: θ = +1 in ImageNet-normalised units (mean std 0.2257), 153 pairs on 3×32×32.
        "ace": {"theta": 0.2257, "gamma": 0.1, "features": 2, "both": False},
    },
)
def jsma(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    preset: str | None = None,
    theta: float = 1.0,
    gamma: float = 0.145,
    features: Literal[1, 2] = 2,
    both: bool = False,
    targeted: bool = False,
    gradient: GradientEstimator | None = None,
    mask: Tensor | None = None,
    seed: int | Tensor = 0,
    stop: Stop | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """Jacobian-based saliency map: change the two features that favor the target most, repeatedly.

    With α the derivative of the target's logit and β the sum of the others', a pair (p, q) is
    worth −(α_p + α_q)·(β_p + β_q), α > 0 > β. The best pair is found exactly, without a matrix of
    all pairs.

    Convention:
        Images are float RGB, NCHW, in [0, 1]; a feature is one channel of a pixel, while l0 counts
        pixels.

    Args:
        model: Maps images in [0, 1] to logits (B, K); with `keys=` if it is stochastic.
            Probabilities are taken as if they were logits, with a logged warning.
        x: Images, (B, C, H, W), in [0, 1].
        y: True labels (B,), or targets if `targeted`.
        preset: `"original"` (Papernot et al., the default values) or `"ace"` (S0: θ is 1 in
            normalised units, γ 10 %); keywords that are given win over it.
        theta: What is added to a feature, in image units, in [-1, 1] but not 0; the box clips it.
        gamma: Largest share of features to change, in [0, 1]: at most ⌊γ·n/features⌋ steps.
        features: Features changed per step: 2 as in the paper, or 1.
        both: Consider adding and subtracting |θ| for every feature, not only adding θ; what has
            gone one way does not come back.
        targeted: Seek the class `y`; otherwise the one least likely for the clean image is sought
            (S0), and any class but `y` counts as success.
        gradient: Estimator; by default `backprop`. `eot(30)` for stochastic models.
        mask: Pixels that may change, bool (B or 1, 1 or C, H, W): the search is within it.
        seed: Integer, or one key per sample from `feint.core.random.keys`; only a random model or
            estimator uses it.
        stop: `"success"` drops a sample once adversarial, `"never"` takes every step; by default
            `"success"` for a deterministic model.
        trace: Called as `trace(step, x_adv, logits, loss, active)` at every evaluated point; the
            loss is the target's logit minus the largest other.

    Returns:
        x_adv: Like `x`, in [0, 1]: of the points evaluated, the adversarial one with the fewest
        pixels changed, or `x` itself where there was none or `x` is one.

    Raises:
        RangeError, ShapeError, DtypeError, DeviceError, ConfigError: On bad arguments.
        GradientError: If no gradient reaches the input, or one that is not finite.
        ModelError: If the logits are NaN or have the wrong shape.

    Cost:
        Per sample and step one forward and two backward passes (with another estimator than
        `backprop` two forward ones), and a sort of its features. Host synchronisations: one for the
        compaction, one for the pair search.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> x = torch.rand(2, 3, 2, 2)
        >>> jsma(model, x, model(x).argmax(1), gamma=1.0).shape
        torch.Size([2, 3, 2, 2])

    References:
        Papernot, McDaniel, Jha, Fredrikson, Celik, Swami, "The limitations of deep learning in
        adversarial settings", EuroS&P 2016, Algorithms 2 and 3, eq. (8). `both`: Wiyatno and Xu,
        arXiv:1808.07945, §3.

    Deviations:
        A feature leaves the search when it has reached the end of the box, not after one change;
        for θ = 1 that is the same. Where no pair has the signs asked for, the sample stays as it
        is. S0's code clips to the range of the first image that it saw; here the box is [0, 1].
    """
    if not (-1 <= theta <= 1 and theta != 0):
        raise RangeError(f"theta is {theta}; expected a number in [-1, 1] other than 0")
    check_number("gamma", gamma, high=1.0)
    if features not in (1, 2):
        raise RangeError(f"features is {features}; expected 1 or 2 per step")
    search = Search(
        model,
        x,
        y,
        norm="l0",
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
    steps = int(gamma * x[0].numel() + 1e-9) // features
    state = _State(search.everyone, search.x, search.y, torch.zeros_like(search.y).bool())
    for step in range(steps + 1):
        up, down, hit = _evaluate(search, state, step, forward_only=step == steps)
        if step == steps:
            break
        if search.early:
            left = (~hit & ~state.stuck).nonzero()[:, 0]
            if len(left) == 0:
                break
            if len(left) < len(state.rows):
                state.keep(left)
                up, down = up[left], down[left]
        moved = _change(search, state, up, down, theta, features, both)
        state.point = search.confine(moved, state.rows, search.x[state.rows])
    return search.result()


def _change(
    search: Search,
    state: _State,
    up: Tensor,
    down: Tensor,
    theta: float,
    features: int,
    both: bool,
) -> Tensor:
    """Each row's point with its most salient features changed."""
    flat = state.point.flatten(1)
    n = flat.shape[1]
    steps = [theta, -theta] if both else [theta]
    sign = [1.0 if s > 0 else -1.0 for s in steps]
    a = torch.cat([up.flatten(1) * s for s in sign], 1)
    b = torch.cat([-down.flatten(1) * s for s in sign], 1)
    open_ = torch.cat([flat < 1 if s > 0 else flat > 0 for s in steps], 1)
    if both:  # what has gone one way does not come back
        clean = search.x[state.rows].flatten(1)
        open_ = open_ & torch.cat([flat >= clean if s > 0 else flat <= clean for s in steps], 1)
    if search.mask is not None:
        mask = search.mask[state.rows].expand_as(state.point).flatten(1)
        open_ = open_ & mask.repeat(1, len(steps))
    # A feature and its own reverse never make a pair: their sums are zero.
    index, found = (best_pair if features == 2 else best_single)(a, b, open_)
    state.stuck = ~found
    size = ((index < n).to(flat.dtype) * 2 - 1) * theta * found[:, None]
    return flat.scatter_add(1, index % n, size).view_as(state.point)


def _towards(logits: Tensor, target: Tensor) -> Tensor:
    return -margin(logits, target)


def _evaluate(
    search: Search, state: _State, step: int, forward_only: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of the target's logit and of the sum of the others, and who is adversarial."""
    point, rows = state.point, state.rows
    keys = search.keys_for(rows, "step", step)
    if search.estimator is backprop and not forward_only:
        logits, up, down = _by_autograd(search, state, keys, step)
    else:
        if step == 0:
            checked = search.checked(margin)
            first = search.estimator(
                search.model, point, state.target, checked, keys, forward_only=True
            )
            _choose(search, state, first.logits.mean(1))
        found = [
            _estimate(search, state, loss, keys, forward_only)
            for loss in ((_own,) if forward_only else (_own, _others))
        ]
        logits, up, down = found[0].logits, found[0].gradient, found[-1].gradient
    if step == 0 and not forward_only:
        search.check_gradient(logits, up, point, keys)
    loss = _towards(logits, state.target).mean(1)
    answer = search.note(point, rows, logits, loss, up)
    return answer.gradient, search.clean(down, rows), answer.hit


def _estimate(
    search: Search, state: _State, loss: Loss, keys: Tensor, forward_only: bool
) -> Estimate:
    return search.estimator(
        search.model, state.point, state.target, loss, keys, forward_only=forward_only
    )


def _choose(search: Search, state: _State, logits: Tensor) -> None:
    """At the clean images: the least likely classes as targets, unless they are given."""
    if not search.targeted:
        others = logits.scatter(1, search.y[state.rows][:, None], torch.inf)
        state.target = others.argmin(1)


def _own(logits: Tensor, target: Tensor) -> Tensor:
    return logits.gather(-1, target[..., None])[..., 0]


def _others(logits: Tensor, target: Tensor) -> Tensor:
    return logits.sum(-1) - _own(logits, target)


def _by_autograd(
    search: Search, state: _State, keys: Tensor, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (R, 1, K) and both derivatives from one forward pass."""
    leaf = state.point.detach().requires_grad_()
    with torch.enable_grad():
        logits = call(search.model, leaf, keys)
        search.check_logits(logits.detach())
        if step == 0:
            _choose(search, state, logits.detach())
        up = down = None
        if logits.requires_grad:
            parts = _own(logits, state.target), _others(logits, state.target)
            (up,) = torch.autograd.grad(parts[0].sum(), leaf, retain_graph=True, allow_unused=True)
            (down,) = torch.autograd.grad(parts[1].sum(), leaf, allow_unused=True)
    if up is None or down is None:  # raises an error that names where the gradient is lost
        up = down = backprop(search.model, state.point, state.target, margin, keys).gradient
    return logits.detach()[:, None], up, down
