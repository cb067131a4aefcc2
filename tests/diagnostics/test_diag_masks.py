"""Sets of pixels. Oracles: sorting by hand, torch's own convolution, ACE itself, counting."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from feint.core.errors import DtypeError, RangeError, ShapeError
from feint.defenses import ACE
from feint.diagnostics import (
    checkerboard_share,
    connected_pixels,
    intersection_over_union,
    phase_shares,
    share_inside,
    top_pixels,
    window_overlap,
)
from feint.models import build
from tests.tiny import images


@given(st.integers(0, 50), st.floats(0, 1), st.integers(1, 7), st.integers(1, 7))
def test_top_pixels_are_strictly_above_the_kth_largest(
    seed: int, p: float, height: int, width: int
) -> None:
    # Oracle: the rule of the original code, written with numpy's sort; many ties on purpose.
    score = (images(1, (height, width), seed) * 5).floor()[0].double()
    count = int(np.floor(p * height * width + 1e-9))
    found = top_pixels(score, p)
    if count == 0:
        assert not found.any()
    else:
        bound = np.sort(score.numpy().ravel())[::-1][count - 1]
        np.testing.assert_array_equal(found.numpy(), score.numpy() > bound)
    ordered = top_pixels(score, p, ties="order")
    assert int(ordered.sum()) == count
    assert not (found & ~ordered).any()
    if 0 < count < height * width:
        assert score[ordered].min() >= score[~ordered].max()


def test_top_pixels_of_several_maps_are_each_its_own() -> None:
    scores = images(3, (5, 6))
    for one, together in zip(scores, top_pixels(scores, 0.3), strict=True):
        assert torch.equal(top_pixels(one, 0.3), together)


@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2), st.integers(8, 13)
)
def test_window_overlap_is_what_autograd_counts(
    kernel: int, stride: int, padding: int, dilation: int, side: int
) -> None:
    # Oracle: the input gradient of torch's convolution with a kernel of ones.
    x = torch.zeros(1, 1, side, side + 1, dtype=torch.float64, requires_grad=True)
    ones = torch.ones(1, 1, kernel, kernel, dtype=torch.float64)
    torch.nn.functional.conv2d(x, ones, None, stride, padding, dilation).sum().backward()
    found = window_overlap(
        side, side + 1, kernel=kernel, stride=stride, padding=padding, dilation=dilation
    )
    assert x.grad is not None
    assert torch.equal(found, x.grad[0, 0].long())


def test_connected_pixels_are_those_that_ace_reads() -> None:
    # Oracle: with the skip removed, only what the encoder reads has a gradient.
    ace = ACE(lam=float("inf"))
    x = images(1, (3, 7, 8)).requires_grad_()
    ace.decode.weight.data.fill_(1.0)
    ace.encode.weight.data.fill_(1.0)
    ace(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad[0].abs().sum(0) > 0, connected_pixels(ace, 7, 8))
    assert torch.equal(connected_pixels(build("toy", ace=2.0), 7, 8), connected_pixels(None, 7, 8))
    assert int(connected_pixels(None, 9, 9, stride=3).sum()) == 9


def test_shares_of_sets_in_closed_form() -> None:
    c = connected_pixels(None, 4, 4)
    left = torch.zeros(4, 4, dtype=torch.bool)
    left[:, :2] = True
    assert float(share_inside(c, left)) == 0.5
    assert float(share_inside(left, c)) == 2 / 8
    assert float(intersection_over_union(c, left)) == 2 / 10
    empty = torch.zeros_like(c)
    assert share_inside(empty, c).isnan()
    assert intersection_over_union(empty, empty).isnan()


@given(st.integers(0, 30), st.integers(1, 3))
def test_phase_shares_are_means_by_slicing(seed: int, stride: int) -> None:
    # Oracle: strided slices.
    score = images(2, (7, 5), seed).double()
    mean = torch.stack(
        [
            torch.stack([score[:, r::stride, c::stride].mean((1, 2)) for c in range(stride)], -1)
            for r in range(stride)
        ],
        1,
    )
    found = phase_shares(score, stride)
    torch.testing.assert_close(found, mean / mean.sum((1, 2), keepdim=True))
    torch.testing.assert_close(found.sum((1, 2)), torch.ones(2, dtype=torch.float64))


@given(st.integers(0, 30), st.floats(0.1, 9))
def test_checkerboard_share_is_a_share_and_ignores_scale(seed: int, scale: float) -> None:
    score, c = images(2, (6, 6), seed).double(), connected_pixels(None, 6, 6)
    found = checkerboard_share(score, c)
    torch.testing.assert_close(found, checkerboard_share(scale * score, c))
    torch.testing.assert_close(found + checkerboard_share(score, ~c), torch.ones(2).double())
    assert float(checkerboard_share(torch.ones(6, 6), c)) == 0.25


def test_bad_input_is_refused() -> None:
    c = connected_pixels(None, 4, 4)
    with pytest.raises(RangeError, match="fraction"):
        top_pixels(torch.rand(2, 2), 1.5)
    with pytest.raises(RangeError, match="NaN"):
        top_pixels(torch.full((2, 2), torch.nan), 0.5)
    with pytest.raises(ShapeError):
        top_pixels(torch.rand(3), 0.5)
    with pytest.raises(RangeError, match="does not fit"):
        window_overlap(3, 3, kernel=5)
    with pytest.raises(RangeError, match="at least 1"):
        window_overlap(3, 3, kernel=0)
    with pytest.raises(DtypeError, match="bool"):
        share_inside(c.float(), c)
    with pytest.raises(ShapeError, match="one size"):
        intersection_over_union(c, connected_pixels(None, 5, 5))
    with pytest.raises(RangeError, match="negative"):
        checkerboard_share(-torch.ones(4, 4), c)
    with pytest.raises(RangeError, match="short side"):
        phase_shares(torch.ones(4, 4), 5)
