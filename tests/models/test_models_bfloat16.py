"""Classifiers that compute in bfloat16. Oracle: torch's own casts, and the spacing of bfloat16."""

import pytest
import torch
from torch import nn

from feint.core.errors import UnknownNameError
from feint.core.gradients import is_stochastic, takes_keys
from feint.models import Bfloat16, Resized, load, resolve


class Keyed(nn.Module):
    stochastic = True

    def forward(self, x, keys=None):
        return x.mean((2, 3)) + (0 if keys is None else keys[:, None])


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 3))


def test_a_product_is_that_of_rounded_factors(linear):
    x = torch.rand(5, 3, 4, 4)
    weight, bias = (p.detach().to(torch.bfloat16) for p in linear[1].parameters())
    expected = nn.functional.linear(x.flatten(1).to(torch.bfloat16), weight, bias)
    got = Bfloat16(linear)(x)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected.float())
    assert not torch.equal(got, linear(x))


def test_gradients_come_back_in_the_images_type(linear):
    x = torch.rand(2, 3, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(Bfloat16(linear)(x)[:, 0].sum(), x)
    expected = linear[1].weight[0].detach().to(torch.bfloat16).float().view(3, 4, 4)
    assert torch.equal(gradient, expected.expand(2, 3, 4, 4))


def test_keys_reach_a_model_that_takes_them_and_no_other(linear):
    keyed = Bfloat16(Keyed())
    assert takes_keys(keyed)
    assert is_stochastic(keyed)
    assert keyed(torch.zeros(2, 3, 4, 4), keys=torch.tensor([4, 5])).tolist() == [
        [4.0] * 3,
        [5.0] * 3,
    ]
    assert not takes_keys(Bfloat16(linear))
    assert not is_stochastic(Bfloat16(linear))


def test_resizing_stays_outside_and_in_float32():
    seen = []

    class Net(nn.Module):
        input_size = 4

        def forward(self, x):
            seen.append((x.dtype, x.shape[-1]))
            return x.mean((2, 3))

    model = Bfloat16.within(Resized(Net(), 4, "nearest"))
    assert isinstance(model, Resized)
    assert (model.size, model.mode) == ((4, 4), "nearest")
    model(torch.rand(1, 3, 9, 9))
    assert seen == [(torch.float32, 4)]
    assert Bfloat16(Net()).input_size == (4, 4)


def test_by_spec_it_is_the_same_weights_and_another_model():
    plain, rounded = resolve("bundled:cifar10-resnet20"), resolve("bf16:bundled:cifar10-resnet20")
    assert rounded.fingerprint != plain.fingerprint
    assert rounded.card == plain.card
    assert "computes in bfloat16" in rounded.notes
    for a, b in zip(plain.model.parameters(), rounded.model.parameters(), strict=True):
        assert torch.equal(a, b)
    x = torch.rand(4, 3, 32, 32)
    gap = (plain.model(x) - rounded.model(x)).abs().max() / plain.model(x).abs().max()
    assert 0 < gap < 0.1  # 20 layers, each rounding to 2⁻⁹


def test_a_defense_in_front_stays_in_float32():
    model = load("ace(lam=10) | bf16:bundled:cifar10-resnet20")
    x = torch.rand(2, 3, 32, 32)
    assert model.net.front(x).dtype == torch.float32
    assert model(x).dtype == torch.float32


def test_a_kind_that_is_none_is_named():
    with pytest.raises(UnknownNameError, match="bf16"):
        load("bf17:bundled:cifar10-resnet20")
