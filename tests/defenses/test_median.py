"""Median. Oracles: scipy.ndimage.median_filter bit by bit, sorting, hand-made windows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import ndimage

from feint.core.errors import RangeError
from feint.defenses import Median
from feint.defenses.median import selection_network
from tests.contracts.defense import DefenseContract, images


class TestMedian(DefenseContract):
    cls = Median
    configs = ({}, {"size": 1}, {"size": 3}, {"size": 4}, {"size": 5})
    batch_atol = 0.0


@pytest.mark.parametrize("size", range(1, 8))
@pytest.mark.parametrize("shape", [(17, 23), (2, 3), (1, 1), (1, 9), (8, 8)])
def test_equals_scipy_bit_by_bit(size: int, shape: tuple[int, int]) -> None:
    """Windows larger than the image included: scipy mirrors as often as it takes."""
    x = images(size, 2, 3, *shape)
    expected = ndimage.median_filter(x.numpy(), size=(1, 1, size, size), mode="reflect")
    np.testing.assert_array_equal(Median(size=size)(x).numpy(), expected)
    leaf = x.clone().requires_grad_()
    np.testing.assert_array_equal(Median(size=size)(leaf).detach().numpy(), expected)


@pytest.mark.parametrize("size", [2, 3])
def test_equals_scipy_on_eight_bit_images_with_their_ties(size: int) -> None:
    x = (images(1, 1, 3, 30, 31) * 4).round() / 4
    expected = ndimage.median_filter(x.numpy(), size=(1, 1, size, size), mode="reflect")
    np.testing.assert_array_equal(Median(size=size)(x).numpy(), expected)


@pytest.mark.parametrize("count", range(1, 10))
def test_network_selects_every_rank(count: int) -> None:
    """Oracle: the zero–one principle: a network that selects right on all 2ⁿ bit vectors does so
    on all values."""
    for rank in range(count):
        network = selection_network(count, rank)
        for bits in itertools.product((0, 1), repeat=count):
            v = list(bits)
            for low, high, keep_low, keep_high in network:
                a, b = v[low], v[high]
                v[low] = min(a, b) if keep_low else 9  # what is not kept is not read again
                v[high] = max(a, b) if keep_high else 9
            assert v[rank] == sorted(bits)[rank]


def test_gradient_is_that_of_the_selected_element() -> None:
    """Oracle: every output is a copy, so its gradient counts where each pixel was copied to;
    pixels are told apart by their values."""
    order = torch.randperm(11 * 9, generator=torch.Generator().manual_seed(0))
    x = (order.double() / 100).view(1, 1, 11, 9).requires_grad_()
    y = Median(size=3)(x)
    weight = images(3, 1, 1, 11, 9).double()
    (g,) = torch.autograd.grad((y * weight).sum(), x)
    same = x.detach().flatten()[:, None] == y.detach().flatten()[None]
    torch.testing.assert_close(g.flatten(), same.double() @ weight.flatten())


def test_of_equal_values_one_gets_the_gradient() -> None:
    x = torch.full((1, 1, 5, 5), 0.5, requires_grad=True)
    (g,) = torch.autograd.grad(Median(size=3)(x)[0, 0, 2, 2], x)
    assert g.sum() == 1
    assert g[0, 0, 1, 1] == 1


def test_surrogate_is_scipys_mean_filter() -> None:
    x = images(0, 2, 3, 9, 12).double()
    for size in (2, 3, 4):
        expected = ndimage.uniform_filter(x.numpy(), size=(1, 1, size, size), mode="reflect")
        got = Median(size=size).surrogate(x, {})
        np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [0, -3, 2.0, True])
def test_bad_sizes(size: int) -> None:
    with pytest.raises(RangeError, match="a whole number ≥ 1"):
        Median(size=size)
