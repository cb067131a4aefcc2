"""Median smoothing (feature squeezing)."""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor, nn

from feint.core.errors import RangeError
from feint.core.registry import defense
from feint.defenses.base import Defense, Params, backward_rule

__all__ = ["Median"]


@defense("median", paper="Xu, Evans, Qi, 2018, arXiv:1704.01155")
class Median(Defense):
    """Median smoothing (feature squeezing): each value becomes the median of its window.

    Claim: it undoes changes of few pixels (Xu et al. §3.2; 2×2 and 3×3 windows). Known break: the
    squeezers, alone or together, fall to an attack that knows of them (He et al. 2017); the filter
    only copies values, so its gradient is exact.

    Backward rules:
        `exact`, the default: one for the value that was selected (of equal values in a window the
        first in reading order), zero for the others. `identity`: the image itself. `surrogate`:
        the window's mean, which reaches every value of the window.

    Args:
        size: Side k of the window.

    Convention:
        That of `scipy.ndimage.median_filter`: an even window reaches one pixel further up and left
        (its center is the lower right of the four for k = 2), the median of n values is the one of
        rank ⌊n/2⌋, counted from 0 (the upper of the two for an even n), and beyond the border the
        image is mirrored with its border pixel repeated (`mode="reflect"`). Channels are filtered
        apart. Any size of image, also smaller than the window.

    Raises:
        RangeError: If `size` is not a whole number ≥ 1.

    Cost: A comparison network on whole images, 7 comparisons per value for k = 2, 36 for k = 3, 202
        for k = 5: on a 224×224 image 1 %, 2 % and 21 % of a ResNet-50 forward pass (one CPU
        thread), 5, 7 and 3 times as fast as scipy. With gradient the k² shifted images are held in
        memory.

    Example:
        >>> import torch
        >>> x = torch.zeros(1, 1, 3, 3)
        >>> x[..., 1, 1] = 1.0
        >>> float(Median(size=3)(x).sum())
        0.0

    References:
        Xu, Evans, Qi, "Feature squeezing: detecting adversarial examples in deep neural networks",
        NDSS 2018, §3.2. Batcher, "Sorting networks and their applications", 1968. He, Wei, Chen,
        Carlini, Song, "Adversarial example defenses: ensembles of weak defenses are not strong",
        WOOT 2017.
    """

    differentiable: ClassVar[bool] = True
    stochastic: ClassVar[bool] = False

    def __init__(self, *, size: int = 2) -> None:
        super().__init__()
        if type(size) is not int or size < 1:
            raise RangeError(f"size is {size!r}; expected the window's side, a whole number ≥ 1")
        self.size = size

    def _windows(self, x: Tensor) -> list[Tensor]:
        """The k² shifted images, in reading order of the window; views of one padded image."""
        height, width = x.shape[-2:]
        rows, columns = (_mirrored(n, self.size, x.device) for n in (height, width))
        wide = x.index_select(2, rows).index_select(3, columns)
        return [
            wide[..., i : i + height, j : j + width]
            for i in range(self.size)
            for j in range(self.size)
        ]

    def transform(self, x: Tensor, params: Params) -> Tensor:
        """The medians."""
        if x.numel() == 0 or self.size == 1:
            return x.clone()
        windows = self._windows(x)
        median = _select([w.detach() for w in windows], self.size**2 // 2)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return median
        stack = torch.stack(windows)
        chosen = (stack.detach() == median).to(torch.uint8).argmax(0, keepdim=True)
        return stack.gather(0, chosen)[0]

    @backward_rule("identity")
    def identity(self, x: Tensor, params: Params) -> Tensor:
        """The image itself."""
        return x

    @backward_rule("surrogate")
    def surrogate(self, x: Tensor, params: Params) -> Tensor:
        """The mean of the window."""
        if x.numel() == 0:
            return x.clone()
        height, width = x.shape[-2:]
        rows, columns = (_mirrored(n, self.size, x.device) for n in (height, width))
        wide = x.index_select(2, rows).index_select(3, columns)
        return nn.functional.avg_pool2d(wide, self.size, stride=1)


def _mirrored(n: int, size: int, device: torch.device) -> Tensor:
    """Where each pixel of an axis of n, widened for the window, comes from: (n + size − 1,)."""
    place = torch.arange(-(size // 2), n + size - 1 - size // 2, device=device) % (2 * n)
    return torch.where(place >= n, 2 * n - 1 - place, place)


def _select(planes: list[Tensor], rank: int) -> Tensor:
    """The plane of the values of that rank, from 0 for the smallest."""
    planes = list(planes)
    for low, high, keep_low, keep_high in selection_network(len(planes), rank):
        a, b = planes[low], planes[high]
        if keep_low:
            planes[low] = torch.minimum(a, b)
        if keep_high:
            planes[high] = torch.maximum(a, b)
    return planes[rank]


@lru_cache(maxsize=16)
def selection_network(count: int, rank: int) -> tuple[tuple[int, int, bool, bool], ...]:
    """Batcher's merge exchange (Knuth's algorithm 5.2.2M), without what `rank` does not hang on.

    Returns:
        Comparisons (low, high, is the minimum needed, is the maximum needed) in their order.
    """
    sort: list[tuple[int, int]] = []
    top = 1 << max(count - 1, 1).bit_length() - 1
    p = top
    while p:
        q, r, d = top, 0, p
        while True:
            sort += [(i, i + d) for i in range(count - d) if i & p == r]
            if q == p:
                break
            d, q, r = q - p, q >> 1, p
        p >>= 1
    needed, kept = {rank}, []
    for low, high in reversed(sort):
        if low in needed or high in needed:
            kept.append((low, high, low in needed, high in needed))
            needed |= {low, high}
    return tuple(reversed(kept))
