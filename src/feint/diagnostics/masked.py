"""Masked attacks: how much an attack achieves on the most and on the least sensitive pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from feint.attacks import pgd
from feint.core.errors import RangeError, ShapeError
from feint.core.gradients import Model
from feint.core.losses import adversarial
from feint.diagnostics._common import check, logits_of, sample_keys
from feint.diagnostics.masks import top_pixels

__all__ = ["Attack", "MaskedAttack", "blend_curve", "masked_attack"]

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Shares of the pixels at which `blend_curve` looks."""

Attack = Callable[..., Tensor]
"""An attack with its configuration: `attack(model, x, y, mask=…, seed=…) -> x_adv`."""


class MaskedAttack(NamedTuple):
    """Which images stay right when the attack is confined to a share of the pixels."""

    shares: Tensor
    """(S,) float64: shares of the pixels."""
    top: Tensor
    """bool (S, B): right although the highest-scored pixels were attacked (S4's blue line)."""
    bottom: Tensor
    """bool (S, B): the same with the lowest-scored pixels (S4's red line)."""


def _check(x: Tensor, y: Tensor, score: Tensor, shares: Sequence[float], batch_size: int) -> None:
    check(x, y, batch_size)
    if score.shape != x.shape[-2:]:
        raise ShapeError(f"score is {tuple(score.shape)}; expected {tuple(x.shape[-2:])}")
    if not shares or not all(0 <= s <= 1 for s in shares):
        raise RangeError(f"shares are {list(shares)}; expected at least one, each from 0 to 1")


def _masks(score: Tensor, shares: Sequence[float], device: torch.device) -> Tensor:
    """(2, S, 1, 1, H, W): the top and the bottom of the score, exactly ⌊p·HW⌋ pixels each."""
    both = torch.stack([score, -score])
    found = torch.stack([top_pixels(both, s, ties="order") for s in shares], 1)
    return found[:, :, None, None].to(device)


def blend_curve(
    model: Model,
    x: Tensor,
    y: Tensor,
    x_adv: Tensor,
    score: Tensor,
    *,
    shares: Sequence[float] = SHARES,
    seed: int | Tensor = 0,
    batch_size: int = 128,
) -> MaskedAttack:
    """S4 Fig. 1: attack the whole image, then keep the attack on a share p of the pixels only.

    Images become m⊙x_adv + (1−m)⊙x with m the top (or bottom) p of the score.

    Args:
        model: Gives logits.
        x: Images, (B, C, H, W), in [0, 1].
        y: Labels, (B,).
        x_adv: The same images, attacked everywhere.
        score: (H, W), such as `pixel_robustness`.
        shares: Values of p.
        seed: Integer, or one key per sample.
        batch_size: Images per forward pass.

    Returns:
        See `MaskedAttack`.

    Raises:
        ShapeError, DtypeError, RangeError, DeviceError: On bad arguments.

    Cost: 2·S forward passes per image for S shares.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> x, y = torch.rand(2, 3, 2, 2), torch.tensor([0, 1])
        >>> blend_curve(model, x, y, 1 - x, torch.rand(2, 2), shares=[0.5, 1.0]).top.shape
        torch.Size([2, 2])

    References:
        Hwang et al., PRM, ICLR DebugML workshop 2019, Fig. 1 as its blog post shows it.
    """
    _check(x, y, score, shares, batch_size)
    if x.shape != x_adv.shape:
        raise ShapeError(f"x is {tuple(x.shape)}, x_adv {tuple(x_adv.shape)}; expected one shape")
    masks = _masks(score, shares, x.device)
    mixed = torch.where(masks, x_adv, x)  # (2, S, B, C, H, W)
    times = 2 * len(shares)
    logits = logits_of(model, mixed.flatten(0, 2), sample_keys(seed, x).repeat(times), batch_size)
    right = ~adversarial(logits, y.repeat(times))
    top, bottom = right.view(2, len(shares), len(x))
    return MaskedAttack(torch.tensor(list(shares), dtype=torch.float64), top, bottom)


def masked_attack(
    model: Model,
    x: Tensor,
    y: Tensor,
    score: Tensor,
    *,
    shares: Sequence[float] = (0.3, 1.0),
    attack: Attack = pgd,
    judge: Model | None = None,
    order: Sequence[Literal["top", "bottom"]] = ("top", "bottom"),
    seed: int | Tensor = 0,
    batch_size: int = 128,
) -> MaskedAttack:
    """S0 Table 1: the attack itself is confined to G(p) by its `mask`, and can make the best of it.

    Args:
        model: What is attacked.
        x: Images, (B, C, H, W), in [0, 1].
        y: Labels, (B,).
        score: (H, W), such as Ω or `pixel_robustness`.
        shares: Values of p.
        attack: Any attack that takes `mask` and `seed`; bind its settings with `functools.partial`.
        judge: What decides whether an image is right; `model` by default.
        order: Which ends of the score are attacked; the other one counts as not attacked.
        seed: Integer, or one key per sample.
        batch_size: Images per pass.

    Returns:
        See `MaskedAttack`.

    Raises:
        ShapeError, DtypeError, RangeError, DeviceError: On bad arguments.

    Cost: that of `attack` for each share and each end, and one forward pass.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> x, y = torch.rand(2, 3, 2, 2), torch.tensor([0, 1])
        >>> masked_attack(model, x, y, torch.rand(2, 2), shares=[0.5]).bottom.shape
        torch.Size([1, 2])

    References:
        ACE (anonymous ICLR 2019 submission), §3.2 and Table 1.
    """
    _check(x, y, score, shares, batch_size)
    if not order or not set(order) <= {"top", "bottom"}:
        raise RangeError(f"order is {list(order)}; expected 'top', 'bottom' or both")
    masks, keys = _masks(score, shares, x.device), sample_keys(seed, x)
    target = model if judge is None else judge
    plain = ~adversarial(logits_of(target, x, keys, batch_size), y)
    found = plain.expand(2, len(shares), -1).clone()
    rows = [slice(i, i + batch_size) for i in range(0, len(x), batch_size)]
    for end in range(2):
        if ("top", "bottom")[end] not in order:
            continue
        for number in range(len(shares)):
            x_adv = torch.cat(
                [attack(model, x[r], y[r], mask=masks[end, number], seed=keys[r]) for r in rows]
            )
            found[end, number] = ~adversarial(logits_of(target, x_adv, keys, batch_size), y)
    return MaskedAttack(torch.tensor(list(shares), dtype=torch.float64), found[0], found[1])
