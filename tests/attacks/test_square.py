from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from feint.attacks._windows import bump, inside, place, share_of_window, side
from feint.attacks.square import square
from feint.core import random
from feint.core.errors import RangeError
from feint.core.losses import margin
from feint.core.norms import distance
from tests.contracts.attack import AttackContract
from tests.contracts.attack_harness import HostSyncs
from tests.tiny import Counting, Detach, LinearModel, StochasticLinear, behind, images, predicted


class TestSquare(AttackContract):
    attack = staticmethod(square)
    kwargs: ClassVar = {"queries": 25}
    random = True

    def test_pixels_at_the_ends_move_inwards(self, norm: str) -> None:
        # A random search needs more queries than the others need steps.
        type(self).kwargs = {"queries": 400}
        try:
            super().test_pixels_at_the_ends_move_inwards(norm)
        finally:
            type(self).kwargs = {"queries": 25}


NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])


@NORMS
@pytest.mark.parametrize("queries", [1, 2, 65, 130])
def test_queries_are_all_and_only_forward_passes(norm: str, queries: int) -> None:
    # Oracle: counts.
    inner = LinearModel()
    model = Counting(inner)
    x = images(3)
    seen: list[int] = []
    square(
        model, x, predicted(inner, x), norm=norm, eps=1e-3, queries=queries, restarts=2,
        trace=lambda step, *rest: seen.append(step),
    )  # fmt: skip
    assert (model.forwards, model.backwards) == (3 * 2 * queries, 0)
    assert seen == list(range(queries))


@NORMS
def test_needs_scores_only(norm: str) -> None:
    # Oracle: the module that cuts the graph, and one that objects to gradients.
    class NoGradient(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            return x

    model = behind(nn.Sequential(Detach(), NoGradient()), LinearModel())
    x = images(4, low=0.4, high=0.6)
    y = predicted(LinearModel(), x)
    x_adv = square(model, x, y, norm=norm, eps={"linf": 0.1, "l2": 0.6}[norm], queries=300)
    assert bool((predicted(LinearModel(), x_adv) != y).all())


def walk(norm: str, eps: float, **kwargs: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    model = LinearModel(shape=(3, 8, 8))
    x = images(4, (3, 8, 8), low=0.3, high=0.7)
    y = predicted(model, x)
    points: list[Tensor] = []
    values: list[Tensor] = []

    def trace(step: int, p: Tensor, logits: Tensor, loss: Tensor, rows: Tensor) -> None:
        points.append(p)
        values.append(margin(logits[:, 0], y))

    x_adv = square(model, x, y, norm=norm, eps=eps, stop="never", trace=trace, **kwargs)
    assert torch.equal(margin(model(x_adv), y), torch.stack(values).amax(0))
    return x, points, values


def test_every_query_lies_at_plus_or_minus_eps() -> None:
    # Oracle: closed form. Where the box does not bind, each value is x ± eps.
    x, points, _ = walk("linf", 0.05, queries=80)
    for p in points:
        torch.testing.assert_close((p - x).abs(), torch.full_like(x, 0.05), rtol=0, atol=1e-6)
    first = (points[0] - x).sign()
    assert bool((first == first[:, :, :1]).all())  # vertical stripes


def test_every_query_spends_the_l2_budget() -> None:
    # Oracle: closed form.
    x, points, _ = walk("l2", 0.5, queries=80)
    for p in points:
        spent = distance(p, x, "l2")
        assert bool(((spent <= 0.5) & (spent >= 0.5 * (1 - 1e-5))).all())


@NORMS
def test_a_query_changes_one_window_of_the_best_point(norm: str) -> None:
    # Oracle: property. What differs from the best point so far fits a square of the scheduled side
    # (l2: two of them, up to the common factor that spends the budget).
    _, points, values = walk(norm, 0.1, queries=60, share=0.5)
    best, top = points[0], values[0]
    for query, (p, value) in enumerate(zip(points[1:], values[1:], strict=True)):
        length = side(share_of_window(query, 60, 0.5), 8, 8, norm)
        if norm == "linf":
            changed = (p != best).any(1)
            height = changed.any(2).int()
            width = changed.any(1).int()
            for line in (height, width):
                for row in line:
                    found = row.nonzero()
                    if len(found):
                        assert int(found.max() - found.min()) < length
        better = value >= top
        best = torch.where(better.view(-1, 1, 1, 1), p, best)
        top = torch.where(better, value, top)


@given(
    seed=st.integers(0, 2**40),
    eps=st.floats(0.01, 0.5),
    queries=st.integers(1, 40),
    norm=st.sampled_from(["linf", "l2"]),
)
def test_more_queries_are_never_worse(seed: int, eps: float, queries: int, norm: str) -> None:
    # Oracle: property. The first queries are the same when the schedule is; the best only rises.
    model = LinearModel()
    x = images(3, seed=seed)
    y = predicted(model, x)
    kwargs: dict[str, Any] = {"eps": eps, "norm": norm, "stop": "never", "schedule": 50}
    few = margin(model(square(model, x, y, queries=queries, seed=seed, **kwargs)), y)
    more = margin(model(square(model, x, y, queries=queries + 9, seed=seed, **kwargs)), y)
    assert bool((more >= few).all())


def test_a_plateau_is_crossed() -> None:
    # Oracle: closed form. Scores in whole steps are mostly flat: changes that leave them equal
    # stay, or else the search would hardly ever move.
    inner = LinearModel(scale=0.2)
    model = behind(nn.Identity(), inner)

    def coarse(x: Tensor) -> Tensor:
        return (model(x) * 4).round() / 4

    x = images(6, low=0.45, high=0.55)
    y = predicted(inner, x)
    x_adv = square(coarse, x, y, eps=0.12, queries=400)
    assert bool((coarse(x_adv).argmax(1) != y).all())


def test_the_draws_of_a_query_are_averaged() -> None:
    # Oracle: the shape that the trace sees; and the draws follow the sample.
    inner = StochasticLinear()
    x = images(3)
    shapes: set[tuple[int, ...]] = set()
    x_adv = square(
        lambda x, keys: inner(x, keys=keys), x, predicted(LinearModel(), x), queries=5, draws=6,
        stop="never",
        trace=lambda step, p, logits, *rest: shapes.add(tuple(logits.shape)),
    )  # fmt: skip
    assert shapes == {(3, 6, 5)}
    again = square(
        lambda x, keys: inner(x, keys=keys), x[1:2], predicted(LinearModel(), x)[1:2], queries=5,
        draws=6, seed=random.keys(0, [1]), stop="never",
    )  # fmt: skip
    assert torch.equal(again, x_adv[1:2])


@NORMS
def test_no_host_synchronisation_within_a_query(norm: str) -> None:
    # Oracle: count of waiting operations.
    model = LinearModel()
    x = images(4)
    y = predicted(model, x)

    def waits(queries: int, stop: str) -> int:
        with HostSyncs() as syncs:
            square(model, x, y, norm=norm, eps=1e-4, queries=queries, stop=stop)
        return syncs.count

    assert waits(30, "never") == waits(3, "never") > 0
    assert waits(30, "success") - waits(3, "success") == 27


# --- the parts ------------------------------------------------------------------------------------


def test_the_schedule_of_the_paper() -> None:
    # Oracle: Andriushchenko et al. 2020, §4: p is halved at 10, 50, 200, 500, 1000, 2000, 4000,
    # 6000, 8000 of 10 000 queries; other budgets are rescaled.
    halvings = [10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000]
    for j, at in enumerate(halvings):
        assert share_of_window(at, 10_000, 0.8) == 0.8 / 2**j
        assert share_of_window(at + 1, 10_000, 0.8) == 0.8 / 2 ** (j + 1)
    assert share_of_window(500, 1000, 0.8) == share_of_window(5000, 10_000, 0.8)
    assert side(0.8, 32, 32, "linf") == round(math.sqrt(0.8 * 1024)) == 29
    assert side(1e-6, 32, 32, "linf") == 1
    assert [side(p, 32, 32, "l2") for p in (0.1, 0.0001)] == [11, 3]
    assert side(1.0, 4, 6, "linf") == 4
    assert [side(1.0, h, 5, "l2") for h in (1, 2, 4)] == [1, 1, 3]


def by_hand(length: int) -> np.ndarray:
    """Algorithm 3 of the paper's supplement, one square after the other."""

    def peak(h: int, w: int) -> np.ndarray:
        out = np.zeros((h, w))
        i, j = h // 2, w // 2
        for m in range(max(i, j) + 1):
            for a in range(h):
                for b in range(w):
                    if abs(a - i) <= m and abs(b - j) <= m:
                        out[a, b] += 1 / (m + 1) ** 2
        return out / np.linalg.norm(out) if h else out

    out = np.vstack([peak(length // 2, length), -peak(length - length // 2, length)])
    return out / np.linalg.norm(out)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 9])
def test_a_bump_is_two_peaks(length: int) -> None:
    # Oracle: numpy, pixel by pixel.
    np.testing.assert_allclose(bump(length).numpy(), by_hand(length), atol=1e-12)


def test_windows_and_patterns_lie_where_they_should() -> None:
    # Oracle: slices.
    top, left = torch.tensor([0, 3]), torch.tensor([2, 1])
    turned = torch.tensor([False, True])
    pattern = torch.arange(9.0).view(3, 3) + 1
    mask, placed = inside(top, left, 3, 6, 5), place(pattern, turned, top, left, 6, 5)
    for i, expected in enumerate((pattern, pattern.T)):
        window = torch.zeros(6, 5)
        window[top[i] : top[i] + 3, left[i] : left[i] + 3] = expected
        assert torch.equal(placed[i, 0], window)
        assert torch.equal(mask[i, 0], window > 0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"queries": 0}, "queries is 0"),
        ({"draws": 0}, "draws is 0"),
        ({"schedule": 0}, "schedule is 0"),
        ({"share": 1.5}, "share is 1.5"),
    ],
    ids=str,
)
def test_bad_settings_name_the_fix(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(RangeError, match=message):
        square(LinearModel(), images(2), torch.tensor([0, 1]), **kwargs)
