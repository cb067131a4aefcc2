"""Several target classes per sample, each a row of the same batch."""

from __future__ import annotations

import torch
from torch import Tensor

from feint.core.errors import ConfigError, RangeError, UnknownNameError
from feint.core.gradients import Estimate, GradientEstimator, Model
from feint.core.losses import LOSSES, Loss, cross_entropy, dlr, margin, targeted_dlr
from feint.core.mixed import declare_margin

__all__ = [
    "Targets",
    "check_targets",
    "chunked",
    "gap",
    "likeliest",
    "pack",
    "rows_at_once",
    "tolerant_dlr",
    "toward",
    "unpack",
]

Targets = str | int | None
"""`"all"`, or so many of the likeliest classes other than the label, or none."""

_CODE = 1 << 24
"""A label and a target travel through an estimator as one number: label · _CODE + target."""
_VALUES = 1 << 22
"""About so many image values go through the model at once when rows were folded into a batch."""


def check_targets(targets: Targets, targeted: bool) -> None:
    """Refuse what is no number of target classes, or targets beside a given target.

    Raises:
        RangeError, ConfigError: If so.
    """
    if targets is None:
        return
    count = isinstance(targets, int) and not isinstance(targets, bool) and targets >= 1
    if targets != "all" and not count:
        raise RangeError(f"targets is {targets!r}; expected 'all', a whole number ≥ 1, or None")
    if targeted:
        raise ConfigError(
            f"targets is {targets!r} and targeted is True: y holds the targets already; "
            "leave one of them out"
        )


def pack(y: Tensor, target: Tensor) -> Tensor:
    """Labels and targets as one number each."""
    return y * _CODE + target


def unpack(code: Tensor) -> tuple[Tensor, Tensor]:
    """Labels and targets again."""
    return code // _CODE, code % _CODE


def likeliest(logits: Tensor, y: Tensor, targets: str | int) -> Tensor:
    """The likeliest classes other than `y`, in falling order: (B, T), T at most K − 1.

    Args:
        logits: (B, D, K); the probabilities of several draws are averaged.
        y: (B,) labels.
        targets: `"all"`, or how many at most.
    """
    rest = logits.shape[-1] - 1
    count = rest if targets == "all" else min(int(targets), rest)
    score = logits.log_softmax(-1).logsumexp(1) if logits.shape[1] > 1 else logits[:, 0]
    score = score.scatter(1, y[:, None], -torch.inf)
    return score.argsort(dim=1, descending=True, stable=True)[:, :count]


def gap(logits: Tensor, code: Tensor) -> Tensor:
    """z_target − z_label, for packed labels (…) and logits (…, K)."""
    while code.ndim < logits.ndim - 1:
        code = code[..., None]
    label, target = unpack(code.expand(logits.shape[:-1])[..., None])
    difference: Tensor = (logits.gather(-1, target) - logits.gather(-1, label))[..., 0]
    return difference


# Any other class than the label is a success, the target or not.
declare_margin(gap, lambda logits, code: margin(logits, unpack(code)[0]))


def tolerant_dlr(targeted: bool) -> Loss:
    """DLR, or the margin where the model has too few classes for it."""

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        if logits.shape[-1] < (4 if targeted else 3):
            return -margin(logits, y) if targeted else margin(logits, y)
        return targeted_dlr(logits, y) if targeted else dlr(logits, y)

    return loss


def toward(loss: str | Loss, tolerant: bool = False) -> Loss:
    """The loss to maximise for packed labels: towards the target, away from the label.

    Args:
        loss: A name of `LOSSES`, or a function `(logits, target)`, used as it is.
        tolerant: Whether DLR becomes the margin where the model has fewer than four classes.
    """
    if isinstance(loss, str) and loss not in LOSSES:
        raise UnknownNameError("loss", loss, LOSSES)

    def value(logits: Tensor, code: Tensor) -> Tensor:
        label, target = unpack(code)
        if not isinstance(loss, str):
            return loss(logits, target)
        if loss == "cross_entropy":
            return -cross_entropy(logits, target)
        if loss == "margin" or (tolerant and logits.shape[-1] < 4):
            return gap(logits, code)
        return targeted_dlr(logits, target, label)

    return value


def rows_at_once(x: Tensor, fold: int) -> int:
    """How many rows may go through the model at once: a batch as given always may."""
    return max(len(x), _VALUES // max(1, x[:1].numel())) if fold > 1 else len(x)


def chunked(estimator: GradientEstimator, limit: int) -> GradientEstimator:
    """`estimator`, asked for at most `limit` rows at a time."""

    def estimate(
        model: Model, x: Tensor, y: Tensor, loss: Loss, keys: Tensor, *, forward_only: bool = False
    ) -> Estimate:
        if len(x) <= limit:
            return estimator(model, x, y, loss, keys, forward_only=forward_only)
        parts = [
            estimator(
                model,
                x[i : i + limit],
                y[i : i + limit],
                loss,
                keys[i : i + limit],
                forward_only=forward_only,
            )
            for i in range(0, len(x), limit)
        ]
        return Estimate(*(torch.cat(part) for part in zip(*parts, strict=True)))

    estimate.scores_only = getattr(estimator, "scores_only", False)  # type: ignore[attr-defined]
    return estimate
