"""ACE in both forms. Oracles: scipy convolutions written by hand, linearity, autograd; for the UNet
parameter counts by hand and the graph written out in torch.nn.functional.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.signal import convolve2d

from feint.core.errors import ConfigError, DataError, RangeError, ShapeError, UnknownNameError
from feint.core.weights import initialise
from feint.defenses import ACE, parse
from feint.defenses._learned import IMAGENET_MEAN, IMAGENET_STD
from feint.defenses._unet import CHECKERBOARD, UNet, tile_mask
from feint.models.bundle import save_weights
from tests.contracts.defense import DefenseContract, images


class TestACE(DefenseContract):
    cls = ACE
    configs = ({"lam": 100.0}, {"lam": 1}, {"lam": math.inf}, {"lam": 0.0})
    channels = (3,)
    min_side = 2
    batch_atol = 1e-4


TINY = {"form": "unet", "weights": "untrained", "width": 3, "depth": 2}


class TestACEAsUNet(DefenseContract):
    cls = ACE
    configs = (TINY | {"lam": 0.5}, TINY | {"lam": 1.0}, TINY | {"lam": 0.0}, TINY)
    channels = (3,)
    min_side = 4
    batch_atol = 1e-4
    rtol = 1e-4


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


def test_the_papers_unet_has_its_parameters() -> None:
    """Oracle: 9ab + b per 3×3 convolution, summed by hand over the original's layers."""
    sizes = [64, 128, 256, 512, 1024]
    down = [(3, 64), *itertools.pairwise(sizes)]
    expected = 3 * 3 + 3  # the first layer, 1×1
    expected += sum(9 * a * b + b + 9 * b * b + b for a, b in down)
    for a in sizes[:-1]:  # upsampling from 2a, joined with a, two convolutions
        expected += 4 * 2 * a * a + a + 9 * 2 * a * a + a + 9 * a * a + a
    expected += 9 * 64 * 3 + 3
    assert sum(p.numel() for p in UNet().parameters()) == expected == 31_033_423


def functional(net: UNet, x: torch.Tensor) -> torch.Tensor:
    """The graph of a UNet of depth 3 in torch.nn.functional, from its tensors by name."""
    w = {k: v.double() for k, v in net.state_dict().items()}

    def conv(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.relu(F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=1))

    def double(x: torch.Tensor, name: str) -> torch.Tensor:
        return conv(conv(x, f"{name}.conv1"), f"{name}.conv2")

    x = F.conv2d(x, w["first.weight"], w["first.bias"], stride=2)
    a = double(x, "down.0")
    b = double(F.max_pool2d(a, 2, 2), "down.1")
    c = double(F.max_pool2d(b, 2, 2), "down.2")
    c = F.conv_transpose2d(c, w["up.0.raise_.weight"], w["up.0.raise_.bias"], stride=2)
    b = double(torch.cat([c, b], 1), "up.0.convs")
    b = F.conv_transpose2d(b, w["up.1.raise_.weight"], w["up.1.raise_.bias"], stride=2)
    a = double(torch.cat([b, a], 1), "up.1.convs")
    return F.conv_transpose2d(a, w["last.weight"], w["last.bias"], 2, 1, 1)


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.99, 1.0])
def test_the_unet_form_is_its_formula(lam: float) -> None:
    ace = ACE(form="unet", weights="untrained", width=4, depth=3, lam=lam).double()
    x = images(0, 2, 3, 16, 24).double()
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    z = (x - mean) / std
    expected = ((1 - lam) * z + lam * functional(ace.network, z)) * std + mean
    torch.testing.assert_close(ace(x), expected, rtol=1e-5, atol=1e-6)  # constants in float32
    if lam == 0:
        assert torch.equal(ace(x), x)
    # Other sizes: the border extended to the next multiple of 8, and cropped again.
    y = x[..., :11, :18]
    wide = F.pad(z[..., :11, :18], (0, 6, 0, 5), mode="replicate")
    made = functional(ace.network, wide)[..., :11, :18] * std + mean
    torch.testing.assert_close(ace(y), (1 - lam) * y + lam * made, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", [CHECKERBOARD, ((0, 1), (1, 0)), ((1, 0, 0), (0, 0, 0)), ((1,),)])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 7)])
def test_only_the_connected_pixels_have_a_gradient(
    mask: tuple[tuple[int, ...], ...], height: int, width: int
) -> None:
    net = UNet(16, 1, mask)
    initialise(net, 1)
    x = images(0, 2, 3, height, width).requires_grad_()
    (g,) = torch.autograd.grad(net(x).square().sum(), x)
    fed = (g != 0).any(0, keepdim=True).any(1, keepdim=True)
    assert torch.equal(fed, tile_mask(mask, height, width))


def test_the_unet_reads_what_connected_says() -> None:
    ace = ACE(form="unet", weights="untrained", width=16, depth=2, lam=1.0)
    x = images(0, 1, 3, 9, 8).requires_grad_()
    (g,) = torch.autograd.grad(ace(x).square().sum(), x)
    assert not bool(g[~ace.connected(9, 8).expand_as(g)].any())
    assert float(ace.connected(32, 32).float().mean()) == 0.25


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (TINY | {"lam": 1.01}, RangeError, "expected 0 ≤ λ ≤ 1"),
        (TINY | {"lam": -0.1}, RangeError, "expected 0 ≤ λ ≤ 1"),
        (TINY | {"lam": math.nan}, RangeError, "expected 0 ≤ λ ≤ 1"),
        (TINY | {"width": 0}, RangeError, "whole numbers from 1"),
        (TINY | {"channels": 1}, ConfigError, "expected 3 for form='unet'"),
        ({"form": "resnet"}, ConfigError, "expected 'linear' or 'unet'"),
        ({"weights": "untrained"}, ConfigError, "are for form='unet'"),
        ({"form": "unet", "weights": "cifar-10"}, UnknownNameError, "unknown defense weights"),
        ({"form": "unet", "weights": "no.safetensors"}, DataError, "there is no such file"),
    ],
)
def test_bad_settings_of_the_unet(
    settings: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ACE(**settings)


def test_bad_images_for_the_unet() -> None:
    ace = ACE(**TINY)
    with pytest.raises(ShapeError, match="sides of at least 4 pixels, the stride of the network"):
        ace(images(0, 1, 3, 3, 9))
    with pytest.raises(ShapeError, match="expected 3 channels"):
        ace(images(0, 1, 1, 8, 8))


@pytest.fixture
def stored(tmp_path: Path) -> tuple[ACE, str]:
    """A UNet with weights of its own, and its file."""
    ace = ACE(**TINY)
    initialise(ace.network, 9)
    path = tmp_path / "mine.safetensors"
    save_weights(path, ace.network.state_dict(), ace.metadata(), {})
    return ace, str(path)


def test_weights_bring_their_structure(stored: tuple[ACE, str]) -> None:
    ace, path = stored
    found = parse(f"ace(form='unet', lam=0.7, weights={path!r})")
    assert isinstance(found, ACE)
    assert found.structure == ace.structure == {"width": 3, "depth": 2, "mask": CHECKERBOARD}
    x = images(0, 1, 3, 8, 8)
    assert torch.equal(found.learn(x, {}), ace.learn(x, {}))
    assert ACE(form="unet", weights=path, width=3).spec.startswith("ace(form='unet', weights=")
    with pytest.raises(ConfigError, match=r"width is 4, but weights .* made with width=3"):
        ACE(form="unet", weights=path, width=4)
    with pytest.raises(ConfigError, match="of the family 'unet'; expected the family 'segnet'"):
        parse(f"s2snet(weights={path!r})")


@pytest.mark.parametrize(
    ("meta", "error", "message"),
    [
        (
            {"family": "unet", "structure": {"width": 4, "depth": 2}},
            ConfigError,
            "of another shape",
        ),
        ({"family": "unet", "structure": {"width": 3, "depth": 1}}, ConfigError, "unexpected"),
        ({"family": "unet", "structure": {"wide": 3}}, DataError, "cannot be read"),
        ({"family": "unet"}, DataError, "cannot be read"),
        ({"family": "unet", "structure": []}, DataError, "cannot be read"),
        ([], DataError, "cannot be read"),
    ],
)
def test_damaged_weights(
    stored: tuple[ACE, str], meta: object, error: type[Exception], message: str
) -> None:
    ace, path = stored
    save_weights(Path(path), ace.network.state_dict(), {"feint": json.dumps(meta)}, {})
    with pytest.raises(error, match=message):
        ACE(form="unet", weights=path)
    Path(path).write_bytes(b"rubbish")
    with pytest.raises(DataError, match="truncated or no safetensors file"):
        ACE(form="unet", weights=path)


def test_whole_and_broken_lambda_are_the_same_defense() -> None:
    assert ACE(lam=10).spec == ACE(lam=10.0).spec == "ace(lam=10.0)"
