"""Block DCT. Oracles: scipy.fft block by block, orthonormality, closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import fft

from feint.core import random
from feint.core.dct import block_dct, block_idct, dct_matrix, round_stable, soft_round
from feint.core.errors import ShapeError


def _images(*shape: int) -> torch.Tensor:
    return random.uniform(random.keys(5, shape[0]), shape[1:], dtype=torch.float64)


def _scipy(x: np.ndarray, function, size: int) -> np.ndarray:
    out = np.empty_like(x)
    for i in range(0, x.shape[-2], size):
        for j in range(0, x.shape[-1], size):
            block = (..., slice(i, i + size), slice(j, j + size))
            out[block] = function(x[block], axes=(-2, -1), norm="ortho")
    return out


@pytest.mark.parametrize("size", [2, 4, 8])
def test_every_coefficient_is_scipys(size: int) -> None:
    x = _images(2, 3, 3 * size, 5 * size)
    assert np.allclose(block_dct(x, size), _scipy(x.numpy(), fft.dctn, size), atol=1e-13)
    assert np.allclose(block_idct(x, size), _scipy(x.numpy(), fft.idctn, size), atol=1e-13)


def test_the_matrix_is_scipys_dct_of_the_identity() -> None:
    assert np.allclose(dct_matrix(8), fft.dct(np.eye(8), axis=0, norm="ortho"), atol=1e-15)


def test_inverse_and_energy() -> None:
    # Property: an orthonormal transform is undone by its transpose and keeps the sum of squares.
    x = _images(3, 1, 16, 24)
    y = block_dct(x)
    assert torch.allclose(block_idct(y), x, atol=1e-14)
    assert torch.allclose((y**2).sum(), (x**2).sum())


def test_a_constant_has_only_dc() -> None:
    # Closed form: the DC term of a constant c is 8c, everything else vanishes.
    y = block_dct(torch.full((1, 1, 8, 16), 0.25, dtype=torch.float64))
    want = torch.zeros_like(y)
    want[..., 0, ::8] = 2.0
    assert torch.allclose(y, want, atol=1e-15)


def test_sides_must_fit() -> None:
    with pytest.raises(ShapeError, match="multiples of 8"):
        block_dct(torch.zeros(1, 1, 8, 9))


@given(st.integers(-300, 300), st.floats(-1e-9, 1e-9))
def test_halves_go_to_even_whatever_the_noise(n: int, noise: float) -> None:
    # Closed form: n + ½ rounds to the even neighbour; python's round() is half-to-even too.
    x = torch.tensor(n + 0.5 + noise, dtype=torch.float64)
    assert round_stable(x).item() == round(n + 0.5)


@given(st.floats(-1e4, 1e4))
def test_stable_rounding_is_rounding_away_from_halves(value: float) -> None:
    if abs(abs(value - round(value)) - 0.5) < 1e-5:
        value += 0.1
    assert round_stable(torch.tensor(value, dtype=torch.float64)).item() == round(value)


def test_soft_rounding_meets_rounding_at_integers_and_has_the_cubic_slope() -> None:
    # Closed form: value n + r³ and slope 3r² at n + r.
    x = torch.tensor([3.0, 3.25, -1.4, 7.45], dtype=torch.float64, requires_grad=True)
    y = soft_round(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    r = torch.tensor([0.0, 0.25, -0.4, 0.45], dtype=torch.float64)
    assert torch.allclose(y, torch.tensor([3.0, 3.0, -1.0, 7.0], dtype=torch.float64) + r**3)
    assert torch.allclose(slope, 3 * r**2)
    y = soft_round(x, floor=0.05)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(slope, 3 * r**2 + 0.05)
    assert torch.autograd.gradcheck(lambda z: soft_round(z, 0.05), x)
