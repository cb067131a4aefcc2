"""JPEG. Oracle: Pillow itself, bit by bit forward; its tables and its pixels for the surrogate."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from feint.core import random
from feint.core.errors import ConfigError, RangeError, ShapeError
from feint.defenses import JPEG
from feint.defenses.jpeg import pillow_jpeg, quantisation_tables, tensor_jpeg
from tests.contracts.defense import DefenseContract, images, pairwise


class TestJPEG(DefenseContract):
    cls = JPEG
    configs = (
        {},
        {"quality": 20, "subsampling": "4:4:4"},
        {"quality": 95, "subsampling": "4:2:2"},
        {"preset": "qiu"},
    )
    max_side = 35
    batch_atol = 0.0


def smooth(seed: int, *shape: int) -> Tensor:
    """Images with the spectrum of photographs rather than of noise."""
    coarse = images(seed, *shape[:2], -(-shape[2] // 6) + 1, -(-shape[3] // 6) + 1)
    wide = torch.nn.functional.interpolate(coarse, shape[2:], mode="bicubic", align_corners=True)
    return (wide + 0.04 * (images(seed + 1, *shape) - 0.5)).clamp(0, 1)


def encoded(x: Tensor, **kwargs: object) -> Image.Image:
    """One 8-bit image (C, H, W) through a file."""
    array = x.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(buffer, "JPEG", **kwargs)
    return Image.open(io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("shape", [(5, 3, 17, 23), (3, 1, 8, 9), (2, 3, 1, 1), (5, 3, 70, 65)])
def test_forward_is_pillow(shape: tuple[int, ...], subsampling: str, threads: int) -> None:
    x = images(0, *shape)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = JPEG(quality=60, subsampling=subsampling)(x)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(before)
    for image, out in zip(x, got, strict=True):
        byte = torch.from_numpy(np.rint(image.numpy() * 255).astype(np.uint8))
        expected = np.asarray(encoded(byte, quality=60, subsampling=subsampling))
        expected = expected.reshape(*shape[2:], shape[1]).transpose(2, 0, 1)
        np.testing.assert_array_equal((out * 255).round().byte().numpy(), expected)
        assert torch.equal(out, (out * 255).round() / 255)


def test_rounding_before_the_codec_is_the_one_named() -> None:
    x = torch.full((1, 3, 8, 8), 200.9 / 255)
    assert float(JPEG(preset="qiu")(x)[0, 0, 0, 0] * 255) == pytest.approx(200, abs=0.01)
    assert float(JPEG(quality=75)(x)[0, 0, 0, 0] * 255) == pytest.approx(201, abs=0.01)


@pytest.mark.parametrize("quality", [1, 10, 49, 50, 75, 90, 99, 100])
def test_tables_are_those_in_the_file(quality: int) -> None:
    tables = encoded(images(0, 3, 8, 8).mul(255).byte(), quality=quality).quantization
    for i in (0, 1):
        assert quantisation_tables(quality)[i].flatten().tolist() == list(tables[i])
    both = quantisation_tables(torch.tensor([quality, 50]))
    assert torch.equal(both[0], quantisation_tables(quality))
    assert torch.equal(both[1], quantisation_tables(50))


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("shape", [(4, 3, 48, 64), (4, 3, 45, 51), (4, 1, 33, 40), (4, 3, 5, 7)])
@pytest.mark.parametrize("quality", [30, 75, 95])
def test_tensor_codec_with_true_rounding_is_close_to_pillow(
    shape: tuple[int, ...], subsampling: str, quality: int
) -> None:
    """What is left: libjpeg's integer DCT, and where its averages of the chroma round ties."""

    def levels(planes: Tensor) -> Tensor:
        return planes.round().clamp(0, 255)

    x = smooth(3, *shape).mul(255).round() / 255
    expected = pillow_jpeg(x, quality, subsampling)  # type: ignore[arg-type]
    got = tensor_jpeg(x, quality, subsampling, torch.round, levels)  # type: ignore[arg-type]
    assert torch.equal(got, (got * 255).round() / 255)
    plain = shape[1] == 1 or subsampling == "4:4:4"
    assert float((got - expected).abs().mean() * 255) < (0.6 if plain else 1.2)
    # Without the 8-bit planes between the steps, as the surrogate uses it.
    got = tensor_jpeg(x, quality, subsampling, torch.round).clamp(0, 1)  # type: ignore[arg-type]
    lost = float((x - expected).abs().mean() * 255)
    assert float((got - expected).abs().mean() * 255) < min(2.0, 0.55 * lost)


def test_one_quality_per_image() -> None:
    x = smooth(1, 3, 3, 24, 24)
    quality = torch.tensor([20, 50, 90])
    for function in (pillow_jpeg, tensor_jpeg):
        got = function(x, quality)
        for i, q in enumerate(quality.tolist()):
            torch.testing.assert_close(got[i : i + 1], function(x[i : i + 1], q))


@pytest.mark.parametrize("rule", ["identity", "surrogate", None])
def test_a_step_along_the_views_gradient_raises_the_true_output(rule: str | None) -> None:
    """Oracle: the exact codec before and after a step of 8/255, against random steps."""
    defense, x = JPEG(quality=50), smooth(5, 6, 3, 32, 32) * 0.8 + 0.1
    goal = random.normal(random.keys(1, 6), (3, 4, 4))
    goal = torch.nn.functional.interpolate(goal, scale_factor=8)
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(pairwise(defense.view(rule)(leaf), goal).sum(), leaf)
    base = pairwise(defense(x), goal)

    def gain(direction: Tensor) -> Tensor:
        return pairwise(defense((x + 8 / 255 * direction.sign()).clamp(0, 1)), goal) - base

    best = 8 / 255 * goal.abs().flatten(1).sum(1)  # if the codec changed nothing
    chance = gain(random.normal(random.keys(2, 6), x.shape[1:])).abs().max()
    assert bool((gain(g) > 0.3 * best).all())
    assert bool((gain(g) > 3 * chance).all())


def test_the_surrogate_knows_what_the_codec_drops() -> None:
    """A chessboard of single pixels on a flat image is rounded away: no gain along it."""
    defense = JPEG(quality=50)
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
    board = board.expand(1, 3, 16, 16)
    x = torch.full((1, 3, 16, 16), 0.5)
    assert torch.equal(defense(x + 4 / 255 * board), defense(x))
    sizes = {}
    for rule in ("identity", "surrogate"):
        leaf = x.clone().requires_grad_()
        out = defense.view(rule)(leaf)
        sizes[rule] = float(torch.autograd.grad((out * board).sum(), leaf)[0].abs().sum())
    assert sizes["surrogate"] < 0.01 * sizes["identity"]


def test_bad_arguments() -> None:
    with pytest.raises(RangeError, match="1 to 100"):
        JPEG(quality=0)
    with pytest.raises(ConfigError, match="4:4:4, 4:2:2, 4:2:0"):
        JPEG(subsampling="4:1:1")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="rounding"):
        JPEG(rounding="up")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="1 \\(gray\\) or 3"):
        JPEG()(images(0, 1, 4, 8, 8))
