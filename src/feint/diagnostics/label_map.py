"""Label maps: the decision regions on a plane through an image."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from feint.core import random
from feint.core.errors import RangeError, ShapeError
from feint.core.gradients import Model
from feint.core.norms import norm_of
from feint.diagnostics._common import check, predict_variants, sample_keys

__all__ = [
    "LabelMap",
    "flip_distance",
    "label_map",
    "masked_directions",
    "perturbation_directions",
    "random_direction",
    "shifted_direction",
    "unit",
]


class LabelMap(NamedTuple):
    """Predicted classes on a square grid; the image itself is in the middle."""

    labels: Tensor
    """(B, P, P) int64: row j, column i is the class of x + axis[i]·first + axis[j]·second."""
    axis: Tensor
    """(P,): positions, from −reach to reach, in image units (l2)."""


def unit(direction: Tensor) -> Tensor:
    """Each sample's direction scaled to l2 norm 1; a zero direction stays zero.

    Args:
        direction: (B, C, H, W).

    Returns:
        Like it.

    Cost: no pass of a model.

    Example:
        >>> unit(torch.full((1, 1, 2, 2), 3.0)).flatten()
        tensor([0.5000, 0.5000, 0.5000, 0.5000])

    References:
        ACE (anonymous ICLR 2019 submission), §4.2.
    """
    ones = [1] * (direction.ndim - 1)
    tiny = torch.finfo(direction.dtype).tiny
    # Scaled first, so that a gradient of 1e-30 does not underflow when squared.
    scaled = direction / norm_of(direction, "linf").clamp_min(tiny).reshape(-1, *ones)
    return scaled / norm_of(scaled, "l2").clamp_min(tiny).reshape(-1, *ones)


def masked_directions(gradients: Tensor, connected: Tensor) -> tuple[Tensor, Tensor]:
    r"""S0's axes: the gradient off C and the gradient on C, each of Frobenius norm 1.

    Args:
        gradients: Input gradients, (B, C, H, W).
        connected: C, bool (H, W).

    Returns:
        ê_{X\C} (the x-axis of S0 Fig. 4) and ê_C (its y-axis), each like the gradients.

    Raises:
        ShapeError: The mask does not fit.

    Cost: no pass of a model.

    Example:
        >>> c = torch.tensor([[True, False]])
        >>> off, on = masked_directions(torch.tensor([[[[2.0, -3.0]]]]), c)
        >>> off.flatten(), on.flatten()
        (tensor([ 0., -1.]), tensor([1., 0.]))

    References:
        ACE (anonymous ICLR 2019 submission), §4.2, Figs. 4 and 8.
    """
    if connected.shape != gradients.shape[-2:] or connected.dtype != torch.bool:
        raise ShapeError(
            f"connected is {connected.dtype} {tuple(connected.shape)}; expected bool "
            f"{tuple(gradients.shape[-2:])}"
        )
    mask = connected.to(gradients.device)
    return unit(torch.where(mask, 0, gradients)), unit(torch.where(mask, gradients, 0))


def random_direction(x: Tensor, *, seed: int | Tensor = 0, off: Tensor | None = None) -> Tensor:
    """A random direction of norm 1 per image; with `off`, at a right angle to that direction.

    Args:
        x: Images, (B, C, H, W); give shape and keys.
        seed: Integer, or one key per sample.
        off: A unit direction per image, like `x`.

    Returns:
        Like `x`.

    Cost: no pass of a model.

    Example:
        >>> d = random_direction(torch.zeros(1, 3, 4, 4))
        >>> round(float(d.norm()), 5)
        1.0

    References:
        The customary second axis of such planes (Fawzi et al., CVPR 2018).
    """
    drawn = random.normal(random.fold(sample_keys(seed, x), "direction"), x.shape[1:], x.dtype)
    if off is not None:
        along = (drawn * off).flatten(1).sum(1).view(-1, 1, 1, 1)
        drawn = drawn - along * off
    return unit(drawn)


def shifted_direction(perturbation: Tensor, dx: int = 1, dy: int = 0) -> Tensor:
    """A perturbation moved by whole pixels, zeros following in: what a pixel shift makes of it.

    Args:
        perturbation: (B, C, H, W).
        dx: Pixels to the right.
        dy: Pixels down.

    Returns:
        Like it, with its own length (not scaled to 1).

    Raises:
        RangeError: A shift as long as a side.

    Cost: no pass of a model.

    Example:
        >>> shifted_direction(torch.tensor([[[[1.0, 2.0, 3.0]]]]))
        tensor([[[[0., 1., 2.]]]])

    References:
        ACE (anonymous ICLR 2019 submission), §4.3 and App. D.
    """
    height, width = perturbation.shape[-2:]
    if abs(dx) >= width or abs(dy) >= height:
        raise RangeError(f"shift ({dx}, {dy}) of {height}×{width} pixels; expected a shorter one")
    moved = torch.roll(perturbation, (dy, dx), (-2, -1))
    rows = torch.arange(height, device=moved.device) - dy
    columns = torch.arange(width, device=moved.device) - dx
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
    return torch.where(inside, moved, 0)


def perturbation_directions(
    x: Tensor, x_adv: Tensor, *, dx: int = 1, dy: int = 0
) -> tuple[Tensor, Tensor]:
    """The perturbation and the same one moved by a pixel, each of norm 1.

    The attack runs along the first axis. Where a shift defends, the second one, which is what the
    defended classifier meets, does not leave the true class.

    Args:
        x: Images, (B, C, H, W).
        x_adv: The same images attacked.
        dx: Pixels to the right.
        dy: Pixels down.

    Returns:
        Two directions like `x`; zero where the image was not changed.

    Raises:
        ShapeError: Two shapes.
        RangeError: A shift as long as a side.

    Cost: no pass of a model.

    Example:
        >>> first, second = perturbation_directions(torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4))
        >>> first.shape, int((second == 0).sum())
        (torch.Size([1, 3, 4, 4]), 12)

    References:
        ACE (anonymous ICLR 2019 submission), §4.3.
    """
    if x.shape != x_adv.shape:
        raise ShapeError(f"x is {tuple(x.shape)}, x_adv {tuple(x_adv.shape)}; expected one shape")
    delta = x_adv - x
    return unit(delta), unit(shifted_direction(delta, dx, dy))


def label_map(
    model: Model,
    x: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    reach: float,
    points: int = 41,
    clip: bool = False,
    seed: int | Tensor = 0,
    batch_size: int = 256,
) -> LabelMap:
    """Predicted classes of x + i·first + j·second for i, j from −reach to reach.

    Args:
        model: Gives logits.
        x: Images, (B, C, H, W), in [0, 1].
        first: Direction of the horizontal axis, like `x` (or one for all, (1, C, H, W)).
        second: Direction of the vertical axis.
        reach: Half the side of the plane, in units of the directions: for unit directions, l2 in
            image units. S0's ±100 are units of normalised space, about ±22.6 here.
        points: Points along each axis, odd, so that the image itself is one of them. S0: 200.
        clip: Clip the points to [0, 1]. S0 does not; points outside of the box are no images.
        seed: Integer, or one key per sample; all points of an image meet the same draw.
        batch_size: Points per forward pass.

    Returns:
        See `LabelMap`.

    Raises:
        RangeError: `reach` is not positive, or `points` is not odd and at least 3.
        ShapeError, DtypeError, DeviceError: On bad arguments.

    Cost: points² forward passes per image.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> x, d = torch.rand(2, 3, 2, 2), torch.ones(1, 3, 2, 2)
        >>> label_map(model, x, d, -d, reach=1.0, points=5).labels.shape
        torch.Size([2, 5, 5])

    References:
        ACE (anonymous ICLR 2019 submission), §4.2, Figs. 4 and 8; original code, `analysis.py`.

    Deviations:
        The axes are in image units, and their grid contains 0 exactly.
    """
    check(x, batch_size=batch_size)
    if not (reach > 0 and points >= 3 and points % 2 == 1):
        raise RangeError(f"reach {reach}, points {points}; expected > 0, and an odd number from 3")
    for name, direction in (("first", first), ("second", second)):
        if direction.shape[1:] != x.shape[1:] or len(direction) not in (1, len(x)):
            raise ShapeError(
                f"{name} is {tuple(direction.shape)}; expected {tuple(x.shape)} or one for all"
            )
    axis = torch.arange(points, device=x.device, dtype=x.dtype) - points // 2
    axis = axis * (reach / (points // 2))
    # Rows are found by the images they come with: the directions travel along in the channels.
    wide = torch.cat([x, first.expand_as(x), second.expand_as(x)], 1)

    def place(images: Tensor, number: Tensor) -> Tensor:
        image, right, up = images.chunk(3, 1)
        i, j = axis[number % points], axis[number // points]
        point = image + i.view(-1, 1, 1, 1) * right + j.view(-1, 1, 1, 1) * up
        return point.clamp(0, 1) if clip else point

    keys = sample_keys(seed, x)
    labels = predict_variants(model, wide, keys, points * points, place, batch_size)
    return LabelMap(labels.view(len(x), points, points), axis)


def flip_distance(found: LabelMap) -> tuple[Tensor, Tensor]:
    """Least distance from the image along each axis at which the label differs, either way.

    Args:
        found: From `label_map`.

    Returns:
        Along the first and along the second axis, each float64 (B,), to the grid's resolution;
        infinite where the label holds all along.

    Cost: no pass of a model.

    Example:
        >>> labels = torch.tensor([[[0, 0, 0], [1, 0, 0], [0, 0, 0]]])
        >>> flip_distance(LabelMap(labels, torch.tensor([-1.0, 0.0, 1.0])))
        (tensor([1.], dtype=torch.float64), tensor([inf], dtype=torch.float64))

    References:
        Puts a number to the asymmetry that S0 Fig. 4 shows.
    """
    middle = found.labels.shape[-1] // 2
    own = found.labels[:, middle, middle, None]
    size = found.axis.abs().double()

    def least(line: Tensor) -> Tensor:
        return torch.where(line != own, size, torch.inf).amin(1)

    return least(found.labels[:, middle, :]), least(found.labels[:, :, middle])
