"""Gradients in half precision, successes in the model's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from feint.core.errors import ConfigError
from feint.core.gradients import Chosen, Estimate, GradientEstimator, Model, backprop
from feint.core.losses import Loss

__all__ = ["GoalMargin", "declare_margin", "mixed"]

GoalMargin = Callable[[Tensor, Tensor], Tensor]
"""`(logits, y) -> margin`: positive exactly where the logits are what the attacker wants."""

_DTYPES = {"bf16": torch.bfloat16}
_DOUBT = 2.0**-5
"""A margin nearer to zero than this share of the largest logit is not trusted (bf16 rounds to 2⁻⁹
at each layer)."""


def declare_margin(loss: Loss, goal: GoalMargin) -> Loss:
    """Tell estimators by which margin an attack that maximises `loss` calls a row adversarial.

    Args:
        loss: `(logits, y) -> (B,)`; gets an attribute.
        goal: The margin, for the same logits (…, K) and labels.
    """
    loss.goal_margin = goal  # type: ignore[attr-defined]
    return loss


def mixed(dtype: str = "bf16", base: GradientEstimator = backprop) -> GradientEstimator:
    """Run `base` in autocast, and ask the model itself wherever the answer decides something.

    Whoever looks like a success in half precision, or like a near miss (a margin within 3 % of the
    largest logit), is evaluated once more in the model's own precision, with the same draws, and
    these logits and this loss are returned: no success is a rounding's. The gradient stays the
    cheap one. A point that needs no gradient (`forward_only`) is evaluated in the model's own
    precision alone.

    Args:
        dtype: `"bf16"`. (Half floats of 5 exponent bits let gradients vanish; they are refused.)
        base: Estimator by autograd: `backprop`, or `eot(draws)`. Estimators that subtract scores
            are refused, since rounding takes the difference away.

    Convention:
        Images and logits keep their own type; a model in float64 computes as before (autocast
        leaves float64 alone). A region of autocast around the attack does not reach the second
        evaluation.

    Raises:
        ConfigError: If the dtype is another, or `base` needs scores alone.

    Cost:
        That of `base`, in half precision; one forward pass in full precision for rows in doubt, and
        a host synchronisation per step to find them. Attacks whose loss declares no margin (see
        `declare_margin`) pay that pass for every row.

    Example:
        >>> import torch
        >>> from feint.attacks import pgd
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> x, y = torch.rand(2, 3, 2, 2), torch.tensor([0, 1])
        >>> pgd(model, x, y, eps=0.1, gradient=mixed("bf16")).dtype
        torch.float32

    References:
        Micikevicius et al., "Mixed precision training", ICLR 2018 (here without loss scaling, which
        bf16 does not need).
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; expected {', '.join(map(repr, _DTYPES))}")
    if getattr(base, "scores_only", False):
        raise ConfigError(
            "mixed precision rounds away the differences of scores that this estimator measures; "
            "use it with backprop or eot(...)"
        )

    def estimate(
        model: Model, x: Tensor, y: Tensor, loss: Loss, keys: Tensor, *, forward_only: bool = False
    ) -> Estimate:
        if forward_only:
            return _exactly(base, model, x, y, loss, keys)
        with torch.autocast(x.device.type, _DTYPES[dtype]):
            rough = base(model, x, y, loss, keys)
        rough = Estimate(rough.logits, rough.gradient.to(x.dtype), rough.loss)
        rows = _in_doubt(loss, rough.logits, y)
        if len(rows) == 0:
            return rough
        few = model.take(rows) if isinstance(model, Chosen) else model
        exact = _exactly(base, few, x[rows], y[rows], loss, keys[rows])
        logits = rough.logits.to(exact.logits.dtype).index_copy(0, rows, exact.logits)
        value = rough.loss.to(exact.loss.dtype).index_copy(0, rows, exact.loss)
        return Estimate(logits, rough.gradient, value)

    estimate.__qualname__ = f"mixed({dtype!r})"
    estimate.one_pass = base is backprop or getattr(base, "one_pass", False)  # type: ignore[attr-defined]
    return estimate


def _exactly(
    base: GradientEstimator, model: Model, x: Tensor, y: Tensor, loss: Loss, keys: Tensor
) -> Estimate:
    """The same draws in the model's own precision."""
    with torch.autocast(x.device.type, enabled=False):
        return base(model, x, y, loss, keys, forward_only=True)


def _in_doubt(loss: Loss, logits: Tensor, y: Tensor) -> Tensor:
    """Rows (R,) of logits (B, D, K) of which a draw is adversarial, nearly so, or no number.

    All of them, if the loss declares no margin.
    """
    goal: GoalMargin | None = getattr(loss, "goal_margin", None)
    if goal is None:
        return torch.arange(len(logits), device=logits.device)
    sure = goal(logits, y) < -_DOUBT * logits.abs().amax(-1)
    return (~sure.all(1)).nonzero()[:, 0]
