"""Rank of the adversarial class among the predictions for the clean image, and the reverse."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from feint.core.errors import RangeError, ShapeError
from feint.core.gradients import Model
from feint.diagnostics._common import check, logits_of, sample_keys

__all__ = ["Ranks", "class_rank", "class_ranks", "rank_shares"]


class Ranks(NamedTuple):
    """Ranks count from 1, the likeliest class."""

    adversarial: Tensor
    """(B,) int64: rank of the attacked image's class in the clean image's predictions; 1 where the
    prediction did not change."""
    original: Tensor
    """(B,) int64: rank of the clean image's class in the attacked image's predictions."""
    moved: Tensor
    """bool (B,): whether the prediction changed at all; S2 counts these."""


def class_rank(logits: Tensor, label: Tensor) -> Tensor:
    """Rank of a class among the logits, from 1; of equal logits the first class ranks higher.

    Args:
        logits: (B, K).
        label: (B,) int64.

    Returns:
        (B,) int64.

    Raises:
        ShapeError: Shapes that do not fit.

    Cost: no pass of a model.

    Example:
        >>> class_rank(torch.tensor([[0.1, 3.0, 2.0]]), torch.tensor([2]))
        tensor([2])

    References:
        Prakash et al., CVPR 2018, Fig. 6.
    """
    if logits.ndim != 2 or label.shape != logits.shape[:1]:
        raise ShapeError(f"logits {tuple(logits.shape)}, labels {tuple(label.shape)}; expected B×K")
    own = logits.gather(1, label[:, None])
    before = torch.arange(logits.shape[1], device=logits.device) < label[:, None]
    return 1 + ((logits > own) | ((logits == own) & before)).sum(1)


def class_ranks(
    model: Model,
    x: Tensor,
    x_adv: Tensor,
    *,
    seed: int | Tensor = 0,
    batch_size: int = 128,
) -> Ranks:
    """Both ranks of S2 Fig. 6 for a batch of attacked images.

    Args:
        model: Gives logits.
        x: Images, (B, C, H, W), in [0, 1].
        x_adv: The same images attacked.
        seed: Integer, or one key per sample.
        batch_size: Images per forward pass.

    Returns:
        See `Ranks`.

    Raises:
        ShapeError, DtypeError, RangeError, DeviceError: On bad arguments.

    Cost: two forward passes per image.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> x = torch.rand(2, 3, 2, 2)
        >>> class_ranks(model, x, x).adversarial
        tensor([1, 1])

    References:
        Prakash et al., "Deflecting adversarial attacks with pixel deflection", CVPR 2018, Fig. 6.
    """
    check(x, batch_size=batch_size)
    check(x_adv)
    if x.shape != x_adv.shape:
        raise ShapeError(f"x is {tuple(x.shape)}, x_adv {tuple(x_adv.shape)}; expected one shape")
    keys = sample_keys(seed, x)
    clean = logits_of(model, x, keys, batch_size)
    hit = logits_of(model, x_adv, keys, batch_size)
    before, after = clean.argmax(1), hit.argmax(1)
    return Ranks(class_rank(clean, after), class_rank(hit, before), before != after)


def rank_shares(rank: Tensor, counted: Tensor | None = None, *, top: int = 5) -> Tensor:
    """Share of images with rank 1 … top, and, last, of those beyond: S2 Fig. 6's bars.

    Args:
        rank: (B,) int64, from 1.
        counted: bool (B,): which images count; all by default.
        top: How many ranks have a bar of their own.

    Returns:
        float64 (top + 1,), summing to 1; NaN if no image counts.

    Raises:
        RangeError: `top` is below 1.

    Cost: no pass of a model.

    Example:
        >>> rank_shares(torch.tensor([2, 2, 9, 3]), top=3)
        tensor([0.0000, 0.5000, 0.2500, 0.2500], dtype=torch.float64)

    References:
        Prakash et al., CVPR 2018, Fig. 6, whose 0 is our last bar.
    """
    if top < 1:
        raise RangeError(f"top is {top}; expected at least 1")
    chosen = rank if counted is None else rank[counted]
    count = torch.bincount(chosen.clamp_max(top + 1) - 1, minlength=top + 1).double()
    return count / count.sum()
