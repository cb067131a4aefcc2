"""Spatial attack: the worst of small shifts and rotations."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from feint.attacks._ascent import Stop, Trace
from feint.attacks._best import CHUNK, Best
from feint.attacks._minimal import check_count, check_number
from feint.core import random
from feint.core.checks import check_images
from feint.core.errors import ConfigError, RangeError
from feint.core.gradients import Model
from feint.core.losses import Loss
from feint.core.registry import attack

__all__ = ["spatial"]

_NORMS = ("spatial",)
_ROUND = 32
"""Transformations between two looks at who has fallen: fixed, so that no batch decides it."""


@attack(
    goal="transform",
    knowledge="score",
    norms=_NORMS,
    paper="Engstrom et al., 2019, arXiv:1712.02779",
    version=2,
    presets={
        # The eight neighbours of ACE's pixel shift, and what random shifts of it can undo.
        "ace": {"max_shift": 1.0, "shift_steps": 3, "max_angle": 0.0, "angle_steps": 1},
        "random10": {"search": "random", "tries": 10},
    },
)
def spatial(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    preset: str | None = None,
    max_shift: float = 3.0,
    max_angle: float = 30.0,
    search: Literal["grid", "random"] = "grid",
    shift_steps: int = 5,
    angle_steps: int = 31,
    tries: int = 100,
    pad: Literal["zero", "replicate"] = "zero",
    chunk: int = CHUNK,
    targeted: bool = False,
    loss: str | Loss = "margin",
    mask: Tensor | None = None,
    seed: int | Tensor = 0,
    stop: Stop | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """Shift and rotate the image within bounds, and keep the worst that the model sees.

    No lp ball holds such images, so there is no `eps`: the budget is `max_shift` and `max_angle`.
    It is the natural adversary of defenses that move pixels (pixel shift, RDG): what remains of
    the clean accuracy under it bounds what they can keep.

    Convention:
        Images are float RGB, NCHW, in [0, 1]. The image turns counterclockwise by θ degrees about
        its center, then moves by d pixels (right, down); bilinear. A shift by whole pixels without
        rotation copies values exactly.

    Args:
        model: Maps images in [0, 1] to logits (B, K); with `keys=` if it is stochastic.
        x: Images, (B, C, H, W), in [0, 1].
        y: True labels (B,), or targets if `targeted`.
        preset: `"ace"` (whole shifts by one pixel at most, no rotation) or `"random10"` (Engstrom
            et al.'s worst of 10); keywords that are given win over it. None by default: their grid.
        max_shift: Largest shift along each axis, in pixels, at least 0.
        max_angle: Largest rotation, in degrees, from 0 to 180.
        search: `"grid"` tries every combination, `"random"` `tries` uniform ones per sample.
        shift_steps: Grid values per axis, an odd number: from −max_shift to max_shift, 0 among
            them.
        angle_steps: Grid angles, an odd number.
        tries: Random transformations.
        pad: What comes in at the border: `"zero"` (black) or `"replicate"` (the border's pixels).
        chunk: Images per forward pass.
        targeted: Seek the class `y` instead of any other.
        loss: Which transformation is worst: `"margin"`, `"cross_entropy"`, `"dlr"`, or a function.
        mask: Pixels that may change, bool (B or 1, 1 or C, H, W); others keep the clean value.
        seed: Integer, or one key per sample from `feint.core.random.keys`.
        stop: `"success"` drops a sample after the 32 transformations of the round in which one
            fooled the model, `"never"` tries all; by default `"success"` for a deterministic model.
        trace: Called as `trace(step, x_adv, logits, loss, active)` at every evaluated point, once
            per forward pass; step 0 are the clean images, then a step for each round.

    Returns:
        x_adv: Like `x`, in [0, 1]: of the images tried, adversarial ones first, that of the highest
        loss. The clean image is one of them.

    Raises:
        ConfigError, RangeError, ShapeError, DtypeError, DeviceError: On bad arguments.
        ModelError: If the logits are NaN or have the wrong shape.

    Cost:
        Per sample at most 1 + shift_steps²·angle_steps (grid: 775 + 1 by default) or 1 + tries
        forward passes, and as many resamplings; the smallest transformations come first.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
        >>> x, y = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
        >>> spatial(model, x, y, max_shift=1, max_angle=0).shape
        torch.Size([2, 3, 4, 4])

    References:
        Engstrom, Tran, Tsipras, Schmidt, Madry, "Exploring the landscape of spatial robustness",
        ICML 2019, §3 (3 pixels, 30°, 5·5·31 values on CIFAR-10).

    Deviations:
        Small transformations are tried first, so that an early stop returns a mild one.
    """
    _check_bounds(max_shift, max_angle, shift_steps, angle_steps)
    check_count("tries", tries)
    check_count("chunk", chunk)
    if search not in ("grid", "random"):
        raise ConfigError(f"search is {search!r}; expected 'grid' or 'random'")
    if pad not in ("zero", "replicate"):
        raise ConfigError(f"pad is {pad!r}; expected 'zero' or 'replicate'")
    check_images(x)
    best = Best(
        model,
        x,
        y,
        norm="spatial",
        norms=_NORMS,
        targeted=targeted,
        loss=loss,
        mask=mask,
        seed=seed,
        stop=stop,
        trace=trace,
    )
    if len(x) == 0:
        return x.clone()
    if search == "grid":
        moves = _grid(max_shift, max_angle, shift_steps, angle_steps).to(x.device)[None]
    else:
        moves = _random(best.keys, max_shift, max_angle, tries)
    rows = best.everyone
    best.look(rows)
    for step, part in enumerate(moves.split(_ROUND, dim=1), start=1):
        if best.early:
            rows = rows[best.standing(rows)]
            if len(rows) == 0:
                break
        count = part.shape[1]
        if count == 0:  # nothing but the identity is within the bounds
            break

        def build(
            flat: Tensor, part: Tensor = part, rows: Tensor = rows, count: int = count
        ) -> Tensor:
            owner = rows[flat // count]
            which = owner if len(part) > 1 else torch.zeros_like(owner)
            moved = _move(best.x[owner], part[which, flat % count], pad)
            return best.masked(moved, owner)

        best.try_many(build, count, rows, step, chunk)
    return best.result()


def _check_bounds(max_shift: float, max_angle: float, shift_steps: int, angle_steps: int) -> None:
    check_number("max_shift", max_shift)
    check_number("max_angle", max_angle, high=180.0)
    for name, value in (("shift_steps", shift_steps), ("angle_steps", angle_steps)):
        check_count(name, value)
        if value % 2 == 0:
            raise RangeError(f"{name} is {value}; expected an odd number, so that 0 is a value")


def _grid(max_shift: float, max_angle: float, shift_steps: int, angle_steps: int) -> Tensor:
    """Every (dx, dy, degrees) of the grid but for the identity, mild ones first, (T, 3) float64."""

    def line(most: float, count: int) -> Tensor:
        half = count // 2
        whole = torch.arange(-half, half + 1, dtype=torch.float64)
        return (whole * (most / max(1, half))).unique()

    shift, angle = line(max_shift, shift_steps), line(max_angle, angle_steps)
    moves = torch.cartesian_prod(shift, shift, angle)
    # Each as a share of its bound; whatever has no range is 0.
    bound = torch.tensor([max_shift, max_shift, max_angle]).double().clamp_min(1e-9)
    size = (moves / bound).norm(dim=1)
    order = size.argsort(stable=True)
    return moves[order][size[order] > 0]


def _random(keys: Tensor, max_shift: float, max_angle: float, tries: int) -> Tensor:
    """(B, T, 3) float64, each sample's own."""
    bound = torch.tensor([max_shift, max_shift, max_angle], dtype=torch.float64)
    number = torch.arange(tries, device=keys.device)
    drawn = random.uniform(random.fold(keys, "moves", 0, number), (3,), dtype=torch.float64)
    return (2 * drawn - 1) * bound.to(keys.device)


def _move(x: Tensor, move: Tensor, pad: str) -> Tensor:
    """Each image (N, C, H, W) shifted and rotated by its own (dx, dy, degrees), (N, 3)."""
    channels, height, width = x.shape[1:]
    dx, dy, degrees = move.unbind(1)
    cos, sin = (degrees * (math.pi / 180)).cos(), (degrees * (math.pi / 180)).sin()
    # Where a pixel comes from, on a scale of −1 to 1 between the edges of each axis.
    from_x = [cos, -sin * (height / width), (sin * dy - cos * dx) * (2 / width)]
    from_y = [sin * (width / height), cos, -(sin * dx + cos * dy) * (2 / height)]
    theta = torch.stack(from_x + from_y, 1).view(-1, 2, 3)
    work = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    grid = F.affine_grid(theta.to(work), list(x.shape), align_corners=False)
    border: Literal["zeros", "border"] = "zeros" if pad == "zero" else "border"
    moved = F.grid_sample(x.to(work), grid, padding_mode=border, align_corners=False).to(x.dtype)
    # Whole shifts are copied: the scale's rounding would mix in a trace of the neighbors.
    whole = ((move == move.round()) & (degrees == 0)[:, None]).all(1)
    row = torch.arange(height, device=x.device) - dy.round().long()[:, None]
    column = torch.arange(width, device=x.device) - dx.round().long()[:, None]
    place = row.clamp(0, height - 1)[:, :, None] * width + column.clamp(0, width - 1)[:, None]
    copied = x.flatten(2).gather(2, place.flatten(1)[:, None].expand(-1, channels, -1)).view_as(x)
    if pad == "zero":
        off_y, off_x = (row < 0) | (row >= height), (column < 0) | (column >= width)
        copied.masked_fill_((off_y[:, :, None] | off_x[:, None])[:, None], 0)
    return torch.where(whole.view(-1, 1, 1, 1), copied, moved).clamp_(0, 1)
