from __future__ import annotations

import itertools
from typing import ClassVar

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from feint.attacks import spatial
from feint.attacks.spatial import _grid, _move, _random
from feint.core import random
from feint.core.errors import ConfigError, RangeError
from feint.core.losses import margin
from feint.core.registry import ATTACKS
from feint.defenses import PixelShift
from feint.evaluation.attackers import Attacker, parse_attack
from tests.contracts.attack import AttackContract
from tests.contracts.attack_harness import HostSyncs
from tests.tiny import Counting, LinearModel, Round, TinyConv, behind, images, predicted


class TestSpatial(AttackContract):
    attack = staticmethod(spatial)
    kwargs: ClassVar = {"search": "random", "tries": 40}
    random = True

    # No norm holds what it does, and no image can be called its way out of a corner.
    test_pixels_at_the_ends_move_inwards = None


# --- the transformation ---------------------------------------------------------------------------


def move(x: Tensor, dx: float, dy: float, angle: float, pad: str = "zero") -> Tensor:
    moves = torch.tensor([[dx, dy, angle]], dtype=torch.float64).expand(len(x), 3)
    return _move(x, moves, pad)


@pytest.mark.parametrize("pad", ["zero", "replicate"])
@pytest.mark.parametrize(("dx", "dy"), [(0, 0), (1, 0), (-1, 1), (2, -3)])
def test_whole_shifts_are_pixel_shifts_bit_by_bit(dx: int, dy: int, pad: str) -> None:
    # Oracle: the pixel_shift defense, which gathers.
    x = images(2, (3, 7, 6))
    expected = PixelShift(dx=dx, dy=dy, pad=pad)(x) if dx or dy else x
    assert torch.equal(move(x, dx, dy, 0.0, pad), expected)


@pytest.mark.parametrize("quarter", [1, 2, 3])
def test_quarter_turns_are_those_of_numpy(quarter: int) -> None:
    # Oracle: numpy.rot90, counterclockwise.
    x = images(2, (3, 5, 5)).double()
    expected = np.rot90(x.numpy(), quarter, axes=(2, 3))
    np.testing.assert_allclose(move(x, 0, 0, 90.0 * quarter).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("pad", ["zero", "replicate"])
@pytest.mark.parametrize(("dx", "dy", "angle"), [(0, 0, 20), (1.3, -0.6, 0), (0.4, 1.7, -33)])
def test_any_move_is_that_of_scipy(dx: float, dy: float, angle: float, pad: str) -> None:
    # Oracle: scipy.ndimage.map_coordinates, linear, on an image padded by hand.
    x = images(1, (1, 8, 9)).double()
    radians = np.deg2rad(angle)
    down, right = np.mgrid[:8, :9].astype(float)
    # Undo the shift, then turn back clockwise about the center, y pointing down.
    u, v = right - 4 - dx, down - 3.5 - dy
    at_x = np.cos(radians) * u - np.sin(radians) * v + 4
    at_y = np.sin(radians) * u + np.cos(radians) * v + 3.5
    mode = {"zero": "constant", "replicate": "edge"}[pad]
    padded = np.pad(x[0, 0].numpy(), 20, mode=mode)
    expected = ndimage.map_coordinates(padded, [at_y + 20, at_x + 20], order=1)
    np.testing.assert_allclose(move(x, dx, dy, angle, pad)[0, 0].numpy(), expected, atol=1e-12)


def test_the_grid_is_engstroms() -> None:
    # Oracle: closed form: 5·5·31 values but for the identity, mild ones first.
    grid = _grid(3.0, 30.0, 5, 31)
    assert len(grid) == 5 * 5 * 31 - 1
    assert grid[:, 0].unique().tolist() == [-3.0, -1.5, 0.0, 1.5, 3.0]
    assert grid[:, 2].unique().tolist() == [float(a) for a in range(-30, 31, 2)]
    assert len(grid.unique(dim=0)) == len(grid)
    size = (grid / torch.tensor([3.0, 3.0, 30.0])).norm(dim=1)
    assert bool((size.diff() >= -1e-12).all())
    assert len(_grid(1.0, 0.0, 3, 1)) == 8  # the neighbours of a pixel
    assert len(_grid(0.0, 0.0, 5, 31)) == 0


def test_random_moves_fill_their_bounds() -> None:
    # Oracle: closed form: uniform in [−3, 3]² × [−30, 30].
    moves = _random(random.keys(0, 3), 3.0, 30.0, 4000)
    assert moves.shape == (3, 4000, 3)
    bound = torch.tensor([3.0, 3.0, 30.0], dtype=torch.float64)
    assert bool((moves.abs() <= bound).all())
    assert bool(((moves / bound).mean((0, 1)).abs() < 4 * (1 / 3 / 12000) ** 0.5).all())
    assert bool(((moves / bound).square().mean((0, 1)) - 1 / 3 < 0.02).all())
    assert not torch.equal(moves[0], moves[1])


# --- the search -----------------------------------------------------------------------------------


def test_the_worst_of_the_grid_is_found() -> None:
    # Oracle: brute force: every move on its own.
    model = TinyConv()
    x = images(4, (3, 6, 6)).double()
    y = predicted(model, x)
    kwargs = {"max_shift": 2.0, "max_angle": 20.0, "shift_steps": 3, "angle_steps": 3}
    x_adv = spatial(model, x, y, stop="never", **kwargs)
    worst = torch.full((4,), -torch.inf, dtype=torch.float64)
    shifts, angles = (-2.0, 0.0, 2.0), (-20.0, 0.0, 20.0)
    for dx, dy, angle in itertools.product(shifts, shifts, angles):
        worst = torch.maximum(worst, margin(model(move(x, dx, dy, angle)), y).detach())
    torch.testing.assert_close(margin(model(x_adv), y).detach(), worst, rtol=0, atol=1e-9)


def test_a_shifted_pattern_is_found_out() -> None:
    # Oracle: closed form: class 1 where the bright pixel is in the right half, two pixels away.
    class Half(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            left, right = x[..., :4].sum((1, 2, 3)), x[..., 4:].sum((1, 2, 3))
            return torch.stack([left, right], 1)

    x = torch.zeros(1, 3, 8, 8)
    x[..., 4, 2] = 1
    for reach, falls in ((1.0, False), (2.0, True)):
        x_adv = spatial(Half(), x, torch.tensor([0]), max_shift=reach, max_angle=0, shift_steps=3)
        assert bool(predicted(Half(), x_adv) == 1) is falls
    assert float(x_adv[0, 0, :, 4].sum()) == 1  # moved whole


def test_stops_after_the_round_of_its_success_and_loses_nothing() -> None:
    # Oracle: counts and the whole search: those that fall are the same.
    inner = LinearModel(shape=(3, 5, 5))
    x = images(8, (3, 5, 5))
    y = predicted(inner, x)
    half = torch.cat([(y[:4] + 1) % 5, y[4:]])
    counts, fooled = {}, {}
    for stop in ("success", "never"):
        model = Counting(inner)
        x_adv = spatial(model, x, half, stop=stop)
        counts[stop], fooled[stop] = model.forwards, predicted(inner, x_adv) != half
        assert model.backwards == 0
    assert counts["never"] == 8 * 775
    assert 8 <= counts["success"] <= 8 + 4 * 774
    assert torch.equal(fooled["success"], fooled["never"])
    model = Counting(inner)
    assert torch.equal(spatial(model, x[:4], half[:4]), x[:4])
    assert model.forwards == 4


def test_waits_once_a_round_at_most() -> None:
    # Oracle: count of waiting operations.
    model = LinearModel()
    with torch.no_grad():
        model.bias[0] += 1e3
    x, y = images(3), torch.zeros(3, dtype=torch.int64)

    def waits(tries: int, stop: str) -> int:
        with HostSyncs() as syncs:
            spatial(model, x, y, search="random", tries=tries, stop=stop)
        return syncs.count

    assert waits(32 * 6, "never") == waits(32 * 2, "never")
    assert waits(32 * 6, "success") - waits(32 * 2, "success") == 4


def test_chunks_and_rounding_models_change_nothing() -> None:
    # Oracle: the run in one piece, bit by bit, on a model without gradients.
    model = behind(Round(16), LinearModel())
    x = images(3)
    y = predicted(model, x)
    whole = spatial(model, x, y, preset="ace", stop="never")
    assert torch.equal(spatial(model, x, y, preset="ace", stop="never", chunk=5), whole)


def test_no_budget_returns_x() -> None:
    model, x = LinearModel(), images(3)
    y = predicted(model, x)
    assert torch.equal(spatial(model, x, y, max_shift=0, max_angle=0), x)
    assert torch.equal(spatial(model, x, y, max_shift=0, max_angle=0, search="random"), x)


def test_no_lp_threat_model_takes_it_in() -> None:
    # Its images lie in no lp ball: an evaluation within one refuses it, and says so.
    info = ATTACKS["spatial"]
    assert (info.goal, info.norms) == ("transform", ("spatial",))
    assert "eps" not in info.parameters
    for norm in ("linf", "l2"):
        with pytest.raises(ConfigError, match=f"no norm '{norm}'; it has spatial"):
            Attacker(parse_attack("spatial"), LinearModel(), norm, 8 / 255)


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"shift_steps": 4}, RangeError),
        ({"angle_steps": 2}, RangeError),
        ({"max_shift": -1.0}, RangeError),
        ({"max_angle": 200.0}, RangeError),
        ({"search": "gird"}, ConfigError),
        ({"pad": "reflect"}, ConfigError),
    ],
)
def test_bad_options(kwargs: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error, match="expected"):
        spatial(LinearModel(), images(1), torch.tensor([0]), **kwargs)
