"""Resizing inside the model. Oracles: Pillow, and the adjoint of a linear map."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from feint.core.errors import ConfigError, RangeError
from feint.core.gradients import is_stochastic, takes_keys
from feint.models import Resized


class Keyed(nn.Module):
    stochastic = True

    def forward(self, x, keys=None):
        return x.mean((2, 3)) + (0 if keys is None else keys[:, None])


@pytest.mark.parametrize(
    ("mode", "theirs"),
    [("bilinear", Image.Resampling.BILINEAR), ("nearest", Image.Resampling.NEAREST)],
)
@pytest.mark.parametrize("size", [(8, 11), (23, 16)])
def test_resize_is_pillows_in_floats(mode, theirs, size):
    # Odd sides, so that no center falls between two pixels, where rounding would decide.
    plane = np.random.default_rng(0).random((17, 13), dtype=np.float32)
    expected = np.array(Image.fromarray(plane).resize(size[::-1], theirs))
    got = Resized(nn.Identity(), size, mode)(torch.from_numpy(plane)[None, None])
    np.testing.assert_allclose(got[0, 0].numpy(), expected, atol=1e-6)


def test_images_of_that_size_pass_unchanged():
    x = torch.rand(2, 3, 8, 8)
    assert Resized(nn.Identity(), 8)(x) is x


def test_the_attacker_differentiates_through_it():
    # Resizing R is linear, so ⟨R x, v⟩ = ⟨x, Rᵀ v⟩, and autograd must give Rᵀ v.
    model = Resized(nn.Identity(), 5).double()
    x = torch.rand(1, 3, 9, 12, dtype=torch.float64, requires_grad=True)
    v = torch.rand(1, 3, 5, 5, dtype=torch.float64)
    y = model(x)
    (gradient,) = torch.autograd.grad(y, x, v)
    torch.testing.assert_close((y * v).sum(), (x * gradient).sum())
    assert gradient.abs().sum() > 0


def test_keys_reach_a_model_that_takes_them_and_no_other():
    plain, keyed = Resized(nn.Flatten(), 4), Resized(Keyed(), 4)
    assert not takes_keys(plain)
    assert not is_stochastic(plain)
    assert takes_keys(keyed)
    assert is_stochastic(keyed)
    x = torch.zeros(2, 3, 6, 6)
    assert keyed(x, keys=torch.tensor([4, 5])).tolist() == [[4.0] * 3, [5.0] * 3]
    assert isinstance(keyed, Resized)
    assert torch.equal(copy.deepcopy(keyed)(x), keyed(x))


def test_bad_sizes_and_modes():
    for side in (0, (3,), (3, -1), (2.5, 2)):
        with pytest.raises(RangeError, match="side is"):
            Resized(nn.Identity(), side)
    with pytest.raises(ConfigError, match="bilinear"):
        Resized(nn.Identity(), 4, "area")
