"""Architectures. Oracles: published parameter counts, counts from the layers' formulas, numpy."""

import numpy as np
import pytest
import torch
from torch import nn

from feint.core.errors import RangeError, UnknownNameError
from feint.models import ARCHITECTURES, Normalized, build, initialise
from feint.models.architectures import CifarResNet, Toy


def count(model):
    return sum(p.numel() for p in model.parameters())


def conv(a, b, k, bias=True):
    return a * b * k * k + (b if bias else 0)


def thin(depth):
    """He et al. 2016, §4.2: a stem, 3 stages of n blocks, no parameters in the shortcuts."""
    n, total, inputs = (depth - 2) // 6, conv(3, 16, 3, False) + 32, 16
    for outputs in (16, 32, 64):
        for _ in range(n):
            total += conv(inputs, outputs, 3, False) + conv(outputs, outputs, 3, False)
            total += 4 * outputs
            inputs = outputs
    return total + 650


def vgg(top):
    """VGG's configuration A whose widest layer has `top` channels, and a head of three layers."""
    w = top // 8
    layers = [(3, w), (w, 2 * w), (2 * w, 4 * w), (4 * w, 4 * w), (4 * w, top), *[(top, top)] * 3]
    body = sum(conv(a, b, 3) + 2 * b for a, b in layers)
    return body + 2 * (top * top + top) + 10 * top + 10


EXPECTED = {
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet18": 11_173_962,  # in the stdout log of S0's own code
    "vgg11": vgg(512),
    "vgg11-thin": vgg(128),
    # Table 6 of S0: 1600 features.
    "toy": conv(3, 16, 3) + conv(16, 32, 3) + conv(32, 64, 3) + 1_601 * 512 + 5_130,
}


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_parameter_counts(name):
    assert count(ARCHITECTURES[name]()) == EXPECTED[name]
    wider = ARCHITECTURES[name](classes=100)
    assert wider.eval()(torch.rand(1, 3, 32, 32)).shape == (1, 100)


def test_thin_networks_follow_the_formula():
    assert [thin(d) for d in (20, 32)] == [EXPECTED["resnet20"], EXPECTED["resnet32"]]
    assert count(CifarResNet(56)) == thin(56)


def test_toy_has_1600_features_and_no_padding():
    seen = []
    toy = Toy()
    toy.fc1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    toy(torch.rand(2, 3, 32, 32))
    assert seen == [(2, 1600)]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@pytest.mark.parametrize("ace", [None, 10.0])
def test_built_models_are_batch_invariant_and_differentiable(name, ace):
    model = build(name, ace)
    initialise(model, 0)
    model.double().eval()
    x = torch.rand(3, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    logits = model(x)
    torch.testing.assert_close(logits[1:2], model(x[1:2]))
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert (gradient.flatten(1).abs().sum(1) > 0).all()
    assert count(model) == EXPECTED[name] + (0 if ace is None else 12 + 84)


def test_build_names_the_nearest_architecture():
    with pytest.raises(UnknownNameError, match="did you mean 'resnet20'"):
        build("resnet-20")


def test_normalisation_is_the_arithmetic():
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    model = Normalized(nn.Identity(), (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)).double()
    mean, std = np.array([0.1, 0.2, 0.3]), np.array([0.5, 0.25, 2.0])
    expected = (x.numpy() - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(model(x).numpy(), expected, atol=1e-6)  # its buffers are float32
    assert not model.state_dict()
    with pytest.raises(RangeError, match="positive"):
        Normalized(nn.Identity(), std=(1.0, 0.0, 1.0))


def test_initialise_depends_on_names_and_seed_alone():
    before = torch.random.get_rng_state()
    one, two = build("toy", 10.0), build("toy", 10.0)
    initialise(one, 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    initialise(two, 3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    initialise(two, 4)
    assert not torch.equal(one.net.network.fc1.weight, two.net.network.fc1.weight)
    # He-normal: the standard deviation of 1600·512 draws is within 1 % of sqrt(2 / fan_in).
    spread = float(one.net.network.fc1.weight.detach().std())
    assert spread == pytest.approx((2 / 1600) ** 0.5, rel=0.01)
    assert not one.net.network.fc1.bias.any()
