"""HGD. Oracles: the paper's layer sizes, torch's own modules by hand, autograd, other backends."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feint.core.errors import ConfigError, RangeError, ShapeError
from feint.core.weights import initialise
from feint.defenses import HGD, S2SNet
from feint.defenses._dunet import DUNet
from tests.contracts.defense import DefenseContract, images

TINY = {"weights": "untrained", "width": 3, "levels": 2}


class TestHGD(DefenseContract):
    cls = HGD
    configs = (TINY, {"weights": "untrained", "width": 2, "levels": 3})
    channels = (3,)
    batch_atol = 1e-4
    rtol = 1e-4


def test_the_papers_network() -> None:
    """Liao et al., figure 3: C2, four C3 down; three C3 and a C2 up; 64 to 256 channels."""
    net = DUNet()
    down = [[3, 64, 64], [64, 128, 128, 128], [128, 256, 256, 256], *[[256] * 4] * 2]
    up = [[512, 256, 256, 256], [512, 256, 256, 256], [384, 128, 128, 128], [192, 64, 64]]
    pairs = [(a, b) for block in down + up for a, b in itertools.pairwise(block)]
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels) for m in convs] == [*pairs, (64, 3)]
    expected = sum(9 * a * b + 2 * b for a, b in pairs) + 64 * 3 + 3
    assert sum(p.numel() for p in net.parameters()) == expected == 11_033_987
    assert [m.stride[0] for m in convs] == [1, 1, *[2, 1, 1] * 4, *[1] * 12]


def test_equals_torchs_modules_by_hand() -> None:
    """Oracle: the layers written out one by one, at an odd size."""
    ours = DUNet(2, 3).double().eval()
    initialise(ours, 3)
    for name, value in ours.state_dict().items():  # batch statistics that matter
        if "running" in name:
            value.copy_(images(1, *value.shape) + 0.5)
    state = ours.state_dict()

    def convs(x: Tensor, name: str, count: int, stride: int = 1) -> Tensor:
        for i in range(0, 3 * count, 3):
            x = F.conv2d(x, state[f"{name}.{i}.weight"], stride=1 if i else stride, padding=1)
            mean, var, weight, bias = (
                state[f"{name}.{i + 1}.{key}"].view(1, -1, 1, 1)
                for key in ("running_mean", "running_var", "weight", "bias")
            )
            x = ((x - mean) / (var + 1e-5).sqrt() * weight + bias).clamp_min(0)
        return x

    x = images(0, 2, 3, 9, 11).double()
    full = convs(x, "first", 2)
    half = convs(full, "down.0", 3, 2)
    quarter = convs(half, "down.1", 3, 2)
    assert half.shape[-2:] == (5, 6)
    assert quarter.shape[-2:] == (3, 3)
    larger = nn.Upsample((5, 6), mode="bilinear")(quarter)
    joined = convs(torch.cat([larger, half], 1), "up.0", 3)
    largest = nn.Upsample((9, 11), mode="bilinear")(joined)
    joined = convs(torch.cat([largest, full], 1), "up.1", 2)
    expected = F.conv2d(joined, state["last.weight"], state["last.bias"])
    torch.testing.assert_close(ours(x), expected)


def test_the_output_is_the_image_without_the_noise() -> None:
    defense = HGD(**TINY)
    x = images(0, 2, 3, 8, 8)
    torch.testing.assert_close(defense(x) + defense.noise(x), x)
    with torch.no_grad():
        defense.network.last.weight.zero_()
        defense.network.last.bias.zero_()
    assert torch.equal(defense(x), x), "no noise seen, image untouched"


@pytest.mark.parametrize("side", [1, 32, 224, 299])
def test_sizes_of_the_papers(side: int) -> None:
    net = HGD(weights="untrained", width=1, levels=5)
    assert net(images(0, 1, 3, side, side)).shape == (1, 3, side, side)


def test_bad_settings_and_images() -> None:
    with pytest.raises(RangeError, match="width, levels are 3, 1; expected at least 1 and 2"):
        HGD(weights="untrained", width=3, levels=1)
    with pytest.raises(RangeError, match="are 0, 5"):
        HGD(weights="untrained", width=0)
    with pytest.raises(ShapeError, match="expected 3 channels"):
        HGD(**TINY)(images(0, 1, 1, 8, 8))
    with pytest.raises(ConfigError, match="family 'segnet'; expected the family 'dunet'"):
        HGD(weights="cifar10-segnet")
    assert S2SNet.family == "segnet"
