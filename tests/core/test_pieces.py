"""Batches in pieces. Oracle: the function on the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from feint.core import random
from feint.core.pieces import in_pieces


@pytest.mark.parametrize("batch", [0, 1, 3, 7])
def test_pieces_make_the_whole_with_its_gradient(batch: int) -> None:
    x = random.uniform(random.keys(0, batch), (3, 300, 310)).requires_grad_()
    seen: list[int] = []

    def function(z: Tensor) -> Tensor:
        seen.append(len(z))
        return z.square()

    y = in_pieces(function, x)
    assert torch.equal(y, x.square())
    (g,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(g, 2 * x)
    assert seen == [1] * batch if batch > 1 else seen == [batch]


def test_small_batches_stay_whole_and_large_ones_are_cut_evenly() -> None:
    sizes: list[int] = []

    def function(z: Tensor) -> Tensor:
        sizes.append(len(z))
        return z

    in_pieces(function, torch.zeros(64, 3, 32, 32))
    in_pieces(function, torch.zeros(200, 3, 32, 32))
    assert sizes == [64, 85, 85, 30]  # 2¹⁸ values are 85 such images
