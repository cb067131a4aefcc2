from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from feint import data, models
from feint.attacks._boundary import nearest
from feint.attacks.fab import fab
from feint.core import random
from feint.core.errors import ConfigError, GradientError, RangeError
from feint.core.gradients import eot, nes, spsa
from feint.core.norms import distance
from tests.attacks.minimal import MinimalContract
from tests.tiny import (
    Counting,
    LinearModel,
    Round,
    StochasticLinear,
    TinyConv,
    behind,
    images,
    predicted,
)


class TestFAB(MinimalContract):
    attack = staticmethod(fab)
    kwargs: ClassVar = {"steps": 20}
    precise: ClassVar = {"steps": 100}

    def test_works_under_spsa(self, norm: str) -> None:
        # Oracle: the model behind the rounding: the distance of its boundary, within a factor of
        # three. 48 values from 32 pairs: the noise makes the slope √2.5 times too long.
        clean = LinearModel(dtype=torch.float64)
        model = behind(Round(64), clean)
        x = images(4).double()
        y = predicted(clean, x)
        x_adv = self.run(model, x, y, norm, gradient=spsa(32, sigma=0.05), overshoot=3.0)
        assert bool((predicted(model, x_adv) != y).all())
        # Rounding may move the boundary by half a level, 1/128 in every value.
        slack = {"linf": 1.0, "l2": 48**0.5, "l1": 48.0}[norm] / 128
        assert bool((distance(x_adv, x, norm) <= 3 * clean.distance(x, y, norm) + slack).all())


NORMS = pytest.mark.parametrize("norm", ["linf", "l2", "l1"])


@NORMS
@pytest.mark.parametrize("kwargs", [{"targets": "all"}, {"targets": 4, "restarts": 2}], ids=str)
def test_each_target_has_its_row_and_the_nearest_counts(norm: str, kwargs: dict[str, Any]) -> None:
    # Oracle: closed form; and counts: a clean pass, the rows, and one pass to move back.
    inner = LinearModel(dtype=torch.float64)
    model = Counting(inner)
    x = images(5, low=0.35, high=0.65).double()
    y = predicted(inner, x)
    x_adv = fab(model, x, y, norm=norm, steps=30, **kwargs)
    assert bool((predicted(inner, x_adv) != y).all())
    ratio = distance(x_adv, x, norm) / inner.distance(x, y, norm)
    assert bool(((ratio >= 1 - 1e-9) & (ratio <= 1.02)).all()), ratio
    rows = 5 * 4 * kwargs.get("restarts", 1)
    assert model.backwards == rows * 30
    assert 5 + rows * 31 < model.forwards <= 5 + rows * 32


@NORMS
def test_the_likeliest_class_alone(norm: str) -> None:
    # Oracle: closed form: the boundary to the class that comes second.
    model = LinearModel(dtype=torch.float64)
    x = images(6, low=0.35, high=0.65).double()
    y = predicted(model, x)
    with torch.no_grad():
        second = model(x).scatter(1, y[:, None], -torch.inf).argmax(1)
    size = distance(fab(model, x, y, norm=norm, targets=1, steps=30), x, norm)
    least = model.distances(x, y, norm).gather(1, second[:, None])[:, 0]
    # On the way to the second class the point may meet another one; it cannot be farther.
    assert bool((size <= 1.02 * least).all())
    assert bool((size >= model.distance(x, y, norm) * (1 - 1e-9)).all())


def test_untargeted_takes_one_forward_and_a_backward_pass_per_rival() -> None:
    # Oracle: counts. The backward passes share their forward pass.
    inner = LinearModel()
    model = Counting(inner)
    x = images(3)
    fab(model, x, predicted(inner, x), steps=6, refine=0)
    assert (model.forwards, model.backwards) == (3 + 3 * 7, 3 * 6 * 4)


def test_estimators_fold_the_rivals_into_the_batch() -> None:
    # Oracle: autograd: on a linear model the mean of draws of a noise-free model is the gradient.
    model = LinearModel(dtype=torch.float64)
    x = images(4).double()
    y = predicted(model, x)
    expected = fab(model, x, y, norm="l2", steps=5)
    torch.testing.assert_close(
        fab(model, x, y, norm="l2", steps=5, gradient=eot(2)), expected, rtol=0, atol=1e-9
    )
    rough = fab(model, x, y, norm="l2", steps=30, gradient=nes(400, sigma=0.1))
    assert bool((distance(rough, x, "l2") <= 1.2 * distance(expected, x, "l2")).all())


@NORMS
def test_the_walk_on_a_network_comes_near_a_long_search(norm: str) -> None:
    # Oracle: many restarts with many steps; the default is not far from what they find.
    model = TinyConv()
    x = images(4, (3, 6, 6)).double()
    y = predicted(model, x)
    usual = distance(fab(model, x, y, norm=norm, steps=40), x, norm)
    long = distance(fab(model, x, y, norm=norm, steps=80, restarts=2, targets="all"), x, norm)
    assert bool((usual > 0).all())
    assert float((usual / long).mean()) <= {"linf": 1.05, "l2": 1.05, "l1": 1.15}[norm]


def test_restarts_start_near_the_image_and_only_help() -> None:
    model = TinyConv()
    x = images(4, (3, 6, 6)).double()
    y = predicted(model, x)
    points: list[Tensor] = []
    many = fab(
        model, x, y, norm="l2", steps=8, restarts=3, spread=0.2,
        trace=lambda step, p, *rest: points.append(p),
    )  # fmt: skip
    once = fab(model, x, y, norm="l2", steps=8)
    assert bool((distance(many, x, "l2") <= distance(once, x, "l2") + 1e-12).all())
    starts = distance(points[1], x.repeat_interleave(3, 0), "l2").view(4, 3)
    assert bool((starts[:, 0] == 0).all())
    assert bool(((starts[:, 1:] > 0.1) & (starts[:, 1:] <= 0.2 + 1e-12)).all())


def test_the_trace_numbers_samples_not_rows() -> None:
    model = LinearModel()
    x = images(4)
    y = predicted(model, x)
    wrong = torch.where(torch.arange(4) == 1, (y + 1) % 5, y)
    seen: list[list[int]] = []
    fab(
        model, x, wrong, steps=3, targets=2,
        trace=lambda step, p, logits, loss, rows: seen.append(rows.tolist()),
    )  # fmt: skip
    assert seen[0] == [0, 1, 2, 3]
    assert seen[1] == [0, 0, 2, 2, 3, 3]  # sample 1 is adversarial as it is


def test_enough_is_enough() -> None:
    # Oracle: closed form. A sample leaves with all its rows once a point within `enough` is found.
    model = LinearModel(dtype=torch.float64)
    x = images(6, low=0.4, high=0.6).double()
    y = predicted(model, x)
    least = model.distance(x, y, "linf")
    enough = float(least.median()) * 1.01
    active: list[set[int]] = []
    x_adv = nearest(
        model, x, y, norm="linf", steps=40, restarts=1, alpha_max=0.1, overshoot=1.05, backward=0.9,
        spread=0.01, refine=0, targets="all", targeted=False, gradient=None, mask=None, seed=0,
        stop=None, enough=enough,
        trace=lambda step, p, logits, loss, rows: active.append(set(rows.tolist())),
    )  # fmt: skip
    near = (distance(x_adv, x, "linf") <= enough).nonzero()[:, 0].tolist()
    assert set(near) == set((least <= enough).nonzero()[:, 0].tolist())
    assert not active[-1] & set(near)
    assert active[-1] == set(range(6)) - set(near)


def test_independent_of_the_batch_with_targets_and_restarts() -> None:
    # Oracle: property, bit by bit.
    model = StochasticLinear()
    x, keys = images(4), random.keys(5, [9, 2, 7, 4])
    y = predicted(LinearModel(), x)
    kwargs: dict[str, Any] = {"steps": 4, "targets": 2, "restarts": 2, "gradient": eot(2)}
    whole = fab(model, x, y, seed=keys, **kwargs)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(fab(model, x[order], y[order], seed=keys[order], **kwargs), whole[order])


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"alpha_max": 1.5}, RangeError, "alpha_max is 1.5"),
        ({"backward": -0.1}, RangeError, "backward"),
        ({"spread": float("nan")}, RangeError, "spread"),
        ({"targets": 2, "targeted": True}, ConfigError, "leave one of them out"),
        ({"targets": True}, RangeError, "targets is True"),
        ({"restarts": 0}, RangeError, "restarts is 0"),
    ],
    ids=str,
)
def test_bad_settings_name_the_fix(
    kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = LinearModel()
    x = images(2)
    with pytest.raises(error, match=message):
        fab(model, x, predicted(model, x), **kwargs)


def test_a_structural_zero_gradient_is_an_error_with_targets() -> None:
    class Blunt(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return LinearModel()(x.round())

    with pytest.raises(GradientError, match="identically zero"):
        fab(Blunt(), images(3), predicted(Blunt(), images(3)), targets=2)


def test_a_walk_that_finds_nothing_is_let_go() -> None:
    # Oracle: the original's walk, whose pull towards the image does not fade, ends on each of these
    # images without an adversarial point.
    model = models.load("bundled:cifar10-resnet20").eval()
    batch = next(iter(data.load("bundled:cifar10").batches(15)))
    x, y = batch.x[[5, 13, 14]], batch.y[[5, 13, 14]]
    assert bool((predicted(model, x) == y).all())
    assert bool((predicted(model, fab(model, x, y, norm="l1", steps=30)) != y).all())
