"""Crop–rescale. Oracles: torch's own crop and interpolate, the mean over all positions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from feint.core import random
from feint.core.errors import RangeError
from feint.defenses import CropEnsemble
from feint.evaluation import Pipeline
from tests.contracts.defense import DefenseContract, images
from tests.tiny import LinearModel


class TestCropEnsemble(DefenseContract):
    cls = CropEnsemble
    configs = ({}, {"preset": "qiu"}, {"crop": 7, "side": 8}, {"crop": 1, "side": 300})


@pytest.mark.parametrize(("height", "width"), [(32, 32), (13, 21), (64, 40), (2, 1), (1, 1)])
@pytest.mark.parametrize("preset", ["guo", "qiu"])
def test_equals_torchs_crop_and_interpolate(preset: str, height: int, width: int) -> None:
    defense, x = CropEnsemble(preset=preset), images(0, 5, 3, height, width).double()
    keys = random.keys(3, 5)
    params, got = defense.sample(x, keys), defense(x, keys)
    rows, columns = defense.size(height), defense.size(width)
    for i, image in enumerate(x):
        top, left = int(params["top"][i]), int(params["left"][i])
        crop = image[None, :, top : top + rows, left : left + columns]
        assert crop.shape[-2:] == (rows, columns)
        expected = nn.functional.interpolate(
            crop, (height, width), mode="bilinear", align_corners=False
        )
        torch.testing.assert_close(got[i : i + 1], expected, rtol=0, atol=1e-12)


def test_sizes_are_the_papers() -> None:
    assert CropEnsemble().size(224) == 90
    assert CropEnsemble(preset="qiu").size(299) == 90
    assert CropEnsemble().size(32) == 13
    assert CropEnsemble().size(1) == 1


def test_support_is_every_position() -> None:
    defense = CropEnsemble()
    options = defense.support(torch.Size((2, 3, 32, 32)))
    assert options is not None
    assert len(options) == (32 - 13 + 1) ** 2
    assert len({(int(o["top"][0]), int(o["left"][1])) for o in options}) == 400
    assert defense.support(torch.Size((2, 3, 64, 64))) is None
    assert Pipeline(LinearModel(), defense).draws(torch.Size((2, 3, 32, 32))) == 400


def test_ensemble_is_the_mean_over_crops() -> None:
    """Oracle: the mean softmax over the same crops, one after the other."""
    model = LinearModel(shape=(3, 12, 12))
    x, keys, defense = images(2, 3, 3, 12, 12), random.keys(1, 3), CropEnsemble()
    got = Pipeline(model, defense, votes=30)(x, keys)
    draws = random.fold(keys, "vote", 0, torch.arange(30))
    each = [model(defense(x, random.fold(draws[:, v], "defense"))).softmax(1) for v in range(30)]
    torch.testing.assert_close(got, torch.stack(each).mean(0).log(), rtol=1e-4, atol=1e-5)


def test_the_whole_image_is_the_identity() -> None:
    x = images(0, 2, 3, 9, 9)
    defense = CropEnsemble(crop=224)
    assert not defense.stochastic
    assert torch.equal(defense(x), x)


@pytest.mark.parametrize("config", [{"crop": 0}, {"crop": 225}, {"crop": 9.5}, {"side": 50}])
def test_bad_arguments(config: dict[str, int]) -> None:
    with pytest.raises(RangeError, match="1 ≤ crop ≤ side"):
        CropEnsemble(**config)
