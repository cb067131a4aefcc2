"""Gradient attacks on linear models, where the least successful budget is known exactly.

Oracle: closed form. |z_y − z_j| / ‖w_y − w_j‖_q is the distance to the boundary, q dual to the
norm; two classes, so that the loss' gradient points along w_y − w_j whatever the point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from feint.attacks import bim, fgsm, mi_fgsm, pgd
from feint.core import random
from feint.core.errors import GradientError, RangeError
from feint.core.norms import distance
from tests.tiny import Counting, LinearModel, TinyConv, images, predicted

CASES = [
    # attack, keywords, step size as a share of eps (None: the default), norms
    (fgsm, {}, None, ("linf", "l2")),
    (bim, {}, None, ("linf", "l2")),
    (mi_fgsm, {}, None, ("linf", "l2")),
    (pgd, {"random_start": False}, None, ("linf", "l2")),
    (pgd, {}, 0.25, ("linf", "l2")),
    (pgd, {"direction": "gradient", "steps": 200}, 4.0, ("linf",)),
    (pgd, {"steps": 200}, 0.25, ("l1",)),
]


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(
    ("attack", "kwargs", "share", "norm"),
    [(*case[:3], norm) for case in CASES for norm in case[3]],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_succeeds_if_and_only_if_eps_exceeds_the_distance(
    attack: Callable[..., Tensor],
    kwargs: dict[str, Any],
    share: float | None,
    norm: str,
    targeted: bool,
) -> None:
    model = LinearModel(classes=2)
    x = images(5, low=0.4, high=0.6)
    y = predicted(model, x)
    label = 1 - y if targeted else y
    for i, least in enumerate(model.distance(x, y, norm).tolist()):
        one = slice(i, i + 1)
        for factor in (0.98, 1.02):
            eps = factor * least
            step = {} if share is None else {"step_size": share * eps}
            x_adv = attack(
                model, x[one], label[one], eps=eps, norm=norm, targeted=targeted,
                seed=random.keys(0, [i]), **kwargs, **step,
            )  # fmt: skip
            fell = bool(predicted(model, x_adv) != y[one])
            assert fell is (factor > 1)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("loss", ["cross_entropy", "margin", "dlr"])
def test_never_succeeds_below_the_distance_and_mostly_above(norm: str, loss: str) -> None:
    # With five classes the gradient may lead to another boundary than the nearest, but none of
    # them is nearer than the closed form says, and at 1.5 times the distance most samples fall.
    model = LinearModel(classes=5)
    x = images(12, low=0.4, high=0.6)
    y = predicted(model, x)
    least = model.distance(x, y, norm)
    fell = {}
    for factor in (0.98, 1.5):
        x_adv = torch.cat(
            [
                pgd(model, x[i : i + 1], y[i : i + 1], eps=factor * float(e), norm=norm, loss=loss)
                for i, e in enumerate(least)
            ]
        )
        fell[factor] = float((predicted(model, x_adv) != y).float().mean())
    assert fell[0.98] == 0
    assert fell[1.5] >= 0.9


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_fgsm_is_one_step_of_pgd(norm: str) -> None:
    model = TinyConv()
    x = images(6, (3, 6, 6)).double()
    y = predicted(model, x)
    eps = {"linf": 0.05, "l2": 0.3, "l1": 1.0}[norm]
    expected = pgd(model, x, y, eps=eps, norm=norm, steps=1, random_start=False, step_size=eps)
    assert torch.equal(fgsm(model, x, y, eps=eps, norm=norm), expected)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("stop", ["success", "never"])
def test_mi_fgsm_without_momentum_is_bim(norm: str, stop: str) -> None:
    model = TinyConv()
    x = images(6, (3, 6, 6)).double()
    y = predicted(model, x)
    kwargs = {"eps": 0.08, "norm": norm, "steps": 5, "stop": stop}
    assert torch.equal(mi_fgsm(model, x, y, decay=0.0, **kwargs), bim(model, x, y, **kwargs))


# --- updates by hand ------------------------------------------------------------------------------


def by_hand(
    model: LinearModel, x: Tensor, y: Tensor, steps: int, update: Callable[..., Any]
) -> list[np.ndarray]:
    """The points of an attack, from the softmax gradient of a linear model in numpy."""
    weight, bias = (t.detach().numpy() for t in (model.weight, model.bias))
    start = point = x.numpy()
    points, state = [point], None
    for _ in range(steps):
        logits = np.einsum("bchw,kchw->bk", point, weight) + bias
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        g = np.einsum("bk,kchw->bchw", p - np.eye(len(bias))[y.numpy()], weight)
        point, state = update(point, g, start, state)
        points.append(point)
    return points


def norms(g: np.ndarray, order: int) -> np.ndarray:
    return np.linalg.norm(g.reshape(len(g), -1), order, axis=1).reshape(-1, 1, 1, 1)


def traced(attack: Callable[..., Tensor], *args: Any, **kwargs: Any) -> list[np.ndarray]:
    points: list[np.ndarray] = []
    attack(*args, trace=lambda step, p, *rest: points.append(p.numpy()), **kwargs)
    return points


@pytest.fixture
def sample() -> tuple[LinearModel, Tensor, Tensor]:
    model = LinearModel(dtype=torch.float64, scale=0.3)
    x = images(4).double()
    return model, x, predicted(model, x)


def close(got: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_preset_ace_is_s0_pgd(sample: tuple[LinearModel, Tensor, Tensor]) -> None:
    # S0's `pgd_carlini`: x += 0.1·g/‖g‖₂ in normalised units (std 0.2257), clip 0.031, clip [0, 1].
    def update(point: Any, g: Any, start: Any, _: Any) -> tuple[Any, None]:
        point = point + 0.1 * 0.2257 * g / norms(g, 2)
        return np.clip(np.clip(point, start - 0.031, start + 0.031), 0, 1), None

    model, x, y = sample
    got = traced(pgd, model, x, y, preset="ace", steps=5)
    close(got, by_hand(model, x, y, 5, update))
    assert np.abs(got[5] - got[0]).max() == pytest.approx(0.031, abs=1e-12)  # the clip was at work


def test_preset_ace_takes_every_step_from_x(sample: tuple[LinearModel, Tensor, Tensor]) -> None:
    model, x, y = sample
    counting = Counting(model)
    pgd(counting, x, y, preset="ace", steps=7)
    assert (counting.forwards, counting.backwards) == (4 * 8, 4 * 7)


def test_preset_qiu_of_pgd_is_the_raw_step(sample: tuple[LinearModel, Tensor, Tensor]) -> None:
    # S1: x −= 0.1·∇ CE(f(x), target), clip [0, 1]; the RMS bound of 0.05 does not bind here.
    model, x, y = sample
    target = (y + 1) % 5

    def update(point: Any, g: Any, start: Any, _: Any) -> tuple[Any, None]:
        return np.clip(point - 0.1 * g, 0, 1), None

    got = traced(pgd, model, x, target, preset="qiu", eps=6.0, steps=3, stop="never")
    close(got, by_hand(model, x, target, 3, update))


def test_preset_qiu_of_pgd_bounds_the_rms_at_299_pixels() -> None:
    x = torch.full((1, 3, 299, 299), 0.5)
    model = LinearModel(classes=2, shape=(3, 299, 299))
    target = 1 - predicted(model, x)
    x_adv = pgd(model, x, target, preset="qiu", steps=2, step_size=1e4, stop="never")
    assert float((x_adv - x).double().square().mean().sqrt()) == pytest.approx(0.05, rel=1e-4)


def test_preset_qiu_of_bim_is_s1_ifgsm(sample: tuple[LinearModel, Tensor, Tensor]) -> None:
    # cleverhans 2.1 BasicIterativeMethod as S1 calls it: ε 0.03, ten steps of ε/10, targeted.
    model, x, y = sample
    target = (y + 1) % 5

    def update(point: Any, g: Any, start: Any, _: Any) -> tuple[Any, None]:
        point = point - 0.003 * np.sign(g)
        return np.clip(np.clip(point, start - 0.03, start + 0.03), 0, 1), None

    close(traced(bim, model, x, target, preset="qiu"), by_hand(model, x, target, 10, update))


def test_mi_fgsm_update(sample: tuple[LinearModel, Tensor, Tensor]) -> None:
    # Dong et al., Algorithm 1: g ← μ·g + ∇/‖∇‖₁, x ← clip(x + α·sign(g)).
    def update(point: Any, g: Any, start: Any, velocity: Any) -> tuple[Any, Any]:
        velocity = g / norms(g, 1) + (0 if velocity is None else 0.7 * velocity)
        point = point + 0.02 * np.sign(velocity)
        return np.clip(np.clip(point, start - 0.05, start + 0.05), 0, 1), velocity

    model, x, y = sample
    got = traced(mi_fgsm, model, x, y, eps=0.05, steps=4, step_size=0.02, decay=0.7, stop="never")
    close(got, by_hand(model, x, y, 4, update))


def test_mi_fgsm_momentum_in_l2(sample: tuple[LinearModel, Tensor, Tensor]) -> None:
    def update(point: Any, g: Any, start: Any, velocity: Any) -> tuple[Any, Any]:
        velocity = g / norms(g, 1) + (0 if velocity is None else velocity)
        return np.clip(point + 0.01 * velocity / norms(velocity, 2), 0, 1), velocity

    model, x, y = sample
    got = traced(mi_fgsm, model, x, y, norm="l2", eps=1.0, steps=3, step_size=0.01, stop="never")
    close(got, by_hand(model, x, y, 3, update))


def test_mi_fgsm_refuses_a_negative_decay() -> None:
    with pytest.raises(RangeError, match="decay is -1"):
        mi_fgsm(LinearModel(), images(1), torch.tensor([0]), decay=-1)


# --- start, restarts, budget ----------------------------------------------------------------------


def test_random_start_is_uniform_in_the_cube() -> None:
    # Oracle: scipy's Kolmogorov–Smirnov test against the uniform law.
    x = torch.full((40, 3, 4, 4), 0.5)
    start = traced(pgd, LinearModel(), x, torch.zeros(40, dtype=torch.int64), eps=0.1, steps=1)[0]
    assert stats.kstest((start.ravel() - 0.5) / 0.1, "uniform", (-1, 2)).pvalue > 0.01


def test_restarts_are_folded_into_the_batch_and_never_worse() -> None:
    model = TinyConv()
    x = images(6, (3, 6, 6)).double()
    y = predicted(model, x)
    kwargs = {"eps": 0.02, "steps": 3, "stop": "never", "loss": "margin"}
    calls: list[int] = []
    handle = model.register_forward_hook(lambda m, args, out: calls.append(len(out)))
    many = pgd(model, x, y, restarts=4, **kwargs)
    handle.remove()
    assert calls == [24] * 4

    def score(x_adv: Tensor) -> Tensor:
        logits = model(x_adv).detach()
        own = logits.gather(1, y[:, None])
        return (logits - own).scatter(1, y[:, None], -torch.inf).amax(1)

    # The first of the restarts is the single run, so more of them can only help.
    single = pgd(model, x, y, **kwargs)
    assert bool((score(many) >= score(single)).all())
    assert bool((score(many) > score(single)).any())


def test_a_samples_restarts_leave_together() -> None:
    # Once one restart has fallen, the others are not evaluated again.
    inner = LinearModel(classes=2)
    x = images(4, low=0.4, high=0.6)
    y = predicted(inner, x)
    active: list[list[int]] = []
    pgd(
        inner, x, y, eps=0.02, steps=30, step_size=0.002, restarts=3,
        trace=lambda step, p, logits, loss, rows: active.append(rows.tolist()),
    )  # fmt: skip
    assert sorted(active[0]) == [i for i in range(4) for _ in range(3)]
    for rows in active:
        assert all(rows.count(i) == 3 for i in set(rows))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_whole_budget_is_spent_at_the_size_of_real_images(norm: str, dtype: Any) -> None:
    # Oracle: closed form. A linear loss is highest on the sphere; rounding may cost as much as the
    # bound on it (l1: 3072 roundings of 2⁻²⁵), and never throws a sample back to x.
    shape = (3, 32, 32)
    model = LinearModel(classes=2, shape=shape, dtype=dtype)
    x = images(4, shape, low=0.4, high=0.6).to(dtype)
    eps = {"linf": 8 / 255, "l2": 0.5, "l1": 3.0}[norm]
    x_adv = pgd(model, x, predicted(model, x), eps=eps, norm=norm, steps=20, stop="never")
    spent = distance(x_adv, x, norm)
    assert bool((spent <= eps).all())
    assert bool((spent >= eps * (1 - 4e-5)).all())


def test_a_dead_image_is_no_structural_loss() -> None:
    # A sample whose own gradient is zero (here: a dead ReLU) stays as it is, alone or not.
    class Dead(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = torch.relu(x.flatten(1).mean(1, keepdim=True) - 0.5)
            return torch.cat([torch.zeros_like(z), z], 1)

    x = torch.full((1, 3, 4, 4), 0.2)
    assert torch.equal(pgd(Dead(), x, torch.tensor([0]), eps=0.1, random_start=False), x)


def test_a_loss_of_gradient_at_the_root_has_no_module_name() -> None:
    class Root(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return LinearModel()(x.round())

    with pytest.raises(GradientError, match="identically zero; attack a view") as error:
        pgd(Root(), images(2), torch.tensor([0, 1]))
    assert error.value.module is None
