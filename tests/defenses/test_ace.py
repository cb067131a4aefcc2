"""ACE, the linear module. Oracles: scipy convolutions written by hand, linearity, autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d

from feint.core.errors import RangeError, ShapeError
from feint.defenses import ACE
from tests.contracts.defense import DefenseContract, images


class TestACE(DefenseContract):
    cls = ACE
    configs = ({"lam": 100.0}, {"lam": 1}, {"lam": math.inf}, {"lam": 0.0})
    channels = (3,)
    min_side = 2
    batch_atol = 1e-4


def by_hand(ace: ACE, image: np.ndarray) -> np.ndarray:
    """The module on one image (C, H, W): subsample, mix channels, spread by 2, convolve, crop."""
    w1 = ace.encode.weight.detach().double().numpy()[:, :, 0, 0]
    b1 = ace.encode.bias.detach().double().numpy()
    w2 = ace.decode.weight.detach().double().numpy()
    b2 = ace.decode.bias.detach().double().numpy()
    c, h, w = image.shape
    code = np.einsum("oc,chw->ohw", w1, image[:, ::2, ::2]) + b1[:, None, None]
    spread = np.zeros((c, 2 * code.shape[1] - 1, 2 * code.shape[2] - 1))
    spread[:, ::2, ::2] = code
    board = np.stack(
        [
            sum(convolve2d(spread[i], w2[i, o], mode="full") for i in range(c)) + b2[o]
            for o in range(c)
        ]
    )[:, :h, :w]
    return board if math.isinf(ace.lam) else image + ace.lam * board


@pytest.mark.parametrize("lam", [0.0, 1.0, 10.0, math.inf])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 8), (5, 3), (2, 2)])
def test_equals_the_convolutions_written_by_hand(lam: float, height: int, width: int) -> None:
    ace = ACE(lam=lam).double()
    x = images(0, 2, 3, height, width).double()
    expected = np.stack([by_hand(ace, image) for image in x.numpy()])
    np.testing.assert_allclose(ace(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_is_affine() -> None:
    """Oracle: f(ax + (1−a)y) = a f(x) + (1−a) f(y)."""
    ace = ACE(lam=10.0).double()
    x, y = images(0, 1, 3, 9, 8).double(), images(1, 1, 3, 9, 8).double()
    torch.testing.assert_close(ace(0.3 * x + 0.7 * y), 0.3 * ace(x) + 0.7 * ace(y))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 6)])
def test_without_the_skip_only_the_connected_pixels_have_a_gradient(
    height: int, width: int
) -> None:
    ace = ACE(lam=math.inf)
    x = images(0, 2, 3, height, width).requires_grad_()
    (g,) = torch.autograd.grad(ace(x).square().sum(), x)
    fed = (g != 0).any(1, keepdim=True)
    connected = ace.connected(height, width)
    assert torch.equal(fed, connected.expand_as(fed))
    # The even-even pixels: a quarter of the image, none of which an odd shift keeps in place.
    assert int(connected.sum()) == math.ceil(height / 2) * math.ceil(width / 2)
    assert not bool((connected & connected.roll(1, -1)).any())


def test_gradient_energy_on_the_connected_pixels_grows_with_lambda() -> None:
    shares = []
    for lam in (0.0, 1.0, 10.0, 100.0):
        ace = ACE(lam=lam)
        with torch.no_grad():  # the same weights for all
            for i, p in enumerate(ace.parameters()):
                p.copy_(images(i, *p.shape))
        x = images(7, 1, 3, 8, 8).requires_grad_()
        (g,) = torch.autograd.grad(ace(x).square().sum(), x)
        shares.append(float((g.square() * ace.connected(8, 8)).sum() / g.square().sum()))
    assert shares == sorted(shares)
    assert shares[-1] > 0.999


def test_zero_lambda_is_the_identity() -> None:
    x = images(0, 2, 3, 8, 8)
    assert torch.equal(ACE(lam=0.0)(x), x)


@pytest.mark.parametrize("lam", [-1.0, float("nan")])
def test_bad_lambda(lam: float) -> None:
    with pytest.raises(RangeError, match="expected λ ≥ 0"):
        ACE(lam=lam)


def test_other_channels() -> None:
    with pytest.raises(ShapeError, match="expected 3 channels"):
        ACE()(images(0, 1, 4, 8, 8))


def test_one_channel() -> None:
    ace, x = ACE(channels=1).double(), images(0, 2, 1, 6, 6).double()
    expected = np.stack([by_hand(ace, image) for image in x.numpy()])
    np.testing.assert_allclose(ace(x).detach().numpy(), expected, rtol=1e-12)
