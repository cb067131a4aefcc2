"""Image quilting, batched: patches laid over each other, cut along seams of least error."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["quilt", "seam"]


def seam(error: Tensor) -> Tensor:
    """The path of least total error from the first row to the last, one cell per row.

    Neighboring cells of a path differ by at most one column; of equal paths the leftmost cell
    counts, from the last row on.

    Args:
        error: (…, L, W), at least 0.

    Returns:
        Column of the path in each row, int64, (…, L).

    Cost: L steps on tensors of shape (…, W).

    Example:
        >>> seam(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 5.0]]))
        tensor([1, 0, 0])
    """
    far = torch.full_like(error[..., 0, :1], torch.inf)
    costs = [error[..., 0, :]]
    for row in range(1, error.shape[-2]):
        costs.append(_least(costs[-1], far) + error[..., row, :])
    column = costs[-1].argmin(-1, keepdim=True)
    path = [column]
    width = error.shape[-1]
    for cost in reversed(costs[:-1]):
        around = torch.stack([column - 1, column, column + 1], -1)[..., 0, :]
        value = cost.gather(-1, around.clamp(0, width - 1))
        value = torch.where((around >= 0) & (around < width), value, torch.inf)
        column = around.gather(-1, value.argmin(-1, keepdim=True))
        path.append(column)
    return torch.cat(path[::-1], -1)


def _least(cost: Tensor, far: Tensor) -> Tensor:
    """The least of each cell and its two neighbors."""
    wide = torch.cat([far, cost, far], -1)
    return torch.minimum(torch.minimum(wide[..., :-2], wide[..., 1:-1]), wide[..., 2:])


def quilt(patches: Tensor, overlap: int, cut: bool) -> Tensor:
    """Patches of a grid laid in reading order, each over what lies there already.

    Args:
        patches: (B, rows, columns, C, P, P).
        overlap: Pixels that neighbors share, 0 … P − 1.
        cut: Cut each patch's left and upper overlap along a seam of least squared difference; the
            seam's own cells are the new patch's. Otherwise the whole patch covers what was there.

    Returns:
        (B, C, H, W) with H = P + (rows − 1)·(P − overlap), W likewise.

    Cost: A patch hangs on its left neighbor and on the three above it, so those of one wave
        (columns + reach · rows) are laid together: some 2 · rows + columns steps for the batch.
    """
    b, rows, columns, c, size, _ = patches.shape
    stride = size - overlap
    height, width = size + (rows - 1) * stride, size + (columns - 1) * stride
    board = patches.new_zeros(b, c, height, width)
    reach = -(-size // stride)  # patches along an axis that one touches, itself included
    place = torch.arange(size, device=patches.device)
    wave_of = torch.arange(columns)[None] + reach * torch.arange(rows)[:, None]
    for wave in range(int(wave_of.max()) + 1):
        i, j = (v.to(patches.device) for v in torch.where(wave_of == wave))
        if not len(i):
            continue
        y = (i * stride)[:, None, None] + place[:, None]  # (n, P, 1)
        x = (j * stride)[:, None, None] + place  # (n, 1, P)
        new = patches[:, i, j].transpose(1, 2)  # (B, C, n, P, P)
        if cut and overlap:
            old = board[:, :, y, x]
            error = (old - new).square().sum(1)  # (B, n, P, P)
            left = seam(error[..., :overlap])[..., :, None]
            top = seam(error[..., :overlap, :].mT)[..., None, :]
            over = (place >= left) | (j == 0)[:, None, None]
            over = over & ((place[:, None] >= top) | (i == 0)[:, None, None])
            new = torch.where(over[:, None], new, old)
        board[:, :, y, x] = new
    return board
