"""SHIELD. Oracles: Pillow's codec square by square, counting, a plain vote."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from feint.core import random
from feint.core.errors import ConfigError, RangeError, ShapeError
from feint.core.quantise import to_uint8
from feint.defenses import JPEG, Shield
from feint.evaluation import Pipeline
from tests.contracts.defense import DefenseContract, images
from tests.tiny import LinearModel


class TestShield(DefenseContract):
    cls = Shield
    configs = (
        {},
        {"preset": "qiu"},
        {"region": 12, "qualities": (10, 90)},
        {"region": 300, "subsampling": "4:4:4"},
        {"qualities": (75,)},
    )
    batch_atol = 0.0


def pillow(image: Tensor, quality: int) -> np.ndarray:
    array = to_uint8(image).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer)).astype(np.float32).transpose(2, 0, 1) / np.float32(255)


@pytest.mark.parametrize("quality", [20, 80])
def test_one_quality_is_pillows_codec(quality: int) -> None:
    x = images(0, 2, 3, 21, 30)
    got = Shield(qualities=(quality,))(x)
    for i in range(2):
        np.testing.assert_array_equal(got[i].numpy(), pillow(x[i], quality))
    assert torch.equal(got, JPEG(quality=quality)(x))


@pytest.mark.parametrize("region", [8, 5, 16, 100])
def test_every_square_is_pillows_at_its_own_quality(region: int) -> None:
    qualities = (20, 40, 60, 80)
    x, keys = images(1, 3, 3, 21, 30), random.keys(4, 3)
    defense = Shield(region=region)
    choice, got = defense.sample(x, keys)["choice"], defense(x, keys)
    for i in range(3):
        coded = [pillow(x[i], q) for q in qualities]
        for r in range(0, 21, region):
            for c in range(0, 30, region):
                square = np.s_[:, r : r + region, c : c + region]
                expected = coded[int(choice[i, r // region, c // region])][square]
                np.testing.assert_array_equal(got[i].numpy()[square], expected)


def test_qualities_are_drawn_evenly() -> None:
    """Oracle: counting, within five standard deviations."""
    choice = Shield().draw(random.keys(0, 50), torch.Size((50, 3, 64, 64)))["choice"]
    counts = torch.bincount(choice.flatten(), minlength=4)
    expected = choice.numel() / 4
    assert bool(((counts - expected).abs() < 5 * (expected * 0.75) ** 0.5).all())


def test_surrogate_is_that_of_jpeg_square_by_square() -> None:
    x, keys = images(1, 2, 3, 16, 24).double(), random.keys(0, 2)
    defense = Shield(region=16)
    params = defense.sample(x, keys)
    soft = defense.surrogate(x, params)
    for i in range(2):
        for column, c in enumerate((0, 16)):
            quality = (20, 40, 60, 80)[int(params["choice"][i, 0, column])]
            alone = JPEG(quality=quality).surrogate(x[i : i + 1], {})
            torch.testing.assert_close(soft[i, :, :, c : c + 16], alone[0, :, :, c : c + 16])


def test_support_of_a_few_squares() -> None:
    defense = Shield(region=16, qualities=(20, 80))
    options = defense.support(torch.Size((1, 3, 16, 32)))
    assert options is not None
    assert sorted(o["choice"].flatten().tolist() for o in options) == [
        [0, 0],
        [0, 1],
        [1, 0],
        [1, 1],
    ]
    assert Shield().support(torch.Size((1, 3, 32, 32))) is None
    assert Shield().support(torch.Size((1, 3, 299, 299))) is None


def test_ensemble_is_a_majority_vote() -> None:
    """Oracle: a plain count over the same draws."""
    model, defense, votes = LinearModel(shape=(3, 16, 16)), Shield(qualities=(1, 20, 90)), 15
    x, keys = images(3, 8, 3, 16, 16), random.keys(5, 8)
    got = Pipeline(model, defense, votes=votes, combine="majority")(x, keys)
    draws = random.fold(keys, "vote", 0, torch.arange(votes))
    ballots = torch.stack(
        [model(defense(x, random.fold(draws[:, v], "defense"))).argmax(1) for v in range(votes)], 1
    )
    counts = torch.nn.functional.one_hot(ballots, 5).sum(1)
    assert bool((counts.max(1).values < votes).any()), "all votes agree: nothing is tested"
    torch.testing.assert_close(got.detach(), counts / votes, rtol=0, atol=0.5 / votes + 1e-6)


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        ({"qualities": ()}, ConfigError, "at least one"),
        ({"qualities": (20, 20)}, ConfigError, "different ones"),
        ({"qualities": 75}, ConfigError, "at least one"),
        ({"qualities": (20, 101)}, RangeError, "quality is 101"),
        ({"region": 0}, RangeError, "whole number ≥ 1"),
        ({"region": 2.5}, RangeError, "whole number ≥ 1"),
        ({"rounding": "up"}, ConfigError, "rounding"),
        ({"subsampling": "4:1:1"}, ConfigError, "subsampling"),
    ],
)
def test_bad_arguments(config: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Shield(**config)  # type: ignore[arg-type]


def test_two_channels_are_refused() -> None:
    with pytest.raises(ShapeError, match="1 \\(gray\\) or 3"):
        Shield()(images(0, 1, 2, 8, 8))
