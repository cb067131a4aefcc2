from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize
from torch import Tensor, nn

from feint.attacks._boxed import l1_ball_in_box, step_to_hyperplane
from feint.attacks._climb import checkpoints
from feint.attacks._targets import chunked, likeliest
from feint.attacks.apgd import apgd
from feint.core import random
from feint.core.errors import ConfigError, RangeError
from feint.core.gradients import backprop, eot
from feint.core.losses import margin
from feint.core.norms import distance
from tests.contracts.attack import AttackContract
from tests.tiny import Counting, LinearModel, StochasticLinear, TinyConv, images, predicted


class TestAPGD(AttackContract):
    attack = staticmethod(apgd)
    kwargs: ClassVar = {"steps": 5, "sparsity": 0.02}
    random = True


# --- budget attacks on linear models --------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("kwargs", [{}, {"targeted": True}, {"targets": "all"}], ids=str)
def test_succeeds_if_and_only_if_eps_exceeds_the_distance(
    norm: str, kwargs: dict[str, Any]
) -> None:
    # Oracle: closed form. Two classes, so that every loss leads to the one boundary.
    model = LinearModel(classes=2)
    x = images(3, low=0.4, high=0.6)
    y = predicted(model, x)
    label = 1 - y if kwargs.get("targeted") else y
    loss = "margin" if "targets" in kwargs else "cross_entropy"
    for i, least in enumerate(model.distance(x, y, norm).tolist()):
        one = slice(i, i + 1)
        for factor in (0.98, 1.02):
            x_adv = apgd(
                model, x[one], label[one], eps=factor * least, norm=norm, loss=loss,
                seed=random.keys(0, [i]), **kwargs,
            )  # fmt: skip
            assert bool(predicted(model, x_adv) != y[one]) is (factor > 1)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("loss", ["dlr", "margin"])
def test_targets_find_the_nearest_of_many_boundaries(norm: str, loss: str) -> None:
    # Oracle: closed form. The untargeted gradient may lead to another boundary than the nearest;
    # with a row for every class, along z_t − z_y, the nearest one cannot be missed.
    model = LinearModel(classes=8)
    x = images(3, low=0.45, high=0.55)
    y = predicted(model, x)
    for i, least in enumerate(model.distance(x, y, norm).tolist()):
        one = slice(i, i + 1)
        fell = [
            bool(
                predicted(
                    model,
                    apgd(
                        model, x[one], y[one], eps=factor * least, norm=norm, loss=loss,
                        targets="all",
                    ),
                )
                != y[one]
            )
            for factor in (0.98, 1.02)
        ]  # fmt: skip
        assert fell == [False, True]


# --- the algorithm --------------------------------------------------------------------------------


def test_checkpoints_follow_the_paper() -> None:
    # Oracle: Croce & Hein 2020, §3: p₁ = 0.22, p_{j+1} = p_j + max(p_j − p_{j−1} − 0.03, 0.06).
    p, found = [0.0, 0.22], [22]
    while p[-1] + max(p[-1] - p[-2] - 0.03, 0.06) <= 1 + 1e-9:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
        found.append(math.ceil(round(p[-1] * 100, 6)))
    assert checkpoints(100) == found == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(1) == [1]


class Pixels(nn.Module):
    """Logits that are the image itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


WEIGHT = torch.logspace(-1.5, 1.5, 48, dtype=torch.float64)
PEAK = random.uniform(random.keys(7, 1), (48,), 0.3, 0.7, torch.float64)[0]


def hill(logits: Tensor, y: Tensor) -> Tensor:
    """A quadratic hill with very different widths, which a long step leaps over."""
    return -(WEIGHT * (logits - PEAK).square()).sum(-1)


def by_hand(start: np.ndarray, eps: float, steps: int, norm: str) -> list[np.ndarray]:
    """Algorithm 1 of Croce & Hein 2020 for one sample, in numpy, in the words of the paper."""
    weight, top = WEIGHT.numpy(), PEAK.numpy()

    def f(x: np.ndarray) -> float:
        return -float((weight * (x - top) ** 2).sum())

    def unit(x: np.ndarray) -> np.ndarray:
        g = -2 * weight * (x - top)
        return np.sign(g) if norm == "linf" else g / np.linalg.norm(g)

    def onto(x: np.ndarray) -> np.ndarray:
        d = x - start
        if norm == "linf":
            d = np.clip(d, -eps, eps)
        elif np.linalg.norm(d) > eps:
            d = d * eps / np.linalg.norm(d)
        return np.clip(start + d, 0, 1)

    marks = [0, *checkpoints(steps)]
    eta, path = 2 * eps, [start]
    x_old, x = start, onto(start + eta * unit(start))
    path.append(x)
    values, best, best_x = [f(start), f(x)], max(f(start), f(x)), max(start, x, key=f)
    halved, best_before = True, -math.inf
    for k in range(1, steps):
        if k in marks:
            last = marks[marks.index(k) - 1]
            rises = sum(values[i + 1] > values[i] for i in range(last, k))
            halve = rises <= 0.75 * (k - last) or (not halved and best_before >= best)
            halved, best_before = halve, best
            if halve:
                eta, x = eta / 2, best_x
                values[k] = best
        z = onto(x + eta * unit(x))
        new = onto(x + 0.75 * (z - x) + 0.25 * (x - x_old))
        x_old, x = x, new
        path.append(x)
        values.append(f(x))
        if f(x) > best:
            best, best_x = f(x), x
    return path


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_ascent_is_algorithm_1(norm: str) -> None:
    # Oracle: an independent implementation in numpy, sample by sample.
    x = images(5).double()
    eps, steps = {"linf": 0.2, "l2": 1.0}[norm], 60
    seen: list[Tensor] = []
    x_adv = apgd(
        Pixels(), x, torch.full((5,), 47), eps=eps, norm=norm, steps=steps, loss=hill,
        random_start=False, stop="never", trace=lambda step, p, *rest: seen.append(p),
    )  # fmt: skip
    paths = [by_hand(one, eps, steps, norm) for one in x.flatten(1).numpy()]
    got = torch.stack(seen).flatten(2).numpy()
    assert got.shape[0] == steps + 1
    # The ball that it projects onto is smaller by a millionth, for the rounding of float32.
    np.testing.assert_allclose(got, np.stack(paths, 1), rtol=0, atol=1e-5)
    assert x_adv.shape == x.shape
    # The samples went their own ways: their steps were halved at different checkpoints.
    moves = np.abs(np.diff(got, axis=0)).max(2)
    assert len({tuple(np.round(m / m[0], 2)) for m in moves.T}) == 5


def test_a_flat_loss_halves_at_every_checkpoint() -> None:
    # Oracle: closed form. The loss never rises; its gradient is constant. Each checkpoint halves
    # the step and returns to the first point.
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            u = x.flatten(1).sum(1)
            return torch.stack([u, u.detach() + 1], 1)

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return logits[..., 0] - logits[..., 0].detach()

    x = torch.full((2, 1, 1, 1), 0.5, dtype=torch.float64)
    seen: list[float] = []
    apgd(
        Flat(), x, torch.ones(2, dtype=torch.int64), eps=0.4, step_size=0.1, steps=100,
        random_start=False, stop="never", loss=loss,
        trace=lambda step, p, *rest: seen.append(float(p[0])),
    )  # fmt: skip
    for j, mark in enumerate(checkpoints(100)):
        if mark < 100:  # a step from x, and a quarter of what came before, which ended at eps
            expected = 0.5 + 0.75 * 0.1 / 2 ** (j + 1) + 0.25 * (0.5 - seen[mark - 1])
            assert seen[mark + 1] == pytest.approx(expected, abs=1e-12)


# --- targets --------------------------------------------------------------------------------------


def test_targets_are_the_best_of_the_targeted_attacks() -> None:
    # Oracle: the targeted attacks one by one, on the classes that the logits name.
    model = TinyConv()
    x = images(6, (3, 6, 6)).double()
    y = predicted(model, x)
    kwargs: dict[str, Any] = {"eps": 0.01, "steps": 6, "random_start": False, "stop": "never"}
    both = apgd(model, x, y, targets=2, **kwargs)
    with torch.no_grad():
        order = model(x).scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
    runs = []
    for j in (0, 1):
        one = apgd(model, x, order[:, j], targeted=True, **kwargs)
        with torch.no_grad():
            logits = model(one)
        value = logits.log_softmax(1).gather(1, order[:, j : j + 1])[:, 0]
        runs.append((one, (logits.argmax(1) != y).double() * 1e3 + value))
    expected = torch.where((runs[0][1] >= runs[1][1]).view(-1, 1, 1, 1), runs[0][0], runs[1][0])
    torch.testing.assert_close(both, expected, rtol=0, atol=1e-12)


def test_targets_and_restarts_are_rows_of_the_batch() -> None:
    # Oracle: counts. One clean pass, then rows = samples · targets · restarts.
    inner = TinyConv()
    model = Counting(inner)
    x = images(3, (3, 6, 6)).double()
    y = predicted(inner, x)
    active: list[list[int]] = []
    apgd(
        model, x, y, eps=1e-4, steps=4, targets=2, restarts=3, stop="never",
        trace=lambda step, p, logits, loss, rows: active.append(rows.tolist()),
    )  # fmt: skip
    assert (model.forwards, model.backwards) == (3 + 18 * 5, 18 * 4)
    assert active == [[0, 1, 2]] + [[i for i in range(3) for _ in range(6)]] * 5


def test_a_sample_leaves_with_all_its_targets() -> None:
    model = LinearModel()
    x = images(6)
    y = predicted(model, x)
    wrong = torch.where(torch.arange(6) < 2, (y + 1) % 5, y)
    active: list[list[int]] = []
    apgd(
        model, x, wrong, eps=0.05, steps=10, step_size=0.005, targets="all", random_start=False,
        trace=lambda step, p, logits, loss, rows: active.append(rows.tolist()),
    )  # fmt: skip
    assert active[0] == list(range(6))
    assert set(active[1]) == {2, 3, 4, 5}  # two were misclassified as they were
    for rows in active[1:]:
        assert all(rows.count(i) == 4 for i in set(rows))


def test_more_targets_than_classes_are_all_of_them() -> None:
    model = LinearModel()
    x = images(3)
    y = predicted(model, x)
    kwargs: dict[str, Any] = {"eps": 0.01, "steps": 3, "stop": "never"}
    assert torch.equal(
        apgd(model, x, y, targets=99, **kwargs), apgd(model, x, y, targets="all", **kwargs)
    )


def test_the_likeliest_classes_of_several_draws() -> None:
    # Oracle: the mean of the softmax.
    logits = random.normal(random.keys(3, 4), (7, 6), torch.float64) * 3
    y = torch.tensor([0, 1, 2, 5])
    mean = logits.softmax(-1).mean(1).scatter(1, y[:, None], -1.0)
    assert torch.equal(likeliest(logits, y, 3), mean.argsort(1, descending=True)[:, :3])
    assert torch.equal(likeliest(logits + 50, y, "all"), mean.argsort(1, descending=True)[:, :5])


def test_chunks_change_nothing() -> None:
    # Oracle: the estimator asked at once.
    model, x = LinearModel(), images(7)
    y, keys = predicted(model, x), random.keys(0, 7)
    whole = backprop(model, x, y, margin, keys)
    parts = chunked(backprop, 3)(model, x, y, margin, keys)
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("kwargs", "classes", "error", "message"),
    [
        ({"loss": "dlr"}, 2, ConfigError, "at least 3 classes"),
        ({"loss": "dlr", "targets": 2}, 3, ConfigError, "at least 4 classes"),
        ({"loss": "dlr", "targeted": True}, 3, ConfigError, "at least 4 classes"),
        ({"targets": 2, "targeted": True}, 5, ConfigError, "leave one of them out"),
        ({"targets": 0}, 5, RangeError, "whole number ≥ 1"),
        ({"targets": "most"}, 5, RangeError, "'all'"),
        ({"sparsity": 0.0}, 5, RangeError, "share"),
    ],
    ids=str,
)
def test_bad_settings_name_the_fix(
    kwargs: dict[str, Any], classes: int, error: type[Exception], message: str
) -> None:
    model = LinearModel(classes=classes)
    x = images(2)
    with pytest.raises(error, match=message):
        apgd(model, x, predicted(model, x), steps=2, **kwargs)


def test_targets_under_eot() -> None:
    # Oracle: the noise-free model.
    model, clean = StochasticLinear(dtype=torch.float64), LinearModel(dtype=torch.float64)
    x = images(5).double()
    y = predicted(clean, x)
    x_adv = apgd(
        model, x, y, eps=0.3, steps=8, targets=3, loss="dlr", gradient=eot(4), stop="success"
    )
    assert bool((predicted(clean, x_adv) != y).all())
    single = apgd(
        model, x[3:4], y[3:4], eps=0.3, steps=8, targets=3, loss="dlr", gradient=eot(4),
        stop="success", seed=random.keys(0, [3]),
    )  # fmt: skip
    torch.testing.assert_close(single[0], x_adv[3], rtol=0, atol=1e-9)


# --- projections ----------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32), share=st.floats(0.01, 1.5), binary=st.booleans())
def test_projection_onto_the_l1_ball_within_the_box(seed: int, share: float, binary: bool) -> None:
    # Oracle: scipy's root finder on the threshold λ, sample by sample.
    x = images(4, (3, 3, 3), seed).double()
    x = x.round() if binary else x
    delta = random.normal(random.keys(seed + 1, 4), (3, 3, 3), torch.float64)
    radius = share * 5
    found = l1_ball_in_box(delta, x, radius)
    for d, v, start in zip(found, delta, x, strict=True):
        room = np.where(v > 0, 1 - start, start)

        def kept(shift: float, v: Tensor = v, room: np.ndarray = room) -> np.ndarray:
            return np.minimum(np.maximum(np.abs(v.numpy()) - shift, 0), room)

        shift = 0.0
        if kept(0).sum() > radius:
            shift = optimize.brentq(lambda s: kept(s).sum() - radius, 0, 10, xtol=1e-14)
        np.testing.assert_allclose(d.numpy(), kept(shift) * np.sign(v.numpy()), atol=1e-9)


@given(seed=st.integers(0, 2**32), share=st.floats(0.02, 1.3), binary=st.booleans())
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_step_to_a_hyperplane_within_the_box(
    norm: str, seed: int, share: float, binary: bool
) -> None:
    # Oracle: linear programming (linf, l1) and a root finder (l2), both of scipy.
    x = images(3, (1, 3, 4), seed).double()
    x = torch.where(images(3, (1, 3, 4), seed + 2) < 0.5, x.round(), x) if binary else x
    slope = random.normal(random.keys(seed + 1, 3), (1, 3, 4), torch.float64)
    most = (torch.where(slope > 0, 1 - x, x) * slope.abs()).flatten(1).sum(1)
    least = (torch.where(slope < 0, 1 - x, x) * slope.abs()).flatten(1).sum(1)
    sign = torch.tensor([1.0, -1.0, 1.0]).double()
    need = share * torch.where(sign > 0, most, -least)
    found = step_to_hyperplane(x, slope, need, norm)
    assert bool(((x + found >= -1e-12) & (x + found <= 1 + 1e-12)).all())
    reached = (found * slope).flatten(1).sum(1)
    expected = torch.where(sign > 0, torch.minimum(need, most), torch.maximum(need, -least))
    torch.testing.assert_close(reached, expected, rtol=1e-9, atol=1e-9)
    for d, w, start, target in zip(found, slope, x, expected, strict=True):
        size = distance(d[None], torch.zeros_like(d[None]), norm).item()
        assert (
            size <= smallest(w.numpy().ravel(), start.numpy().ravel(), float(target), norm) + 1e-6
        )


def smallest(w: np.ndarray, x: np.ndarray, need: float, norm: str) -> float:
    """Least norm of a step d in the box with ⟨w, d⟩ = need."""
    n = len(w)
    if norm == "l2":
        w, need = w * np.sign(need), abs(need)

        def step(t: float) -> np.ndarray:
            return np.clip(x + t * w, 0, 1) - x

        if step(1e6) @ w <= need + 1e-9:
            return float(np.linalg.norm(step(1e6)))
        return float(np.linalg.norm(step(optimize.brentq(lambda t: step(t) @ w - need, 0, 1e6))))
    extra = 1 if norm == "linf" else n
    bound = np.ones((n, 1)) if norm == "linf" else np.eye(n)
    rows = np.block([[np.eye(n), -bound], [-np.eye(n), -bound]])
    slack = 1e-9 * (1 + abs(need))
    rows = np.vstack([rows, np.r_[w, np.zeros(extra)], -np.r_[w, np.zeros(extra)]])
    limit = np.r_[np.zeros(2 * n), need + slack, -need + slack]
    found = optimize.linprog(
        np.r_[np.zeros(n), np.ones(extra)],
        A_ub=rows,
        b_ub=limit,
        bounds=[(-v, 1 - v) for v in x] + [(0, None)] * extra,
    )
    assert found.status == 0
    return float(found.fun)
