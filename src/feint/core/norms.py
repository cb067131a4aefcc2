"""Norms, projections and steepest-ascent steps, per sample, for linf, l2, l1 and l0.

Tensors are (B, …); every result is per sample. Distances can be measured in float64 so that a
budget is checked more finely than it is computed.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from feint.core import random
from feint.core.errors import ConfigError

__all__ = [
    "NORMS",
    "Norm",
    "check_norm",
    "distance",
    "norm_of",
    "project",
    "random_in_ball",
    "steepest_ascent",
]

Norm = Literal["linf", "l2", "l1", "l0"]
NORMS: tuple[Norm, ...] = get_args(Norm)


def check_norm(norm: str, allowed: tuple[str, ...] = NORMS) -> None:
    """Refuse an unknown norm, or one that an attack does not support."""
    if norm not in allowed:
        raise ConfigError(f"norm is {norm!r}; expected one of {', '.join(allowed)}")


def _column(value: float | Tensor, like: Tensor) -> Tensor:
    """`value` as a tensor that broadcasts over the samples of `like`."""
    if not isinstance(value, Tensor):
        return torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return value.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def norm_of(delta: Tensor, norm: str) -> Tensor:
    """Norm of each sample, (B,): linf, l2, l1 over all values; l0 counts changed *pixels*.

    Convention:
        A pixel is changed if any of its channels is; inputs of other than four dimensions count
        values.
    """
    check_norm(norm)
    if norm == "l0":
        changed = delta != 0
        if delta.ndim == 4:
            changed = changed.any(1)
        return changed.flatten(1).sum(1).to(delta.dtype)
    flat = delta.flatten(1)
    if flat.shape[1] == 0:
        return flat.new_zeros(len(flat))
    order = {"linf": float("inf"), "l2": 2, "l1": 1}[norm]
    result: Tensor = torch.linalg.vector_norm(flat, order, dim=1)
    return result


def distance(x_adv: Tensor, x: Tensor, norm: str) -> Tensor:
    """Distance of each pair in float64, (B,) float64."""
    return norm_of(x_adv.double() - x.double(), norm)


def project(delta: Tensor, norm: str, eps: float | Tensor) -> Tensor:
    r"""Nearest point of the ball \|δ\| ≤ eps, in the l2 sense (for l0: the largest pixels kept).

    Args:
        delta: (B, …).
        norm: One of `NORMS`.
        eps: Radius, or one per sample (B,).

    References:
        l1: Duchi, Shalev-Shwartz, Singer, Chandra, ICML 2008, Fig. 1 (by sorting).
    """
    check_norm(norm)
    radius = _column(eps, delta)
    if norm == "linf":
        return torch.clamp(delta, -radius, radius)
    if norm == "l2":
        size = norm_of(delta, "l2").reshape(-1, *[1] * (delta.ndim - 1))
        return delta * (radius / size.clamp_min(torch.finfo(delta.dtype).tiny)).clamp_max(1)
    if norm == "l0":
        return _keep_largest(delta, radius)
    flat = delta.flatten(1)
    radius = radius.reshape(-1, 1).expand(len(flat), 1)
    magnitude = flat.abs()
    ordered = magnitude.sort(1, descending=True).values
    # In float64: a float32 threshold of thousands of values misses the radius by a millionth.
    excess = ordered.cumsum(1, dtype=torch.float64) - radius
    count = torch.arange(1, flat.shape[1] + 1, device=flat.device, dtype=torch.float64)
    active = (ordered * count > excess).sum(1, keepdim=True).clamp_min(1)
    threshold = (excess.gather(1, active - 1) / active).to(flat.dtype)
    inside = excess[:, -1:] <= 0
    shrunk = flat.sign() * (magnitude - threshold).clamp_min(0)
    return torch.where(inside, flat, shrunk).view_as(delta)


def _keep_largest(delta: Tensor, radius: Tensor) -> Tensor:
    pixels = delta.square().sum(1, keepdim=True) if delta.ndim == 4 else delta.square()
    flat = pixels.flatten(1)
    rank = flat.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    keep = rank < radius.reshape(-1, 1)
    return delta * keep.view_as(pixels)


def steepest_ascent(gradient: Tensor, norm: str, share: float = 0.05) -> Tensor:
    """Direction of unit norm that raises a linear loss the most, per sample.

    linf: the sign. l2: the normalised gradient. l1: the `share` largest values in proportion (the
    single largest one, which is exact, makes progress too slow to be of use; their bare signs, as
    in SLIDE, would never settle on the largest). l0: the `share` largest pixels, each normalised to
    a largest value of one.

    A zero gradient gives a zero direction.
    """
    check_norm(norm)
    if norm == "linf":
        return gradient.sign()
    tiny = torch.finfo(gradient.dtype).tiny
    ones = [1] * (gradient.ndim - 1)
    if norm == "l2":
        # Scaled first, so that a gradient of 1e-30 does not underflow when squared.
        scaled = gradient / norm_of(gradient, "linf").clamp_min(tiny).reshape(-1, *ones)
        return scaled / norm_of(scaled, "l2").clamp_min(tiny).reshape(-1, *ones)
    if norm == "l0":
        pixels = gradient.abs().sum(1, keepdim=True) if gradient.ndim == 4 else gradient.abs()
        flat = pixels.flatten(1)
        count = max(1, round(share * flat.shape[1]))
        kept = torch.zeros_like(flat).scatter_(1, flat.topk(count, dim=1).indices, 1.0)
        peak = gradient.abs().amax(1, keepdim=True) if gradient.ndim == 4 else gradient.abs()
        return gradient / peak.clamp_min(tiny) * kept.view_as(pixels)
    flat = gradient.flatten(1)
    count = max(1, round(share * flat.shape[1]))
    top = flat.abs().topk(count, dim=1)
    values = flat.gather(1, top.indices) / top.values[:, :1].clamp_min(tiny)
    values = values / values.abs().sum(1, keepdim=True).clamp_min(1)
    return torch.zeros_like(flat).scatter_(1, top.indices, values).view_as(gradient)


def random_in_ball(keys: Tensor, like: Tensor, norm: str, eps: float | Tensor) -> Tensor:
    """A uniform point of the ball per sample (l0: uniform values on `eps` random pixels).

    Args:
        keys: (B,), one per sample.
        like: (B, …); gives shape, dtype and device.
        norm: One of `NORMS`.
        eps: Radius, or one per sample (B,).
    """
    check_norm(norm)
    shape, n = like.shape[1:], like[0].numel() if len(like) else 0
    if n == 0 or len(like) == 0:
        return torch.zeros_like(like)
    radius = _column(eps, like)
    ones = [1] * (like.ndim - 1)
    if norm == "linf":
        return (2 * random.uniform(keys, shape) - 1).to(like.dtype) * radius
    if norm == "l0":
        pixels = like.shape[2:] if like.ndim == 4 else shape
        score = random.uniform(random.fold(keys, "pixels"), pixels)
        rank = score.flatten(1).argsort(dim=1).argsort(dim=1)
        keep = (rank < radius.reshape(-1, 1)).view(len(like), *pixels)
        values = (2 * random.uniform(keys, shape) - 1).to(like.dtype)
        return values * (keep[:, None] if like.ndim == 4 else keep)
    length = random.uniform(random.fold(keys, "radius"), dtype=torch.float64).pow(1 / n)
    if norm == "l2":
        direction = random.normal(keys, shape, torch.float64)
    else:  # l1: signed exponentials are uniform on the simplex after normalisation
        u = random.uniform(keys, shape, dtype=torch.float64)
        sign = random.integers(random.fold(keys, "sign"), 0, 2, shape) * 2 - 1
        direction = -torch.log1p(-u) * sign
    size = norm_of(direction, norm).reshape(-1, *ones)
    return (direction / size * length.reshape(-1, *ones)).to(like.dtype) * radius
