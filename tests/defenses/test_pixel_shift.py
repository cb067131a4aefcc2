"""Pixel shift. Oracles: numpy slices, counting, S0's parity law; published distances."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from feint.core import random
from feint.core.errors import ConfigError, ShapeError
from feint.defenses import ACE, PixelShift
from tests.contracts.defense import DefenseContract, images


class TestPixelShift(DefenseContract):
    cls = PixelShift
    configs = (
        {},
        {"dx": -1, "dy": 1, "pad": "zero"},
        {"random": True},
        {"preset": "prm", "include_identity": True},
    )
    min_side = 2
    batch_atol = 0.0


def by_slices(x: np.ndarray, dx: int, dy: int, pad: str) -> np.ndarray:
    """Pad on one side, crop the opposite one."""
    mode = "edge" if pad == "replicate" else "constant"
    h, w = x.shape[-2:]
    widths = [(0, 0), (0, 0), (max(dy, 0), max(-dy, 0)), (max(dx, 0), max(-dx, 0))]
    top, left = max(-dy, 0), max(-dx, 0)
    return np.pad(x, widths, mode=mode)[..., top : top + h, left : left + w]


@pytest.mark.parametrize("pad", ["replicate", "zero"])
@pytest.mark.parametrize(("dx", "dy"), [(1, 0), (0, 1), (-1, -1), (3, -2), (5, 5), (0, 0)])
def test_equals_pad_and_crop(dx: int, dy: int, pad: str) -> None:
    x = images(0, 2, 3, 6, 7)
    expected = by_slices(x.numpy(), dx, dy, pad)
    np.testing.assert_array_equal(PixelShift(dx=dx, dy=dy, pad=pad)(x).numpy(), expected)


@pytest.mark.parametrize("pad", ["replicate", "zero"])
def test_random_is_the_fixed_shift_by_what_was_drawn(pad: str) -> None:
    defense, x, keys = PixelShift(random=True, pad=pad), images(0, 9, 3, 6, 7), random.keys(5, 9)
    drawn = defense.sample(x, keys)
    for i, y in enumerate(defense(x, keys)):
        fixed = PixelShift(dx=int(drawn["dx"][i]), dy=int(drawn["dy"][i]), pad=pad)
        assert torch.equal(y, fixed(x[i : i + 1])[0])


def test_the_support_is_the_eight_neighbours_and_with_the_identity_nine() -> None:
    shape = torch.Size((2, 3, 8, 8))
    for include, count in ((False, 8), (True, 9)):
        options = PixelShift(random=True, include_identity=include).support(shape)
        pairs = {(int(o["dx"][0]), int(o["dy"][0])) for o in options}
        assert len(options) == len(pairs) == count
        assert ((0, 0) in pairs) == include
        assert all(len(o["dx"]) == 2 for o in options)
        assert pairs <= {(dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)}


def test_exact_expectation_is_the_limit_of_sampling() -> None:
    """Oracle: the law of large numbers, five standard errors."""
    defense, x = PixelShift(random=True), images(0, 1, 1, 6, 6)
    exact = torch.stack([defense.replay(x, p) for p in defense.support(x.shape)]).mean(0)
    many = defense(x.expand(4000, -1, -1, -1), random.keys(0, 4000))
    error = many.std(0) / 4000**0.5
    assert bool(((many.mean(0) - exact[0]).abs() <= 5 * error + 1e-6).all())


@pytest.mark.parametrize("shift", [1, 2, 3, 4, 5])
def test_an_odd_shift_leaves_no_connected_pixel_in_place(shift: int) -> None:
    """S0 Table 7: 0 % of C lands on C for odd shifts, all of it for even ones."""
    board = ACE().connected(32, 32).float()
    moved = PixelShift(dx=shift, pad="zero")(board)
    share = float((moved * board).sum() / moved.sum())
    assert share == (0.0 if shift % 2 else 1.0)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"pad": "mirror"}, "expected 'replicate' or 'zero'"),
        ({"dx": 0.5}, "whole numbers"),
        ({"random": True, "dx": 2}, "leave them out"),
        ({"include_identity": True}, "needs random=True"),
    ],
)
def test_bad_configuration(config: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        PixelShift(**config)  # type: ignore[arg-type]


def test_a_shift_as_wide_as_the_image_is_refused() -> None:
    with pytest.raises(ShapeError, match="longer than the shift of 6 px"):
        PixelShift(dx=6)(images(0, 1, 3, 6, 6))
