from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize

from feint.attacks import fmn
from feint.attacks._boxed import ball_in_box, movable
from feint.core import random
from feint.core.errors import RangeError
from feint.core.norms import distance, norm_of
from tests.attacks.minimal import MinimalContract
from tests.tiny import LinearModel, images, predicted


class TestFMN(MinimalContract):
    attack = staticmethod(fmn)
    kwargs: ClassVar = {"steps": 20}
    precise: ClassVar = {"steps": 300}


def test_l0_counts_pixels() -> None:
    # Oracle: closed form. One pixel whose three channels together cross the boundary, and none of
    # which does so alone.
    model = LinearModel(classes=2, dtype=torch.float64)
    with torch.no_grad():
        model.weight.mul_(0.01)
        model.weight[1, :, 2, 1] = 1.0
        model.weight[0] = 0.0
        model.bias.copy_(torch.tensor([0.0, -0.5 * float(model.weight[1].sum()) - 1.2]))
    x = torch.full((1, 3, 4, 4), 0.5, dtype=torch.float64)
    x_adv = fmn(model, x, torch.tensor([0]), norm="l0", steps=100)
    changed = (x_adv != x).any(1)
    assert changed.nonzero().tolist() == [[0, 2, 1]]
    assert int(predicted(model, x_adv)) == 1


def test_each_norm_is_least_in_its_own_measure() -> None:
    # Oracle: property: what is optimised for a norm is nearer in it than what is for the others.
    model = LinearModel(dtype=torch.float64)
    x = images(8, low=0.4, high=0.6).double()
    y = predicted(model, x)
    found = {n: fmn(model, x, y, norm=n, steps=150) for n in ("l2", "linf", "l1", "l0")}
    for norm, own in found.items():
        for other in found.values():
            assert float((distance(own, x, norm) - distance(other, x, norm)).mean()) <= 1e-9


def test_a_long_first_step_is_refused_for_linf() -> None:
    with pytest.raises(RangeError, match="2/255"):
        fmn(LinearModel(), images(2), torch.tensor([0, 1]), norm="linf", step_size=2.0)


@given(seed=st.integers(0, 2**32), share=st.floats(0.01, 1.5), binary=st.booleans())
@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_projection_onto_the_ball_within_the_box(
    norm: str, seed: int, share: float, binary: bool
) -> None:
    # Oracle: scipy's root finder on the multiplier of the ball, sample by sample; linf: two clips.
    x = images(4, (3, 3, 3), seed).double()
    x = x.round() if binary else x
    delta = random.normal(random.keys(seed + 1, 4), (3, 3, 3), torch.float64)
    radius = share * torch.tensor(
        {"l2": [0.5, 1, 2, 3], "l1": [1, 3, 5, 8], "linf": [0.1] * 4}[norm]
    )
    found = ball_in_box(delta, x, norm, radius.double())
    for d, v, start, r in zip(found, delta.numpy(), x.numpy(), radius.tolist(), strict=True):
        room, size = np.where(v > 0, 1 - start, start), np.abs(v)

        def kept(by: float, size: np.ndarray = size, room: np.ndarray = room) -> np.ndarray:
            shrunk = size / (1 + by) if norm == "l2" else np.maximum(size - by, 0)
            return np.minimum(shrunk, room)

        def excess(by: float, r: float = r) -> float:
            part = kept(by)
            return (np.sqrt((part**2).sum()) if norm == "l2" else part.sum()) - r

        if norm == "linf":
            expected = np.minimum(np.minimum(size, r), room)
        elif excess(0) <= 0:
            expected = kept(0)
        else:
            expected = kept(optimize.brentq(excess, 0, 1e6, xtol=1e-12, rtol=1e-14))
        np.testing.assert_allclose(d.numpy(), expected * np.sign(v), atol=1e-6)


def test_values_that_would_leave_the_box_do_not_step() -> None:
    # Oracle: closed form.
    point = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.5]])
    slope = torch.tensor([[-1.0, 2.0, -3.0, 4.0, 5.0]])
    assert movable(slope, point).tolist() == [[0, 2, -3, 0, 5]]


def test_reaches_the_boundary_where_the_box_binds_almost_everywhere() -> None:
    # Oracle: closed form. From a corner of the box every value can move one way only, and l1 must
    # move the ones of the largest weights from end to end, the last one in part.
    model = LinearModel(classes=2, dtype=torch.float64)
    y = torch.tensor([0, 1])
    slope = (model.weight[1 - y] - model.weight[y]).detach()
    x = (slope < 0).double()
    with torch.no_grad():
        gap = model(x).gather(1, y[:, None]) - model(x).gather(1, 1 - y[:, None])
    rate = slope.abs().flatten(1).sort(1, descending=True).values
    before = rate.cumsum(1) - rate
    least = ((gap - before) / rate).clamp(0, 1).sum(1)
    x_adv = fmn(model, x, y, norm="l1", steps=300)
    assert bool((predicted(model, x_adv) != y).all())
    assert bool((norm_of(x_adv - x, "l1") <= 1.02 * least).all())
