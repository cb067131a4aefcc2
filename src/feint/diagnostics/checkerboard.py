"""Checkerboard share: how much of a map lies on a set of pixels, or on each phase of a grid."""

from __future__ import annotations

import torch
from torch import Tensor

from feint.core.errors import DtypeError, RangeError, ShapeError

__all__ = ["checkerboard_share", "phase_shares"]


def _maps(score: Tensor) -> Tensor:
    if score.ndim < 2:
        raise ShapeError(f"score has shape {tuple(score.shape)}; expected (…, H, W)")
    if bool((score < 0).any()) or not bool(score.isfinite().all()):
        raise RangeError("score has negative or non-finite values; expected magnitudes ≥ 0")
    return score.double()


def checkerboard_share(score: Tensor, connected: Tensor) -> Tensor:
    """Share of a map's mass on the set C: Σ_C score / Σ score.

    A map that ignores the grid has |C| / HW, a quarter for a stride of 2.

    Args:
        score: Magnitudes, (…, H, W): |gradient|, |perturbation|, Ω.
        connected: C, bool (H, W).

    Returns:
        (…) float64; NaN where the map is zero everywhere.

    Raises:
        ShapeError, DtypeError, RangeError: No such map or set; negative or non-finite values.

    Cost: no pass of a model.

    Example:
        >>> c = torch.tensor([[True, False], [False, False]])
        >>> float(checkerboard_share(torch.tensor([[3.0, 1.0], [0.0, 0.0]]), c))
        0.75

    References:
        The quantity behind S0 Fig. 3 and Figs. 10–11 (ACE, anonymous ICLR 2019 submission), which
        shows the maps and gives no number.
    """
    score = _maps(score)
    if connected.dtype != torch.bool or connected.shape != score.shape[-2:]:
        raise DtypeError(
            f"connected is {connected.dtype} {tuple(connected.shape)}; expected bool "
            f"{tuple(score.shape[-2:])}"
        )
    total = score.sum((-2, -1))
    return (score * connected.to(score.device)).sum((-2, -1)) / total


def phase_shares(score: Tensor, stride: int = 2) -> Tensor:
    """Share of a map's mass on each phase (row mod stride, column mod stride).

    Sees a checkerboard of any phase, as strided layers inside of a network make them (S0 Fig. 7),
    where no set C is known.

    Args:
        score: Magnitudes, (…, H, W).
        stride: Period in pixels.

    Returns:
        (…, stride, stride) float64, summing to 1; NaN where the map is zero everywhere. Each is
        divided by the number of its pixels first, so that odd sides do not favour a phase.

    Raises:
        RangeError: A stride below 1 or beyond a side; negative or non-finite values.

    Cost: no pass of a model.

    Example:
        >>> phase_shares(torch.eye(4))
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]], dtype=torch.float64)

    References:
        ACE (anonymous ICLR 2019 submission), App. B; Odena et al., Distill 2016.
    """
    score = _maps(score)
    height, width = score.shape[-2:]
    if not 1 <= stride <= min(height, width):
        raise RangeError(f"stride is {stride}; expected 1 to {min(height, width)}, the short side")
    rows = torch.nn.functional.one_hot(torch.arange(height) % stride, stride)
    columns = torch.nn.functional.one_hot(torch.arange(width) % stride, stride)
    rows, columns = rows.to(score), columns.to(score)
    mean = torch.einsum("...hw,hr,wc->...rc", score, rows / rows.sum(0), columns / columns.sum(0))
    return mean / mean.sum((-2, -1), keepdim=True)
