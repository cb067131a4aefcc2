"""S2SNet. Oracles: torchvision's VGG-16 for the encoder, torch's own modules as a graph."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

import feint.attacks
from feint.core.errors import ConfigError, RangeError, ShapeError
from feint.core.weights import initialise
from feint.defenses import S2SNet
from feint.defenses._segnet import SegNet
from feint.evaluation import Pipeline, evaluate
from feint.models.bundle import bundled_path
from tests.contracts.defense import DefenseContract, images
from tests.tiny import LinearModel, predicted

TINY = {"weights": "untrained", "width": 3, "stages": 2}


class TestS2SNet(DefenseContract):
    cls = S2SNet
    configs = (TINY,)
    channels = (3,)
    min_side = 4
    batch_atol = 1e-4
    rtol = 1e-4


def test_the_papers_encoder_is_vgg16_with_batch_normalisation() -> None:
    net = SegNet()
    features = torchvision.models.vgg16_bn().features
    ours = [p.shape for p in net.encode.parameters()]
    assert ours == [p.shape for p in features.parameters()]
    # The decoder: 13 convolutions mirrored, batch normalisations, and 64 → 3 (original code).
    mirrored = [512] * 5 + [256] + [256, 256, 128, 128, 64, 64, 64]
    inputs = [512] * 6 + [256, 256, 256, 128, 128, 64, 64]
    expected = sum(9 * a * b + 3 * b for a, b in zip(inputs, mirrored, strict=True)) + 64 * 3 + 3
    assert sum(p.numel() for p in net.decode.parameters()) == expected
    assert sum(p.numel() for p in net.parameters()) == 29_480_259


def test_equals_vggs_encoder_and_torchs_unpooling() -> None:
    """Oracle: torchvision's encoder with our weights; the decoder from torch.nn, one by one."""
    ours = SegNet(64, 2).double().eval()
    initialise(ours, 3)
    for name, value in ours.state_dict().items():  # batch statistics that matter
        if "running" in name:
            value.copy_(images(1, *value.shape) + 0.5)
    x = images(0, 2, 3, 9, 10).double()
    vgg = torchvision.models.vgg16_bn().features[:14].double().eval()
    vgg.load_state_dict(dict(zip(vgg.state_dict(), ours.encode.state_dict().values(), strict=True)))
    maps, places, sizes = x, [], []
    for layer in vgg:
        if isinstance(layer, nn.MaxPool2d):
            sizes.append(maps.shape)
            maps, place = nn.MaxPool2d(2, return_indices=True)(maps)
            places.append(place)
        else:
            maps = layer(maps)
    got, _, _ = ours.encode(x)
    torch.testing.assert_close(got, maps)
    for stage, place, size in zip(ours.decode.stages, places[::-1], sizes[::-1], strict=True):
        maps = nn.MaxUnpool2d(2)(maps, place, output_size=size)
        for layer in stage:
            maps = layer(maps)
    torch.testing.assert_close(ours(x), ours.decode.last(maps))


@pytest.mark.parametrize("side", [32, 224, 299])
def test_sizes_of_the_papers(side: int) -> None:
    net = S2SNet(weights="untrained", width=1, stages=5)
    assert net(images(0, 1, 3, side, side)).shape == (1, 3, side, side)


def test_gradients_are_never_detached() -> None:
    """The original cuts the graph while its decoder trains; here in every mode it reaches x."""
    net = S2SNet(**TINY)
    for part in (net, net.network, net.network.decode, net.network.encode):
        part.train()
        x = images(0, 2, 3, 8, 8).requires_grad_()
        (g,) = torch.autograd.grad(net(x).square().sum(), x)
        assert bool(g.flatten(1).any(1).all())
    net.train()
    assert not net.network.training, "deployed it never moves its batch statistics"


def test_bad_settings_and_images() -> None:
    with pytest.raises(RangeError, match="stages is 6; expected 1 to 5"):
        S2SNet(weights="untrained", stages=6)
    with pytest.raises(RangeError, match="width is 0"):
        S2SNet(weights="untrained", width=0)
    with pytest.raises(ShapeError, match="at least 4 pixels, the stride of the network"):
        S2SNet(**TINY)(images(0, 1, 3, 3, 8))
    with pytest.raises(ShapeError, match="expected 3 channels"):
        S2SNet(**TINY)(images(0, 1, 1, 8, 8))


def test_weights_of_a_classifier() -> None:
    with pytest.raises(ConfigError, match="those of no defense; expected the family 'segnet'"):
        S2SNet(weights=str(bundled_path("cifar10-resnet20")))


@pytest.mark.parametrize("rule", ["exact", "identity"])
def test_removal_attacks_the_whole_and_judges_the_bare_classifier(rule: str) -> None:
    """S3's gray box. Oracle: BIM on the view by hand, judged by the classifier alone."""
    x, model, defense = images(0, 12, 3, 8, 8), LinearModel(4, (3, 8, 8)).eval(), S2SNet(**TINY)
    y = predicted(model, x)
    for scenario, judged in (("removal", model), ("white-box", Pipeline(model, defense))):
        found = evaluate(
            model,
            x,
            y,
            defense=defense,
            attacks=["bim(steps=3, stop='never')"],
            scenarios=[scenario],
            backward=rule,
            eps=0.1,
        )
        (cell,) = (
            r for r in found.results if r.cell.scenario == scenario and r.cell.defense != "none"
        )
        view = Pipeline(model, defense).view(rule)
        x_adv = feint.attacks.bim(view, x, y, eps=0.1, steps=3, stop="never")
        hits = int((judged(x_adv).argmax(1) == y).sum())
        assert cell.accuracy.value == pytest.approx(hits / 12)
