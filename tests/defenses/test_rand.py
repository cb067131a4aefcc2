"""Rand. Oracles: the procedure step by step, image by image, in numpy and in torch's own resize."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.errors import ConfigError, RangeError
from feint.defenses import Rand
from tests.contracts.defense import DefenseContract, images


class TestRand(DefenseContract):
    cls = Rand
    configs = (
        {},
        {"preset": "paper"},
        {"preset": "xie"},
        {"low": 250, "high": 280, "canvas": 310, "resize_back": "half_pixel"},
    )


def linear(at: np.ndarray, line: np.ndarray) -> np.ndarray:
    """Linear interpolation along the first axis, the ends repeated."""
    return np.stack([np.interp(at, np.arange(len(line)), c) for c in line.T]).T


def along_rows(function, image: np.ndarray) -> np.ndarray:  # type: ignore[no-untyped-def]
    flat = image.reshape(image.shape[0], -1)
    return function(flat).reshape(-1, *image.shape[1:])


def step_by_step(defense: Rand, image: Tensor, sizes, starts, canvas) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Resize, pad, resize back of one image (C, H, W) by interpolation in numpy, float64."""
    y = image.double().numpy().transpose(1, 2, 0)
    for axis in (0, 1):
        y = y.swapaxes(0, axis)
        n, r = y.shape[0], sizes[axis]
        if defense.resize == "nearest":
            y = y[np.arange(r) * n // r]
        else:
            at = np.arange(r) * (n - 1) / max(r - 1, 1)
            y = along_rows(lambda flat, at=at: linear(at, flat), y)
        y = y.swapaxes(0, axis)
    board = np.full((canvas[0], canvas[1], y.shape[2]), defense.value)
    top, left = starts
    board[top : top + sizes[0], left : left + sizes[1]] = y
    for axis, n in zip((0, 1), image.shape[1:], strict=True):
        board = board.swapaxes(0, axis)
        i, m = np.arange(n), board.shape[0]
        at = i * m / n if defense.resize_back == "legacy" else (i + 0.5) * m / n - 0.5
        board = along_rows(lambda flat, at=at: linear(at, flat), board).swapaxes(0, axis)
    return board.transpose(2, 0, 1)


@pytest.mark.parametrize("config", TestRand.configs, ids=str)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (13, 21), (64, 40), (2, 1)])
def test_equals_the_steps_image_by_image(
    config: dict[str, object], height: int, width: int
) -> None:
    defense, x = Rand(**config), images(0, 6, 3, height, width)  # type: ignore[arg-type]
    keys = random.keys(3, 6)
    params = defense.sample(x, keys)
    rows, columns = (
        defense.placement(params, n, axis)  # type: ignore[arg-type]
        for n, axis in ((height, "top"), (width, "left"))
    )
    got = defense(x.double(), keys)
    for i in range(len(x)):
        sizes, starts = (int(rows[0][i]), int(columns[0][i])), (int(rows[1][i]), int(columns[1][i]))
        expected = step_by_step(defense, x[i], sizes, starts, (rows[2], columns[2]))
        np.testing.assert_allclose(got[i].numpy(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(defense(x, keys).double(), got, rtol=0, atol=1e-6)


@pytest.mark.parametrize("preset", ["qiu", "paper", "xie"])
def test_equals_torchs_own_resize_at_299(preset: str) -> None:
    """Oracle: torch.nn.functional.interpolate and pad; corners aligned, then half pixels."""
    defense, x = Rand(preset=preset, resize_back="half_pixel"), images(0, 2, 1, 299, 299).double()
    params = defense.sample(x, random.keys(0, 2))
    got = defense.replay(x, params)
    for i, image in enumerate(x):
        r, top, left = (int(params[name][i]) for name in ("size", "top", "left"))
        assert defense.low <= r <= defense.high
        if preset == "xie":  # torch computes ⌊i·n/r⌋ in float32
            index = torch.arange(r) * 299 // r
            resized = image[None][..., index, :][..., index]
        else:
            resized = nn.functional.interpolate(
                image[None], (r, r), mode="bilinear", align_corners=True
            )
        rest = defense.canvas - r
        padded = nn.functional.pad(
            resized, (left, rest - left, top, rest - top), value=defense.value
        )
        expected = nn.functional.interpolate(
            padded, (299, 299), mode="bilinear", align_corners=False
        )
        torch.testing.assert_close(got[i : i + 1], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("preset", "low", "high", "canvas"),
    [("qiu", 299, 399, 400), ("paper", 299, 330, 400), ("xie", 310, 330, 331)],
)
def test_draws_at_299_are_the_originals(preset: str, low: int, high: int, canvas: int) -> None:
    """Sizes even on both ends included; positions 0 … canvas − r − 1, all reached."""
    defense, n = Rand(preset=preset), 20_000
    params = defense.draw(random.keys(0, n), torch.Size((n, 3, 299, 299)))
    size, start, board = defense.placement(params, 299, "top")
    assert board == canvas
    assert torch.equal(size, params["size"])
    assert torch.equal(start, params["top"])
    counts = torch.bincount(size - low)
    assert len(counts) == high - low + 1
    expected = n / len(counts)
    assert bool(((counts - expected).abs() < 5 * expected**0.5).all())
    room = canvas - size
    assert bool((start >= 0).all())
    assert bool((start <= (room - 1).clamp_min(0)).all())
    assert bool((start == room - 1).any())
    chosen = size == high - 1  # two positions, both taken
    assert set(start[chosen].tolist()) == set(range(canvas - high + 1))


@pytest.mark.parametrize("preset", ["qiu", "paper", "xie"])
@pytest.mark.parametrize("side", [1, 8, 32, 224, 500])
def test_scaled_placements_fit_and_vary(preset: str, side: int) -> None:
    defense, n = Rand(preset=preset), 500
    params = defense.draw(random.keys(1, n), torch.Size((n, 3, side, side)))
    size, start, canvas = defense.placement(params, side, "left")
    assert bool((size >= 1).all())
    assert bool((start >= 0).all())
    assert bool((start + size <= canvas).all())
    assert canvas == -(-defense.canvas * side // 299)
    assert len(set(zip(size.tolist(), start.tolist(), strict=True))) > 1


def test_a_canvas_without_room_is_the_resize_alone() -> None:
    x = images(0, 2, 3, 32, 32)
    same = Rand(low=299, high=299, canvas=299)
    torch.testing.assert_close(same(x), x, rtol=0, atol=1e-6)


def test_white_stays_white_with_its_gradient() -> None:
    """Weights that sum to one but for rounding: no value beyond 1, no gradient lost there."""
    defense = Rand(value=1.0)
    x = torch.ones(8, 3, 31, 29).requires_grad_()
    y = defense(x, random.keys(0, 8))
    assert bool((y <= 1).all())
    assert bool((y >= 1 - 1e-6).all())
    (g,) = torch.autograd.grad(y.sum(), x)
    params = defense.sample(x, random.keys(0, 8))
    z = torch.full_like(x, 0.5).detach().requires_grad_()
    (expected,) = torch.autograd.grad(defense.replay(z, params).sum(), z)
    torch.testing.assert_close(g, expected)


def test_bad_arguments() -> None:
    with pytest.raises(RangeError, match="low ≤ high ≤ canvas"):
        Rand(low=300, high=299)
    with pytest.raises(RangeError, match="low ≤ high ≤ canvas"):
        Rand(low=29.9)  # type: ignore[arg-type]
    with pytest.raises(RangeError, match="gray level"):
        Rand(value=128)
    with pytest.raises(ConfigError, match="'bilinear' or 'nearest'"):
        Rand(resize="cubic")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'legacy' or 'half_pixel'"):
        Rand(resize_back="none")  # type: ignore[arg-type]
