"""PixelDefend. Oracles: the whole network run anew for every value, scipy's logistic, counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import logistic
from torch import Tensor

from feint.core import random
from feint.core.errors import ConfigError, RangeError, ShapeError
from feint.core.weights import initialise
from feint.defenses import PixelDefend
from feint.defenses._pixelcnn import Mixture, PixelCNN, Raster
from feint.defenses.pixel_defend import purified
from tests.contracts.defense import DefenseContract, images

TINY = {"weights": "untrained", "width": 2, "layers": 1, "mixtures": 2, "eps": 4 / 255}


class TestPixelDefend(DefenseContract):
    cls = PixelDefend
    configs = (TINY, {**TINY, "eps": 0.1, "threshold": 9.0})
    channels = (3,)
    max_side = 9
    side = 6


def network(seed: int = 0, width: int = 3, layers: int = 2, mixtures: int = 2) -> PixelCNN:
    net = PixelCNN(width, layers, mixtures).double()
    initialise(net, seed)
    with torch.no_grad():  # biases that matter
        for name, value in net.named_parameters():
            if name.endswith("bias"):
                value.copy_(images(1, *value.shape) - 0.5)
    return net.requires_grad_(False)


def eight_bit(seed: int, *shape: int) -> Tensor:
    return (images(seed, *shape).double() * 255).round()


def test_no_feature_sees_what_it_predicts() -> None:
    """Property: a pixel's parameters change with earlier pixels only, and with the nearest ones."""
    net, x = network(), images(0, 1, 3, 7, 8).double()
    before = net(x)
    for row, column in ((0, 0), (3, 4), (6, 7), (3, 7)):
        for channel in range(3):
            y = x.clone()
            y[0, channel, row, column] += 0.3
            changed = (net(y) != before).any(1)[0].flatten()
            place = row * 8 + column
            assert not bool(changed[: place + 1].any())
            if column < 7:
                assert bool(changed[place + 1]), "the right neighbor"
            if row < 6:
                assert bool(changed[place + 8]), "the neighbor below"


def test_pixel_by_pixel_is_all_at_once() -> None:
    """Oracle: `forward`, bits aside."""
    net, x = network(layers=3), eight_bit(0, 2, 3, 5, 6)
    whole = net(x / 255)
    raster = Raster(net, x)
    for row in range(5):
        raster.start_row(row)
        for column in range(6):
            torch.testing.assert_close(raster.predict(row, column), whole[:, :, row, column])
            raster.give(row, column, x[:, :, row, column])


def reference(parameters: np.ndarray, value: np.ndarray) -> float:
    """Probability of one pixel's (r, g, b): PixelCNN++ §2.1 with scipy's logistic."""
    p = parameters.reshape(10, -1)
    weights = np.exp(p[0]) / np.exp(p[0]).sum()
    z = value * 2 / 255 - 1
    total = 0.0
    for k, weight in enumerate(weights):
        slope = np.tanh(p[7:10, k])
        means = (p[1, k], p[2, k] + slope[0] * z[0], p[3, k] + slope[1] * z[0] + slope[2] * z[1])
        mass = weight
        for channel in range(3):
            scale = np.exp(max(p[4 + channel, k], -7.0))
            upper = logistic.cdf(z[channel] + 1 / 255, means[channel], scale)
            lower = logistic.cdf(z[channel] - 1 / 255, means[channel], scale)
            upper = 1.0 if value[channel] == 255 else upper
            lower = 0.0 if value[channel] == 0 else lower
            mass *= upper - lower
        total += mass
    return float(total)


def test_probabilities_are_those_of_scipys_logistics() -> None:
    parameters = random.normal(random.keys(0, 40), (30,), torch.float64)
    values = (images(1, 40, 3).double() * 255).round()
    values[:10, 0], values[10:20, 1], values[20:30, 2] = 0, 255, 0
    mixture = Mixture(parameters)
    for channel in range(3):
        mixture.take(channel, values[:, channel])
    expected = [reference(p, v) for p, v in zip(parameters.numpy(), values.numpy(), strict=True)]
    assert mixture.weight.logsumexp(1).exp().numpy() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [-20.0, -7.0, 0.0, 5.0])
def test_probabilities_of_a_channel_sum_to_one(dtype: torch.dtype, scale: float) -> None:
    parameters = random.normal(random.keys(0, 5), (10, 4), torch.float64)
    parameters[:, 4:7] = scale
    mixture = Mixture(parameters.flatten(1).to(dtype))
    every = torch.arange(256, dtype=dtype)[:, None].expand(-1, 5)
    for channel in range(3):
        mass = (mixture.weight + mixture.log_mass(channel, every)).logsumexp(-1)
        assert bool(mass.isfinite().all())
        given = mixture.weight.logsumexp(-1)
        total = (mass - given).exp().sum(0)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-4, atol=0)
        mixture.take(channel, every[100 + channel])


def test_log_likelihood_is_the_sum_over_pixels() -> None:
    """Oracle: `reference`, pixel by pixel. Bits per value as training and the card have them."""
    net, x = network(), eight_bit(3, 2, 3, 3, 4) / 255
    parameters = net(x).permute(0, 2, 3, 1).numpy()
    pixels = (x * 255).round().permute(0, 2, 3, 1).numpy()
    expected = [
        sum(math.log(reference(parameters[i, r, c], pixels[i, r, c])) for r, c in np.ndindex(3, 4))
        for i in range(2)
    ]
    assert net.log_likelihood(x).numpy() == pytest.approx(expected, rel=1e-9)
    defense = PixelDefend(**TINY)
    even = defense.log_likelihood(x.float())
    assert even.dtype == torch.float32
    torch.testing.assert_close(even, defense.network.log_likelihood(x.float()))


@pytest.mark.parametrize("radius", [1, 5])
def test_equals_the_algorithm_run_plainly(radius: int) -> None:
    """Oracle: algorithm 1 of the paper, the whole network run again for every single value."""
    net, x = network(5), eight_bit(4, 2, 3, 4, 3)
    x[0, :, 1, 1], x[1, :, 2] = 0, 255
    got = purified(net, x, radius)
    new = x.clone()
    for i, row, column, channel in np.ndindex(2, 4, 3, 3):
        old = int(x[i, channel, row, column])
        values = range(max(0, old - radius), min(255, old + radius) + 1)
        parameters = net(new[i : i + 1] / 255)[0, :, row, column].numpy()
        chances = []
        for value in values:
            total = 0.0
            pixel = new[i, :, row, column].numpy().copy()
            pixel[channel] = value
            p = parameters.reshape(10, -1)
            for k in range(p.shape[1]):  # the component's mass up to this channel
                alone = parameters.reshape(10, -1)[:, k : k + 1].copy()
                weight = np.exp(p[0, k]) / np.exp(p[0]).sum()
                total += weight * _up_to(alone, pixel, channel)
            chances.append(total)
        new[i, channel, row, column] = values[int(np.argmax(chances))]
    assert torch.equal(got, new)
    assert not torch.equal(got, x)


def _up_to(alone: np.ndarray, pixel: np.ndarray, last: int) -> float:
    """Mass of the channels 0 … last of one component: the joint one over that of the rest."""
    mixture = Mixture(torch.from_numpy(alone.reshape(-1)))
    return math.exp(sum(_taken(mixture, channel, pixel[channel]) for channel in range(last + 1)))


def _taken(mixture: Mixture, channel: int, value: float) -> float:
    mass = float(mixture.log_mass(channel, torch.tensor(value, dtype=torch.float64)))
    mixture.take(channel, torch.tensor(value, dtype=torch.float64))
    return mass


def test_stays_within_eps_of_the_8_bit_image_and_gets_likelier() -> None:
    x = images(0, 6, 3, 8, 8)
    defense = PixelDefend(**TINY | {"eps": 6.9 / 255})
    y = defense(x)
    levels = y.double() * 255
    assert float((levels - levels.round()).abs().max()) < 1e-4
    steps = (levels - (x.double() * 255).round()).abs().max()
    assert float(steps) == pytest.approx(6.0, abs=1e-4)
    assert bool((defense.log_likelihood(y) > defense.log_likelihood(x)).all())


def test_no_room_leaves_the_8_bit_image() -> None:
    x = images(0, 2, 3, 5, 5)
    same = PixelDefend(**TINY | {"eps": 0.9 / 255})(x)
    torch.testing.assert_close(same, (x * 255).round() / 255)


def test_likely_images_stay_as_they_are() -> None:
    x = (images(0, 12, 3, 5, 5) * 255).round() / 255
    defense = PixelDefend(**TINY)
    need = -defense.log_likelihood(x) / math.log(2) / 75
    threshold = float(need.sort().values[5:7].mean())
    some = PixelDefend(**TINY, threshold=threshold)
    kept = (some(x) == x).flatten(1).all(1)
    assert torch.equal(kept, need < threshold)
    torch.testing.assert_close(some(x)[~kept], defense(x)[~kept])


def test_bad_settings_and_images() -> None:
    for eps in (-0.1, 1.1, 16.0, float("nan")):
        with pytest.raises(RangeError, match="expected 0 ≤ eps ≤ 1 in image units"):
            PixelDefend(**TINY | {"eps": eps})
    with pytest.raises(RangeError, match="threshold is 0"):
        PixelDefend(**TINY, threshold=0)
    with pytest.raises(RangeError, match="width, layers, mixtures are 2, 1, 0"):
        PixelDefend(**TINY | {"mixtures": 0})
    with pytest.raises(ShapeError, match="expected 3 channels"):
        PixelDefend(**TINY)(images(0, 1, 1, 8, 8))
    with pytest.raises(ConfigError, match="expected the family 'pixelcnn'"):
        PixelDefend(weights="cifar10-segnet")
