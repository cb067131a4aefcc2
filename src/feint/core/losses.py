"""Losses that an attacker maximises, always per sample, (B,) or (B, D) over draws.

A loss is a function `(logits, y) -> loss` with logits (…, K) and labels broadcastable to the
leading axes. In the targeted forms `y` is the target. All but cross-entropy are unchanged when a
constant is added to every logit; cross-entropy is, too, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from feint.core.errors import ConfigError, UnknownNameError

__all__ = [
    "LOSSES",
    "Loss",
    "adversarial",
    "cross_entropy",
    "dlr",
    "get_loss",
    "margin",
    "success_share",
    "targeted_dlr",
]

Loss = Callable[[Tensor, Tensor], Tensor]


def _label(logits: Tensor, y: Tensor) -> Tensor:
    """Labels as an index tensor (…, 1) over the leading axes of the logits."""
    while y.ndim < logits.ndim - 1:
        y = y[..., None]
    return y.expand(logits.shape[:-1])[..., None]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """−log softmax(logits)[y]."""
    return -F.log_softmax(logits, -1).gather(-1, _label(logits, y))[..., 0]


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j≠y} z_j − z_y: positive exactly when y is not predicted (Carlini & Wagner 2017)."""
    label = _label(logits, y)
    own = logits.gather(-1, label)[..., 0]
    other = logits.scatter(-1, label, -torch.inf).amax(-1)
    return other - own


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein 2020, eq. 7); needs at least three classes."""
    _need_classes(logits, 3, "dlr")
    top = logits.topk(3, -1).values
    spread = top[..., 0] - top[..., 2]
    return margin(logits, y) / (spread + 1e-12)


def targeted_dlr(logits: Tensor, target: Tensor, y: Tensor | None = None) -> Tensor:
    """Targeted DLR (Croce & Hein 2020, eq. 8), to be maximised: (z_t − z_y) / (z_1 − (z_3+z_4)/2).

    Args:
        logits: (…, K), K ≥ 4.
        target: Target class.
        y: True class; by default the likeliest class other than the target.
    """
    _need_classes(logits, 4, "targeted_dlr")
    top = logits.topk(4, -1).values
    spread = top[..., 0] - (top[..., 2] + top[..., 3]) / 2
    if y is None:
        return -margin(logits, target) / (spread + 1e-12)
    gap = logits.gather(-1, _label(logits, target)) - logits.gather(-1, _label(logits, y))
    return gap[..., 0] / (spread + 1e-12)


def _need_classes(logits: Tensor, least: int, name: str) -> None:
    if logits.shape[-1] < least:
        raise ConfigError(
            f"loss {name!r} needs at least {least} classes; the model gives {logits.shape[-1]}; "
            "use loss='margin'"
        )


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "margin": margin, "dlr": dlr}


def get_loss(loss: str | Loss, targeted: bool = False) -> Loss:
    """The loss to maximise, by name or as given.

    Args:
        loss: A name of `LOSSES`, or a function `(logits, y)` to *maximise*, used as it is.
        targeted: Whether labels are targets, which turns the sign of a named loss.
    """
    if not isinstance(loss, str):
        return loss
    if loss not in LOSSES:
        raise UnknownNameError("loss", loss, LOSSES)
    if not targeted:
        return LOSSES[loss]
    if loss == "dlr":
        return targeted_dlr
    named = LOSSES[loss]
    return lambda logits, y: -named(logits, y)


def adversarial(logits: Tensor, y: Tensor, targeted: bool = False) -> Tensor:
    """Whether each prediction is the attacker's: bool over the leading axes of the logits.

    Convention:
        The prediction is the first of the largest logits. Logits with NaN are never adversarial.
    """
    hit = logits.argmax(-1) == _label(logits, y)[..., 0]
    valid = ~logits.isnan().any(-1)
    return (hit if targeted else ~hit) & valid


def success_share(logits: Tensor, y: Tensor, targeted: bool = False) -> Tensor:
    """Share of draws that are adversarial, (B,) float, from logits (B, D, K) or (B, K)."""
    hit = adversarial(logits, y, targeted).float()
    return hit if hit.ndim == 1 else hit.mean(1)
