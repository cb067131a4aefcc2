"""Projections onto a ball or a hyperplane within the box [0, 1], exact and per sample."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ball_in_box", "l1_ball_in_box", "movable", "step_to_hyperplane"]

_ROUNDS = 12
"""Newton steps; each one that changes nothing is the last (few values reach the box at once)."""


def movable(slope: Tensor, point: Tensor) -> Tensor:
    """`slope`, without the values at an end of the box that it would push out."""
    stuck = ((point >= 1) & (slope > 0)) | ((point <= 0) & (slope < 0))
    return slope.masked_fill(stuck, 0)


def ball_in_box(delta: Tensor, x: Tensor, norm: str, radius: Tensor) -> Tensor:
    r"""The nearest δ (in l2) to `delta` with \|δ\| ≤ radius and x + δ in [0, 1].

    l2: δ_i = sign(v_i)·min(s·\|v_i\|, room_i), s ≤ 1 by Newton's method from below.

    Args:
        delta: v, (B, …).
        x: (B, …), in [0, 1].
        norm: `"linf"`, `"l2"` or `"l1"`.
        radius: Radius of each sample's ball, (B,).
    """
    if norm == "l1":
        return l1_ball_in_box(delta, x, radius)
    wide = radius.view(-1, *[1] * (delta.ndim - 1)).to(delta.dtype)
    if norm == "linf":
        delta = torch.clamp(delta, -wide, wide)
        return torch.minimum(torch.maximum(delta, -x), 1 - x)
    tiny = torch.finfo(delta.dtype).tiny
    flat, start = delta.flatten(1), x.flatten(1)
    room, size = torch.where(flat > 0, 1 - start, start), flat.abs()
    # Squared, the norm is a sum that is linear in s² until a value meets the box.
    corner = (room / size.clamp_min(tiny)).square()
    need = wide.flatten(1).square()
    scale = _level(size.square(), corner, room, need, room).clamp_max(1).sqrt()
    return (torch.minimum(scale * size, room) * flat.sign()).view_as(delta)


def l1_ball_in_box(delta: Tensor, x: Tensor, radius: float | Tensor) -> Tensor:
    r"""The nearest δ (in l2) to `delta` with \|δ\|₁ ≤ radius and x + δ in [0, 1].

    δ_i = sign(v_i)·min(max(\|v_i\| − λ, 0), room_i), room_i the way to the end of the box. The
    l1 norm is piecewise linear in λ, so that λ is found by sorting its 2n corners.

    Args:
        delta: v, (B, …).
        x: (B, …), in [0, 1].
        radius: Radius of the ball, or of each sample's, (B,).

    References:
        Croce, Hein, "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers",
        ICML 2021, Proposition 2.1.
    """
    if isinstance(radius, Tensor):
        radius = radius.double()[:, None]
    value = delta.flatten(1).double()
    room = torch.where(delta > 0, 1 - x, x).flatten(1).double()
    size = value.abs()
    corners = torch.cat([size, (size - room).clamp_min(0)], 1)
    slopes = torch.cat([torch.ones_like(size), -torch.ones_like(size)], 1)
    corners, order = corners.sort(dim=1, descending=True)
    slopes = slopes.gather(1, order)
    # Below corner k the norm is total_k − λ·count_k.
    count, total = slopes.cumsum(1), (slopes * corners).cumsum(1)
    after = torch.cat([corners[:, 1:], torch.zeros_like(corners[:, :1])], 1)
    reached = total - after * count >= radius
    k = reached.int().argmax(1, keepdim=True)
    shift = (total.gather(1, k) - radius) / count.gather(1, k).clamp_min(1)
    inside = ~reached.any(1, keepdim=True)
    shift = torch.where(inside, 0.0, shift).clamp_min(0)
    kept = torch.minimum((size - shift).clamp_min(0), room)
    return (kept * value.sign()).to(delta.dtype).view_as(delta)


def step_to_hyperplane(point: Tensor, slope: Tensor, need: Tensor, norm: str) -> Tensor:
    """The smallest step d (in `norm`) with ⟨slope, d⟩ = need and point + d in [0, 1].

    Where the box has no such point, the corner that comes nearest.

    Args:
        point: (B, …), in [0, 1].
        slope: (B, …), normal of the hyperplane.
        need: (B,), by how much ⟨slope, point⟩ must change; of either sign.
        norm: `"linf"`, `"l2"` or `"l1"`.

    References:
        Croce, Hein, "Minimally distorted adversarial examples with a fast adaptive boundary
        attack", ICML 2020, eq. (4) and appendix A.
    """
    flat = slope.flatten(1)
    ones = [1] * (flat.ndim - 1)
    uphill = flat * need.sign().view(-1, *ones)
    need = need.abs()[:, None]
    start = point.flatten(1)
    room = torch.where(uphill > 0, 1 - start, start)
    rate = flat.abs()
    if norm == "l1":
        step = _cheapest(rate, room, need)
    elif norm == "linf":
        step = torch.minimum(_level(rate, room, rate, need), room)
    else:
        full = room / rate.clamp_min(torch.finfo(rate.dtype).tiny)
        step = torch.minimum(_level(rate.square(), full, rate, need, room) * rate, room)
    return (step * uphill.sign()).view_as(slope)


def _level(
    rate: Tensor, full: Tensor, weight: Tensor, need: Tensor, room: Tensor | None = None
) -> Tensor:
    """Solve Σ rate·min(t, full) = need for t, (B, 1), by Newton's method from below.

    The sum is concave and piecewise linear in t, so the steps rise to the root and end there.
    """
    whole = weight * (full if room is None else room)
    tiny = torch.finfo(rate.dtype).tiny
    t = need / rate.sum(1, keepdim=True).clamp_min(tiny)
    for _ in range(_ROUNDS):
        done = full <= t
        left = need - (whole * done).sum(1, keepdim=True)
        free = rate.masked_fill(done, 0).sum(1, keepdim=True)
        # Where all values are at the end of the box already, nothing more can be had.
        t = torch.where(free > 0, torch.maximum(t, left / free.clamp_min(tiny)), t)
    return t


def _cheapest(rate: Tensor, room: Tensor, need: Tensor) -> Tensor:
    """Fill the values of the largest rate first, the last one in part."""
    order = rate.argsort(dim=1, descending=True, stable=True)
    gain = (rate * room).gather(1, order)
    before = gain.cumsum(1) - gain
    share = ((need - before) / gain.clamp_min(torch.finfo(rate.dtype).tiny)).clamp(0, 1)
    part = share * room.gather(1, order)
    return torch.zeros_like(rate).scatter(1, order, part)
