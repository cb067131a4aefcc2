"""Gradient estimators: how an attack learns which way the loss rises.

An estimator is a function `(model, x, y, loss, keys) -> Estimate`, per sample. `backprop` uses
autograd, `eot` averages loss gradients over draws of a stochastic model, `spsa` and `nes` use
logits alone. Any gradient attack takes any of them as its `gradient` argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.calls import Model, call, is_stochastic, takes_keys
from feint.core.errors import GradientError, RangeError
from feint.core.losses import Loss

__all__ = [
    "Chosen",
    "Estimate",
    "GradientEstimator",
    "Model",
    "backprop",
    "call",
    "comfortable",
    "eot",
    "find_gradient_loss",
    "is_stochastic",
    "known_draws",
    "nes",
    "require_gradient",
    "spsa",
    "takes_keys",
]

COMFORTABLE, FEW = 200_000, 4
"""Input values per pass on a CPU (65 images of 32 px), and images that are never too many."""


class Estimate(NamedTuple):
    """What an estimator learned at one point."""

    logits: Tensor
    """(B, D, K): the logits of the D draws at `x` (D = 1 for a deterministic model)."""
    gradient: Tensor
    """Shape of `x`: gradient of the mean loss over the draws."""
    loss: Tensor
    """(B,): the mean loss over the draws."""


class GradientEstimator(Protocol):
    """`(model, x, y, loss, keys) -> Estimate`; every sample independent of its batch-mates.

    One that needs no autograd has an attribute `scores_only = True`; a gradient of zeros is then no
    sign of a broken graph. One that asks about the given images and no others, each once, has
    `one_pass = True`.
    """

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        loss: Loss,
        keys: Tensor,
        *,
        forward_only: bool = False,
    ) -> Estimate:
        """One estimate.

        Args:
            model: Gives logits.
            x: (B, C, H, W).
            y: (B,) labels or targets, as the loss wants them.
            loss: `(logits, y) -> (B,)`, to be maximised.
            keys: (B,) int64.
            forward_only: Skip the gradient (it comes back as zeros): the attack has taken its last
                step and only evaluates it.
        """
        ...


def comfortable(x: Tensor) -> int:
    """How many images of a batch to differentiate at once: all of them on an accelerator.

    On a CPU the activations of a large batch leave the cache and are given back to the operating
    system after every pass; passes over equal parts of it, each of at most `COMFORTABLE` values,
    took 0.7 of the time for 128 images of 32 px, and the same time at 224 px.
    """
    if x.device.type != "cpu" or len(x) <= FEW:
        return max(1, len(x))
    largest = max(FEW, COMFORTABLE * len(x) // max(1, x.numel()))
    passes = -(-len(x) // largest)
    return -(-len(x) // passes)


def backprop(
    model: Model, x: Tensor, y: Tensor, loss: Loss, keys: Tensor, *, forward_only: bool = False
) -> Estimate:
    """Autograd through one forward pass; on a CPU a large batch takes several (`comfortable`).

    Cost: one forward and one backward pass per sample.

    Raises:
        GradientError: If the graph is cut between the logits and `x` (a detached module, a
            rounding by integer casts); the module where it is lost is named. A gradient that is
            there but zero is caught by `require_gradient`.
    """
    if forward_only:
        with torch.no_grad():
            logits = call(model, x, keys)
            return Estimate(logits[:, None], torch.zeros_like(x), loss(logits, y))
    size = comfortable(x)
    if size < len(x):
        rows = [slice(i, i + size) for i in range(0, len(x), size)]
        parts = [backprop(model, x[at], y[at], loss, keys[at]) for at in rows]
        return Estimate(*map(torch.cat, zip(*parts, strict=True)))
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = call(model, leaf, keys)
        value = loss(logits, y)
        if not value.requires_grad:
            raise _lost(model, x, keys, "no gradient reaches the input: the graph is cut")
        (gradient,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
    if gradient is None:
        raise _lost(model, x, keys, "no gradient reaches the input: the graph is cut")
    return Estimate(logits.detach()[:, None], gradient, value.detach())


def require_gradient(model: Model, x: Tensor, keys: Tensor, gradient: Tensor) -> None:
    """Raise if a batch's gradient is identically zero for a structural reason.

    Called once per attack, on its first gradient, since the test reads the gradient's values. If
    they are all zero, a random projection of the logits tells whether the logits depend on the
    input at all, here or at random images. If they do, a loss saturates or a unit is dead at this
    very image, which is for the caller to see; if not, the cause is structural.

    Raises:
        GradientError: Naming the module in which the gradient dies, where it can be found.
    """
    if gradient.numel() == 0 or bool(gradient.any()):
        return
    for point in (x, random.uniform(random.fold(keys, "probe image"), x.shape[1:]).to(x.dtype)):
        leaf = point.detach().requires_grad_()
        with torch.enable_grad():
            logits = call(model, leaf, keys)
            if not logits.requires_grad:
                break
            weights = random.normal(random.fold(keys, "probe"), logits.shape[1:], logits.dtype)
            (probe,) = torch.autograd.grad((logits * weights).sum(), leaf, allow_unused=True)
        if probe is not None and bool(probe.any()):
            return
    raise _lost(model, x, keys, "the gradient is identically zero")


def _lost(model: Model, x: Tensor, keys: Tensor, what: str) -> GradientError:
    name = find_gradient_loss(model, x, keys)
    where = f" in module {name!r}" if name else ""
    return GradientError(
        f"{what}{where}; attack a view that declares a backward rule "
        "(Pipeline.view(backward=...)), or use gradient=spsa(...)",
        module=name,
    )


def find_gradient_loss(model: Model, x: Tensor, keys: Tensor | None = None) -> str | None:
    """Qualified name of the innermost module that passes no gradient from its output to its input.

    Returns:
        The name, or None if the model is no module or the loss happens outside of any.
    """
    if not isinstance(model, nn.Module):
        return None
    seen: list[tuple[str, list[Tensor], Tensor]] = []
    hooks = []

    def record(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            given = [t for t in inputs if isinstance(t, Tensor) and t.is_floating_point()]
            if given and isinstance(output, Tensor):
                seen.append((name, given, output))

        return hook

    for name, module in model.named_modules():
        if name:
            hooks.append(module.register_forward_hook(record(name)))
    try:
        with torch.enable_grad():
            leaf = x.detach()[:1].requires_grad_()
            call(model, leaf, None if keys is None else keys[:1])
    finally:
        for handle in hooks:
            handle.remove()
    for name, given, output in seen:  # hooks fire when a module ends: children before parents
        if not any(t.requires_grad for t in given):
            continue
        if not output.requires_grad:
            return name
        used = [t for t in given if t.requires_grad]
        # Random weights: the plain sum of a softmax or of a normalised layer is constant.
        weights = random.normal(random.keys(0, 1), output.shape, output.dtype)[0]
        got = torch.autograd.grad(
            (output * weights.to(output.device)).sum(), used, retain_graph=True, allow_unused=True
        )
        if all(g is None or not bool(g.any()) for g in got):
            return name
    return None


def known_draws(model: Model, shape: torch.Size) -> int | None:
    """How many equally likely draws the model knows itself to have; None if it does not say."""
    count = getattr(model, "draws", None)
    return count(shape) if callable(count) else None


class Chosen:
    """A model with a chosen draw for each image of a batch."""

    def __init__(self, model: Model, draw: Tensor) -> None:
        self.model, self.draw = model, draw

    def __call__(self, x: Tensor) -> Tensor:
        """Logits of those draws."""
        return self.model(x, draw=self.draw)

    def take(self, rows: Tensor) -> Chosen:
        """The same for some of the images."""
        return Chosen(self.model, self.draw[rows])


def eot(
    draws: int = 30, base: GradientEstimator = backprop, chunk: int | None = None
) -> GradientEstimator:
    """Expectation over transformation: gradient of the loss averaged over a model's draws.

    The draws are folded into the batch axis. A model may know that its draws are few and equally
    likely: its method `draws(shape)` then gives their number, and `model(x, draw=index)` runs a
    chosen one. If they are at most `draws` and `base` is `backprop` (or `mixed()` of it), each is
    taken once: the expectation without sampling error.

    Args:
        draws: Draws per step, D; at most so many.
        base: Estimator for each draw.
        chunk: At most so many images per forward pass; by default all B·D at once, on a CPU as
            many as are `comfortable`.

    Cost: D times that of `base`.

    References:
        Athalye, Engstrom, Ilyas, Kwok, "Synthesizing robust adversarial examples", ICML 2018.
    """
    if draws < 1:
        raise RangeError(f"eot draws is {draws}; expected at least 1")

    def estimate(
        model: Model, x: Tensor, y: Tensor, loss: Loss, keys: Tensor, *, forward_only: bool = False
    ) -> Estimate:
        known = known_draws(model, x.shape)
        # Other estimators make images of their own, which a chosen draw per image does not fit.
        one_pass = base is backprop or getattr(base, "one_pass", False)
        exact = known is not None and known <= draws and one_pass
        count = known if known is not None and exact else draws
        number = torch.arange(count, device=x.device)
        wide_x, wide_y = x.repeat_interleave(count, 0), y.repeat_interleave(count, 0)
        wide_keys = random.fold(keys, "eot", 0, number).flatten()
        size = max(1, min(chunk or len(wide_x), comfortable(wide_x)))
        chosen = number.repeat(len(x))
        parts = [
            base(
                Chosen(model, chosen[i : i + size]) if exact else model,
                wide_x[i : i + size],
                wide_y[i : i + size],
                loss,
                wide_keys[i : i + size],
                forward_only=forward_only,
            )
            for i in range(0, max(1, len(wide_x)), size)
        ]
        logits = torch.cat([p.logits for p in parts])
        gradient = torch.cat([p.gradient for p in parts])
        value = torch.cat([p.loss for p in parts])
        return Estimate(
            logits.reshape(len(x), count * logits.shape[1], logits.shape[-1]),
            gradient.reshape(len(x), count, *x.shape[1:]).mean(1),
            value.reshape(len(x), count).mean(1),
        )

    estimate.__qualname__ = f"eot({draws})"
    estimate.scores_only = getattr(base, "scores_only", False)  # type: ignore[attr-defined]
    return estimate


def _signs(keys: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Random signs (*keys.shape, *shape), one bit each."""
    count = math.prod(shape)
    words = random.words(keys, -(-count // 32))
    words = (words - (words >> 31 << 32)).to(torch.int32)  # as signed numbers
    bit = 1 << torch.arange(31, dtype=torch.int32, device=keys.device)
    bit = torch.cat([bit, -2 * bit[-1:]])
    negative = (words[..., None] & bit).ne(0).flatten(-2)[..., :count]
    return (1 - 2 * negative.to(dtype)).reshape(*keys.shape, *shape)


def _finite_differences(kind: str, samples: int, sigma: float, chunk: int) -> GradientEstimator:
    if samples < 1 or not sigma > 0:
        raise RangeError(f"{kind}: got samples={samples}, sigma={sigma}; expected ≥ 1 and > 0")

    def estimate(
        model: Model, x: Tensor, y: Tensor, loss: Loss, keys: Tensor, *, forward_only: bool = False
    ) -> Estimate:
        with torch.no_grad():
            logits = call(model, x, keys)
            value = loss(logits, y)
            total = torch.zeros_like(x)
            if forward_only:
                return Estimate(logits[:, None], total, value)
            per = max(1, chunk // max(1, 2 * len(x)))
            for first in range(0, samples, per):
                number = torch.arange(first, min(samples, first + per), device=x.device)
                drawn = random.fold(keys, kind, 0, number)  # (B, n)
                if kind == "spsa":
                    step = _signs(drawn, x.shape[1:], x.dtype)
                else:
                    step = random.normal(drawn, x.shape[1:], x.dtype)
                both = torch.stack([x[:, None] + sigma * step, x[:, None] - sigma * step])
                n = len(number)
                wide_y = y.repeat_interleave(n).repeat(2)
                # The two ends of a difference share their draw: common random numbers.
                wide_keys = random.fold(drawn, "model").flatten().repeat(2)
                ends = loss(call(model, both.flatten(0, 2), wide_keys), wide_y)
                up, down = ends.reshape(2, len(x), n)
                slope = (up - down) / (2 * sigma * samples)
                total += (slope.reshape(len(x), n, *[1] * (x.ndim - 1)) * step).sum(1)
        return Estimate(logits[:, None], total, value)

    estimate.__qualname__ = f"{kind}({samples})"
    estimate.scores_only = True  # type: ignore[attr-defined]
    return estimate


def spsa(samples: int = 64, sigma: float = 0.01, chunk: int = 4096) -> GradientEstimator:
    """Simultaneous perturbation: two-sided differences along random sign vectors.

    Unbiased for a linear loss: E[(∇·v) v] = ∇ for v ∈ {±1}^n.

    Args:
        samples: Pairs of evaluations per step.
        sigma: Half the distance between the two ends, in image units. The ends may leave [0, 1] by
            as much: a model that clips sees less.
        chunk: At most about so many images per forward pass.

    Cost: 1 + 2·samples forward passes per sample, no backward pass.

    References:
        Spall 1992; Uesato, O'Donoghue, van den Oord, Kohli, ICML 2018, Algorithm 1.
    """
    return _finite_differences("spsa", samples, sigma, chunk)


def nes(samples: int = 64, sigma: float = 0.01, chunk: int = 4096) -> GradientEstimator:
    """Natural evolution strategies: antithetic differences along Gaussian directions.

    Args:
        samples: Antithetic pairs per step.
        sigma: Standard deviation of the directions, in image units.
        chunk: At most about so many images per forward pass.

    Cost: 1 + 2·samples forward passes per sample, no backward pass.

    References:
        Ilyas, Engstrom, Athalye, Lin, ICML 2018, Algorithm 1.
    """
    return _finite_differences("nes", samples, sigma, chunk)
