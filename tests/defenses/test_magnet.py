"""MagNet. Oracles: the paper's layers written with torch.nn, scipy's Jensen–Shannon distance,
counting of refused images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from torch import nn

from feint.core import random
from feint.core.errors import ConfigError, RangeError, ShapeError
from feint.core.weights import initialise
from feint.defenses import MagNet
from feint.defenses._autoencoder import Autoencoder
from feint.defenses.magnet import MagNetDetector
from tests.contracts.defense import DefenseContract, images
from tests.tiny import LinearModel

TINY = {"weights": "untrained", "layers": [4]}
POOLED = {"weights": "untrained", "layers": [3, "average", 3], "channels": 3}
SEVERAL = {"weights": ["untrained", "untrained", "untrained"], "layers": [2, "max"]}


class TestMagNet(DefenseContract):
    cls = MagNet
    configs = (TINY, POOLED, SEVERAL)
    channels = (3,)
    rtol = 1e-4


def test_the_papers_networks() -> None:
    """Meng & Chen, tables 1 and 2, as torch.nn has them."""
    mnist = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.Sigmoid(),
        nn.AvgPool2d(2),
        nn.Conv2d(3, 3, 3, padding=1),
        nn.Sigmoid(),
        nn.Conv2d(3, 3, 3, padding=1),
        nn.Sigmoid(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(3, 3, 3, padding=1),
        nn.Sigmoid(),
        nn.Conv2d(3, 1, 3, padding=1),
        nn.Sigmoid(),
    )
    cifar = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.Sigmoid(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.Sigmoid(),
        nn.Conv2d(32, 3, 3, padding=1),
        nn.Sigmoid(),
    )
    for settings, theirs, shape in (
        (((3, "average", 3), 1), mnist, (2, 1, 28, 28)),
        (((32,), 3), cifar, (2, 3, 32, 32)),
    ):
        ours = Autoencoder(*settings)
        initialise(ours, 4)
        theirs.load_state_dict(
            dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True))
        )
        x = images(0, *shape)
        torch.testing.assert_close(ours(x), theirs(x))
    assert sum(p.numel() for p in Autoencoder().parameters()) == 11_011


def test_the_paper_s_other_pooling_and_one_channel() -> None:
    magnet = MagNet(weights="untrained", layers=[2, "max", 2], channels=1)
    assert magnet(images(0, 2, 1, 7, 1)).shape == (2, 1, 7, 1)
    with pytest.raises(ShapeError, match="expected 1 channels"):
        magnet(images(0, 2, 3, 8, 8))


def test_every_image_goes_through_the_autoencoder_that_it_drew() -> None:
    magnet = MagNet(**SEVERAL)
    assert magnet.stochastic
    assert not MagNet(**TINY).stochastic
    x, keys = images(0, 40, 3, 6, 6), random.keys(0, 40)
    which = magnet.sample(x, keys)["which"]
    assert set(which.tolist()) == {0, 1, 2}
    pool = [magnet.network, *magnet.others]
    expected = torch.stack([pool[w](x[i : i + 1])[0] for i, w in enumerate(which)])
    torch.testing.assert_close(magnet(x, keys), expected)
    options = magnet.support(x.shape)
    assert options is not None
    torch.testing.assert_close(magnet.replay(x, options[2]), pool[2](x))


class Parts:
    """A detector with its parts."""

    def __init__(self, count: int = 60, **kwargs: Any) -> None:
        self.magnet = MagNet(**TINY)
        self.model = LinearModel(4, (3, 6, 6)).eval()
        self.x = images(0, count, 3, 6, 6)
        self.detector = self.magnet.detector(self.model, self.x, **kwargs)


def test_scores_are_errors_and_divergences() -> None:
    """Oracle: numpy, and scipy's distance, which is the divergence's root."""
    parts = Parts(false_positive_rate=0.2, errors=(1, 2), temperatures=(10, 40))
    scores = parts.detector.scores(parts.x).detach().numpy()
    assert parts.detector.names == ("error p=1", "error p=2", "divergence T=10", "divergence T=40")
    made = parts.magnet(parts.x)
    off = (made - parts.x).double().abs().numpy()
    for i, p in enumerate((1, 2)):
        assert scores[:, i] == pytest.approx((off**p).mean((1, 2, 3)), rel=1e-6)
    for i, t in enumerate((10, 40), 2):
        a, b = (
            torch.softmax(parts.model(z).double() / t, 1).detach().numpy() for z in (parts.x, made)
        )
        assert scores[:, i] == pytest.approx(jensenshannon(a, b, axis=1) ** 2, rel=1e-6)


def test_an_image_is_refused_if_one_test_is_above_its_threshold() -> None:
    detector = Parts(false_positive_rate=0.2).detector
    x = images(7, 50, 3, 6, 6)
    scores = detector.scores(x)
    detector.thresholds.copy_(scores.median(0).values)
    expected = [any(s > t for s, t in zip(row, detector.thresholds, strict=True)) for row in scores]
    assert detector(x).tolist() == expected
    detector.thresholds.fill_(torch.inf)
    assert not bool(detector(x).any())


@given(rate=st.floats(0.05, 0.6), count=st.integers(60, 90), batch=st.integers(20, 100))
def test_at_most_the_stated_share_of_the_validation_images_is_refused(
    rate: float, count: int, batch: int
) -> None:
    """Oracle: counting; each of three tests refuses ⌊n·rate/3⌋, as no scores are equal."""
    detector = Parts(count, false_positive_rate=rate, batch_size=batch).detector
    x = images(0, count, 3, 6, 6)
    assert int(detector(x).sum()) <= rate * count
    each = (detector.scores(x) > detector.thresholds).sum(0)
    assert each.tolist() == [int(count * rate / 3 + 1e-9)] * 3


def test_an_attacker_who_knows_the_detector_can_differentiate_it() -> None:
    """Oracle: central differences in float64."""
    detector = Parts(false_positive_rate=0.2).detector.double()
    x = images(3, 2, 3, 6, 6).double().requires_grad_()
    (g,) = torch.autograd.grad(detector.scores(x)[:, 1:].sum(), x)
    direction = images(4, 2, 3, 6, 6).double() - 0.5
    with torch.no_grad():
        up, down = (detector.scores(x + s * direction)[:, 1:].sum() for s in (1e-6, -1e-6))
    assert float((g * direction).sum()) == pytest.approx(float(up - down) / 2e-6, rel=1e-4)
    # Descending one of them makes an image less conspicuous.
    with torch.no_grad():
        moved = (x - 0.01 * g.sign()).clamp(0, 1)
        before, after = (detector.scores(z)[:, 1:].sum(1) for z in (x, moved))
        assert bool((after < before).all())


def test_the_detector_is_a_module() -> None:
    parts = Parts(false_positive_rate=0.2)
    other = MagNetDetector(parts.magnet, parts.model)
    other.load_state_dict(parts.detector.state_dict())
    assert np.array_equal(other(parts.x).numpy(), parts.detector(parts.x).numpy())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"layers": []}, ConfigError, "at least one number"),
        ({"layers": ["max"]}, ConfigError, "at least one number"),
        ({"layers": [3, "mean"]}, ConfigError, "'max' and 'average'"),
        ({"layers": [0]}, ConfigError, r"layers is .*0"),
        ({"channels": 0}, ConfigError, "channels is 0"),
        ({"weights": []}, ConfigError, "weights is an empty list"),
        ({"weights": "cifar10-segnet"}, ConfigError, "expected the family 'magnet'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MagNet(**{"weights": "untrained", **settings})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"false_positive_rate": 0.0}, RangeError, "expected a share between 0 and 1"),
        ({"false_positive_rate": 1.0}, RangeError, "expected a share between 0 and 1"),
        ({"false_positive_rate": 0.01}, RangeError, "x has 60 images; expected at least 300"),
        ({"temperatures": (0.0,)}, RangeError, "temperatures is"),
        ({"errors": (-1,)}, RangeError, "errors is"),
        ({"errors": (), "temperatures": ()}, ConfigError, "at least one test"),
    ],
)
def test_bad_detectors(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Parts(**settings)
