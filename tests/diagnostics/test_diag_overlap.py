"""Gradient overlap. Oracles: S0's published Table 2, closed forms of one layer, counting paths."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from feint.core.errors import GradientError, ModelError, RangeError, ShapeError, UnknownNameError
from feint.diagnostics import (
    connected_pixels,
    gradient_overlap,
    share_inside,
    top_pixels,
    window_overlap,
)
from feint.models import build
from tests.tiny import TinyConv

LAMBDAS = (None, 1.0, 2.0, 5.0, 10.0, 20.0, 100.0, math.inf)
TABLE_2 = {
    "resnet18": (31.3, 34.4, 35.9, 44.9, 53.9, 63.3, 86.7, 100),
    "vgg11": (5.1, 63.3, 64.5, 66.8, 70.7, 75.4, 93.8, 100),
}


EVERY = [(a, i) for a in TABLE_2 for i in range(len(LAMBDAS))]
QUICK = [("resnet18", 6), ("vgg11", 0), ("vgg11", 4), ("vgg11", 6)]


@pytest.mark.parametrize(
    ("architecture", "place"),
    [pytest.param(*c, marks=() if c in QUICK else pytest.mark.slow) for c in EVERY],
)
def test_table_2_of_s0_to_the_printed_digit(architecture: str, place: int) -> None:
    # Oracle: the paper. Ω does not depend on what was learned, so no training is needed.
    for lam, published in [(LAMBDAS[place], TABLE_2[architecture][place])]:
        omega = gradient_overlap(build(architecture, ace=lam), (3, 32, 32))
        share = share_inside(connected_pixels(None, 32, 32), top_pixels(omega, 0.3))
        assert abs(100 * float(share) - published) <= 0.051, (lam, float(share))


@pytest.mark.parametrize("preset", ["repo", "paper", None])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 0), (3, 2, 1), (2, 2, 0)])
def test_one_convolution_has_the_overlap_of_its_windows(
    preset: str | None, kernel: int, stride: int, padding: int
) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, kernel, stride, padding), nn.ReLU(), nn.Flatten())
    windows = window_overlap(9, 8, kernel=kernel, stride=stride, padding=padding).double()
    found = gradient_overlap(net, (3, 9, 8), preset=preset)
    torch.testing.assert_close(found, windows / windows.max(), rtol=1e-12, atol=0)


def test_two_convolutions_count_paths() -> None:
    # Oracle: paths counted by pulling window counts of the second layer through the first.
    net = nn.Sequential(nn.Conv2d(1, 2, 3, 2), nn.Conv2d(2, 5, 2, 1), nn.Flatten())
    inner = window_overlap(5, 5, kernel=2).double()
    paths = torch.zeros(11, 11, dtype=torch.float64)
    for i in range(5):
        for j in range(5):
            paths[2 * i : 2 * i + 3, 2 * j : 2 * j + 3] += inner[i, j]
    for preset in ("repo", "paper"):
        found = gradient_overlap(net, (1, 11, 11), preset=preset)
        torch.testing.assert_close(found, paths / paths.max(), rtol=1e-12, atol=0)


def test_paper_preset_leaves_rectifiers_and_maxima_out() -> None:
    class Dark(nn.Module):
        """Subtracts so much that every rectifier cuts."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.conv(x - 9))
            return nn.functional.max_pool2d(y.relu(), 2).flatten(1)

    windows = window_overlap(9, 9, kernel=3, stride=2).double()
    found = gradient_overlap(Dark(), (3, 9, 9), preset="paper")
    torch.testing.assert_close(found, windows / windows.max())
    with pytest.raises(GradientError, match="paper"):
        gradient_overlap(Dark(), (3, 9, 9))


def test_what_was_learned_plays_no_part_and_is_left_alone() -> None:
    model = TinyConv(batch_norm=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = gradient_overlap(model, (3, 6, 6), linear=True)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    other = TinyConv(batch_norm=True, seed=77)
    torch.testing.assert_close(found, gradient_overlap(other, (3, 6, 6), linear=True))
    assert float(found.max()) == 1
    assert float(found.min()) > 0


def test_symmetric_where_the_network_is() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 5, padding=2), nn.Flatten())
    found = gradient_overlap(net, (3, 7, 7))
    for other in (found.flip(0), found.flip(1), found.T):
        torch.testing.assert_close(found, other)


def test_bad_input_is_refused() -> None:
    net = TinyConv()
    with pytest.raises(UnknownNameError, match="repo"):
        gradient_overlap(net, (3, 6, 6), preset="rep")
    with pytest.raises(RangeError, match="above 0"):
        gradient_overlap(net, (3, 6, 6), weight=0)
    with pytest.raises(ShapeError, match="channels"):
        gradient_overlap(net, (6, 6))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no parameters"):
        gradient_overlap(nn.Flatten(), (3, 6, 6))
    deep = nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(250)])
    with pytest.raises(RangeError, match="float64"):
        gradient_overlap(nn.Sequential(deep, nn.Flatten()), (3, 6, 6), weight=1e3)
