"""Sets of pixels: G(p), the connected pixels C, and how much two sets share."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from feint.core.errors import DtypeError, RangeError, ShapeError

__all__ = [
    "connected_pixels",
    "intersection_over_union",
    "share_inside",
    "top_pixels",
    "window_overlap",
]

Ties = Literal["drop", "order"]


def top_pixels(score: Tensor, share: float, *, ties: Ties = "drop") -> Tensor:
    """G(p): the pixels whose score is in the top fraction p.

    Convention:
        `ties="drop"` is S0's code, with which its Table 2 was made: pixels *strictly above* the
        ⌊p·HW⌋-th largest score, so at most ⌊p·HW⌋ − 1 of them, and all that tie with that score
        stay out (a constant map has an empty G). `ties="order"` takes exactly ⌊p·HW⌋ pixels, of
        equal ones the first in reading order, which is what an attack's `mask` wants.

    Args:
        score: (…, H, W), such as Ω or a heat map; each map on its own.
        share: p in [0, 1].
        ties: See above.

    Returns:
        bool, the shape of `score`. `mask[None, None]` of an (H, W) map is an attack's `mask`.

    Raises:
        RangeError: p outside [0, 1], or NaN in the scores.
        ShapeError: Fewer than two dimensions.

    Cost: no pass of a model; one sort.

    Example:
        >>> top_pixels(torch.tensor([[4.0, 1.0], [3.0, 2.0]]), 0.5, ties="order")
        tensor([[ True, False],
                [ True, False]])

    References:
        ACE (anonymous ICLR 2019 submission), §2.2 and Table 2; original code, `get_artifact`.
    """
    if score.ndim < 2:
        raise ShapeError(f"score has shape {tuple(score.shape)}; expected (…, H, W)")
    if not 0 <= share <= 1:
        raise RangeError(f"share is {share}; expected a fraction from 0 to 1")
    if bool(score.isnan().any()):
        raise RangeError("score contains NaN; expected finite scores")
    if ties not in ("drop", "order"):
        raise RangeError(f"ties is {ties!r}; expected 'drop' or 'order'")
    flat = score.flatten(-2)
    # A share such as 0.29 of 100 pixels means 29 of them, though 0.29 · 100 is 28.999….
    count = math.floor(share * flat.shape[-1] + 1e-9)
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if ties == "drop":
        bound = flat.topk(count, dim=-1).values[..., -1:]
        return (flat > bound).view(score.shape)
    order = flat.argsort(dim=-1, descending=True, stable=True)
    top = torch.zeros_like(flat, dtype=torch.bool)
    return top.scatter(-1, order[..., :count], True).view(score.shape)


def window_overlap(
    height: int,
    width: int,
    *,
    kernel: int,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> Tensor:
    """How many windows of a convolution touch each pixel: its uneven overlap, in closed form.

    Where it is uneven between neighbours (the kernel is not divisible by the stride) lies the
    origin of checkerboards; where it is 0, the convolution does not read.

    Args:
        height: Of the input, in pixels.
        width: Of the input.
        kernel: Side of the kernel.
        stride: Of the convolution.
        padding: Pixels added on every side.
        dilation: Distance of the kernel's taps.

    Returns:
        int64, (height, width).

    Raises:
        RangeError: A number that no convolution has, or a window larger than the padded input.

    Cost: no pass of a model.

    Example:
        >>> window_overlap(3, 5, kernel=3, stride=2, padding=1)[1]
        tensor([2, 4, 2, 4, 2])

    References:
        Odena, Dumoulin, Olah, "Deconvolution and checkerboard artifacts", Distill 2016; ACE, §2.2.
    """
    if min(height, width, kernel, stride, dilation) < 1 or padding < 0:
        raise RangeError(
            f"got {height}×{width} pixels, kernel {kernel}, stride {stride}, padding {padding}, "
            f"dilation {dilation}; expected at least 1 each, padding at least 0"
        )

    def line(length: int) -> Tensor:
        reach = dilation * (kernel - 1) + 1
        windows = (length + 2 * padding - reach) // stride + 1
        if windows < 1:
            raise RangeError(
                f"a window of {reach} pixels does not fit {length} pixels with padding {padding}"
            )
        first = torch.arange(windows)[:, None] * stride - padding
        touched = (first + torch.arange(kernel) * dilation).flatten()
        touched = touched[(touched >= 0) & (touched < length)]
        return torch.bincount(touched, minlength=length)

    return line(height)[:, None] * line(width)[None, :]


def connected_pixels(
    model: nn.Module | None, height: int, width: int, *, stride: int = 2
) -> Tensor:
    """The set C: pixels that the encoder of a checkerboard module reads.

    Convention:
        The first module inside of `model` that has a method `connected(height, width)` (ACE) says
        which pixels it reads. A model without one has the set that a 1×1 convolution of the given
        stride would read, (row, column) both divisible by it: S0 Table 2 compares λ=0 with it too.
        The numbers are those of the model's own input: an image that the model resizes first has
        no such set.

    Args:
        model: A classifier, with or without such a module; or none.
        height: Of the image, in pixels.
        width: Of the image.
        stride: For models without such a module.

    Returns:
        bool, (height, width).

    Raises:
        RangeError: A size or stride below 1.

    Cost: no pass of a model.

    Example:
        >>> connected_pixels(None, 2, 4)
        tensor([[ True, False,  True, False],
                [False, False, False, False]])

    References:
        ACE (anonymous ICLR 2019 submission), §4.1; Hwang et al., PRM, 2019.
    """
    if model is not None:
        for module in model.modules():
            connected = getattr(module, "connected", None)
            if callable(connected):
                found: Tensor = connected(height, width)
                return found.view(height, width)
    return window_overlap(height, width, kernel=1, stride=stride) > 0


def _pair(a: Tensor, b: Tensor) -> None:
    for name, mask in (("first", a), ("second", b)):
        if mask.dtype != torch.bool:
            raise DtypeError(f"the {name} set has dtype {mask.dtype}; expected bool")
    if a.ndim < 2 or b.ndim < 2 or a.shape[-2:] != b.shape[-2:]:
        raise ShapeError(f"the sets are {tuple(a.shape)} and {tuple(b.shape)}; expected one size")


def share_inside(part: Tensor, whole: Tensor) -> Tensor:
    """|part ∩ whole| / |part|: S0 Table 2 with part = C and whole = G(0.3).

    Args:
        part: bool, (…, H, W).
        whole: bool, (…, H, W), broadcastable.

    Returns:
        (…) float64; NaN where `part` is empty.

    Raises:
        DtypeError, ShapeError: No two masks of one size.

    Cost: no pass of a model.

    Example:
        >>> c = connected_pixels(None, 4, 4)
        >>> float(share_inside(c, torch.arange(16).view(4, 4) < 8))
        0.5

    References:
        ACE (anonymous ICLR 2019 submission), Table 2.
    """
    _pair(part, whole)
    return (part & whole).sum((-2, -1)).double() / part.sum((-2, -1)).double()


def intersection_over_union(a: Tensor, b: Tensor) -> Tensor:
    """|a ∩ b| / |a ∪ b|: S4's alignment of the least robust quarter with the connected pixels.

    Args:
        a: bool, (…, H, W).
        b: bool, (…, H, W), broadcastable.

    Returns:
        (…) float64; NaN where both are empty. Two random quarters of an image share 1/7.

    Raises:
        DtypeError, ShapeError: No two masks of one size.

    Cost: no pass of a model.

    Example:
        >>> c = connected_pixels(None, 4, 4)
        >>> float(intersection_over_union(c, c))
        1.0

    References:
        Hwang et al., PRM, ICLR DebugML workshop 2019, as its blog post describes (§3, figure 5).
    """
    _pair(a, b)
    return (a & b).sum((-2, -1)).double() / (a | b).sum((-2, -1)).double()
