"""Gradient estimators on functions whose gradient is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feint.core import random
from feint.core.errors import GradientError, ModelError, RangeError
from feint.core.gradients import (
    _signs,
    backprop,
    call,
    comfortable,
    eot,
    find_gradient_loss,
    is_stochastic,
    nes,
    require_gradient,
    spsa,
    takes_keys,
)
from feint.core.losses import cross_entropy, margin
from tests.tiny import (
    Counting,
    Detach,
    LinearModel,
    Round,
    Scaled,
    StochasticLinear,
    StochasticSlope,
    TinyConv,
    behind,
    images,
    predicted,
)

SHAPE = (3, 4, 4)
N = 48


@pytest.fixture
def two() -> LinearModel:
    """Two classes: the margin of class 0 is linear, with gradient w₁ − w₀ everywhere."""
    return LinearModel(classes=2, dtype=torch.float64)


def slope(model: LinearModel) -> Tensor:
    return (model.weight[1] - model.weight[0]).detach()


def zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


def test_signs_are_the_bits_of_the_words() -> None:
    # Oracle: numpy's unpacking of the same words; and their mean over many keys.
    keys = random.keys(4, 500)
    signs = _signs(keys, torch.Size((5, 3, 5)), torch.float64)
    words = random.words(keys, 3).numpy().astype("<u4")
    bits = np.unpackbits(words.view("u1"), bitorder="little").reshape(500, -1)[:, :75]
    assert np.array_equal(signs.flatten(1).numpy(), 1 - 2.0 * bits)
    assert float(signs.mean(0).abs().max()) < 4.5 / 500**0.5
    assert _signs(keys.view(5, 100), torch.Size((2,)), torch.float32).shape == (5, 100, 2)


# --- backprop -------------------------------------------------------------------------------------


def test_backprop_gives_the_gradient_of_each_sample(two: LinearModel) -> None:
    # Oracle: closed form.
    x = images(5).double()
    got = backprop(two, x, zeros(5), margin, random.keys(0, 5))
    torch.testing.assert_close(got.gradient, slope(two).expand(5, -1, -1, -1))
    torch.testing.assert_close(got.logits[:, 0], two(x).detach())
    torch.testing.assert_close(got.loss, margin(two(x), zeros(5)).detach())
    assert got.logits.shape == (5, 1, 2)
    assert not got.logits.requires_grad
    assert not got.loss.requires_grad


def test_backprop_equals_finite_differences() -> None:
    # Oracle: central differences in float64.
    model, x = TinyConv(), images(2, (3, 5, 5)).double()
    y = predicted(model, x)
    got = backprop(model, x, y, cross_entropy, random.keys(0, 2)).gradient
    h = 1e-5
    for index in ((0, 0, 0, 0), (0, 2, 4, 1), (1, 1, 3, 3)):
        step = torch.zeros_like(x)
        step[index] = h
        with torch.no_grad():
            up, down = (cross_entropy(model(x + s * step), y) for s in (1, -1))
        assert float(got[index]) == pytest.approx(float((up - down)[index[0]] / (2 * h)), rel=1e-5)


@pytest.mark.parametrize(
    "estimator",
    [backprop, eot(3), spsa(4), nes(4)],
    ids=lambda v: getattr(v, "__qualname__", str(v)),
)
def test_forward_only_skips_the_gradient(estimator: Any, two: LinearModel) -> None:
    # Oracle: counts, and the full estimate's logits and loss.
    model, x, keys = Counting(two), images(4).double(), random.keys(0, 4)
    full = estimator(model, x, zeros(4), margin, keys)
    model.forwards = model.backwards = 0
    only = estimator(model, x, zeros(4), margin, keys, forward_only=True)
    assert model.backwards == 0
    assert model.forwards == (12 if "eot" in getattr(estimator, "__qualname__", "") else 4)
    assert torch.equal(only.gradient, torch.zeros_like(x))
    torch.testing.assert_close(only.logits, full.logits)
    torch.testing.assert_close(only.loss, full.loss)


@pytest.mark.parametrize(
    ("estimator", "forwards", "backwards"),
    [(backprop, 1, 1), (eot(5), 5, 5), (spsa(7), 15, 0), (nes(7), 15, 0), (eot(2, spsa(3)), 14, 0)],
    ids=lambda v: getattr(v, "__qualname__", str(v)),
)
def test_cost(estimator: Any, forwards: int, backwards: int, two: LinearModel) -> None:
    # Oracle: the documented cost per sample.
    model = Counting(two)
    estimator(model, images(3).double(), zeros(3), margin, random.keys(0, 3))
    assert (model.forwards, model.backwards) == (3 * forwards, 3 * backwards)


# --- eot ------------------------------------------------------------------------------------------


def test_eot_is_the_mean_of_the_gradients_of_its_draws() -> None:
    # Oracle: a loop over the same draws.
    model, x, keys = StochasticSlope(), images(3).double(), random.keys(4, 3)
    got = eot(5)(model, x, zeros(3), cross_entropy, keys)
    each = [
        backprop(model, x, zeros(3), cross_entropy, random.fold(keys, "eot", 0, d))
        for d in range(5)
    ]
    torch.testing.assert_close(got.gradient, torch.stack([e.gradient for e in each]).mean(0))
    torch.testing.assert_close(got.loss, torch.stack([e.loss for e in each]).mean(0))
    torch.testing.assert_close(got.logits, torch.cat([e.logits for e in each], 1))


def test_eot_converges_to_the_expected_gradient() -> None:
    # Oracle: closed form. The slope is w times ½ or 3/2, so the mean of D draws has the expectation
    # w and the standard deviation |w|/(2√D), per value.
    model, x, draws = StochasticSlope(), images(4).double(), 400
    got = eot(draws)(model, x, zeros(4), margin, random.keys(0, 4)).gradient
    error = (got - model.weight) / (model.weight.abs() / (2 * draws**0.5))
    assert float(error.square().mean()) == pytest.approx(1, abs=0.25)
    assert abs(float(error.mean())) < 0.25


@pytest.mark.parametrize("chunk", [None, 1, 4, 5, 1000])
def test_eot_in_chunks_and_in_other_batches(chunk: int | None) -> None:
    # Oracle: property. Draws follow the samples' keys.
    model, x, keys = StochasticSlope(), images(6).double(), random.keys(4, 6)
    whole = eot(4)(model, x, zeros(6), margin, keys)
    parts = eot(4, chunk=chunk)(model, x, zeros(6), margin, keys)
    torch.testing.assert_close(parts.gradient, whole.gradient)
    torch.testing.assert_close(parts.logits, whole.logits)
    one = eot(4, chunk=chunk)(model, x[3:4], zeros(1), margin, keys[3:4])
    torch.testing.assert_close(one.gradient, whole.gradient[3:4])


def test_eot_of_a_deterministic_model_is_backprop(two: LinearModel) -> None:
    x, keys = images(3).double(), random.keys(0, 3)
    one, many = (e(two, x, zeros(3), margin, keys) for e in (backprop, eot(6)))
    torch.testing.assert_close(many.gradient, one.gradient)
    torch.testing.assert_close(many.logits, one.logits.expand(-1, 6, -1))


def test_estimators_take_an_empty_batch(two: LinearModel) -> None:
    for estimator in (backprop, eot(3), spsa(2), nes(2)):
        got = estimator(two, images(0).double(), zeros(0), margin, random.keys(0, 0))
        assert got.gradient.shape == (0, *SHAPE)
        assert got.loss.shape == (0,)


# --- spsa and nes ---------------------------------------------------------------------------------

LAWS: list[tuple[Callable[..., Any], float]] = [(spsa, N - 1), (nes, N + 1)]
"""Estimator, and Σ var(estimate)·samples / ‖g‖² on a linear loss.

For (g·v)v with iid zero-mean unit-variance components the total variance is
(n − 1)‖g‖² for signs (fourth moment 1) and (n + 1)‖g‖² for Gaussians (fourth moment 3).
"""


@pytest.mark.parametrize(("estimator", "factor"), LAWS, ids=["spsa", "nes"])
def test_bias_and_variance_on_a_linear_loss(
    estimator: Callable[..., Any], factor: float, two: LinearModel
) -> None:
    # Oracle: closed form. Foolbox's estimator is four times too small, which the mean shows.
    count, samples = 400, 32
    x = torch.full((count, *SHAPE), 0.5, dtype=torch.float64)
    got = estimator(samples)(two, x, zeros(count), margin, random.keys(3, count)).gradient
    g = slope(two)
    variance = factor * float(g.square().sum()) / samples
    error = got - g
    # Mean of 400 estimates: Σ(error of the mean)² has the expectation variance/400.
    assert float(error.mean(0).square().sum()) == pytest.approx(variance / count, rel=0.6)
    assert float(error.square().sum((1, 2, 3)).mean()) == pytest.approx(variance, rel=0.1)
    along = float((got * g).sum((1, 2, 3)).mean() / g.square().sum())
    assert along == pytest.approx(1, abs=4 * (2 / samples / count) ** 0.5)


@pytest.mark.parametrize(
    "estimator", [spsa(64), nes(64)], ids=lambda v: getattr(v, "__qualname__", str(v))
)
def test_the_estimate_does_not_depend_on_the_batch_size(estimator: Any, two: LinearModel) -> None:
    # Oracle: property. Foolbox: cosine 0.63, 0.30, 0.11, 0.045 for batches of 1, 8, 64, 256.
    count = 64
    x, keys = images(count).double(), random.keys(0, count)
    whole = estimator(two, x, zeros(count), margin, keys).gradient
    for size in (1, 8):
        part = estimator(two, x[:size], zeros(size), margin, keys[:size]).gradient
        torch.testing.assert_close(part, whole[:size], rtol=0, atol=1e-9)
    cosine = F.cosine_similarity(whole.flatten(1), slope(two).flatten()[None])
    # E cos ≈ 1/√(1 + (n ∓ 1)/samples): 0.76 here.
    assert float(cosine.mean()) == pytest.approx((1 + N / 64) ** -0.5, abs=0.03)


@pytest.mark.parametrize("kind", [spsa, nes])
def test_chunks_change_rounding_only(kind: Callable[..., Any], two: LinearModel) -> None:
    x, keys = images(3).double(), random.keys(0, 3)
    whole = kind(20)(two, x, zeros(3), margin, keys).gradient
    parts = kind(20, chunk=7)(two, x, zeros(3), margin, keys).gradient
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", [spsa, nes])
def test_both_ends_of_a_difference_share_their_draw(kind: Callable[..., Any]) -> None:
    # Oracle: closed form. The model adds a large keyed constant to a score; common random numbers
    # cancel it, and the estimate is the noise-free one.
    class Noisy(StochasticLinear):
        def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
            z = LinearModel.forward(self, x)
            return z + 1e3 * random.normal(keys, (1,), x.dtype) * torch.tensor([0.0, 1.0]).to(z)

    noisy = Noisy(classes=2, dtype=torch.float64)
    clean = LinearModel(classes=2, dtype=torch.float64)
    x, keys = images(3).double(), random.keys(0, 3)
    got, expected = (kind(16)(m, x, zeros(3), margin, keys).gradient for m in (noisy, clean))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("bad", [lambda: spsa(0), lambda: nes(4, sigma=0), lambda: eot(0)])
def test_bad_settings(bad: Callable[[], Any]) -> None:
    with pytest.raises(RangeError, match="expected"):
        bad()


# --- lost gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("front", [Detach(), Round()], ids=["detach", "round"])
def test_find_gradient_loss_names_the_module(front: nn.Module, two: LinearModel) -> None:
    nested = behind(nn.Identity(), behind(front, two))
    assert find_gradient_loss(nested, images(2).double()) == "model.front"
    assert find_gradient_loss(behind(nn.Identity(), two), images(2).double()) is None
    assert find_gradient_loss(lambda x: x, images(2)) is None
    assert not any(m._forward_hooks for m in nested.modules())


def test_find_gradient_loss_is_not_fooled_by_constant_sums() -> None:
    # The outputs of a softmax sum to one: their plain sum has no gradient, the softmax has.
    model = nn.Sequential(nn.Softmax(-1), nn.LayerNorm(4), nn.Flatten(), Round(), nn.Linear(48, 2))
    assert find_gradient_loss(model.double(), images(2).double()) == "3"


def test_backprop_names_where_the_graph_is_cut(two: LinearModel) -> None:
    with pytest.raises(GradientError, match="the graph is cut in module 'front'; attack a view"):
        backprop(behind(Detach(), two), images(2).double(), zeros(2), margin, random.keys(0, 2))


def test_require_gradient(two: LinearModel) -> None:
    x, keys, nothing = images(2).double(), random.keys(0, 2), torch.zeros(2, *SHAPE).double()
    with pytest.raises(GradientError, match="identically zero in module 'front'"):
        require_gradient(behind(Round(), two), x, keys, nothing)
    with pytest.raises(GradientError, match="identically zero in module 'front'"):
        require_gradient(behind(Detach(), two), x, keys, nothing)
    require_gradient(Scaled(two, 1000.0), x, keys, nothing)  # saturated, not lost
    require_gradient(behind(Round(), two), x, keys, nothing + 1)  # some gradient is enough
    require_gradient(behind(Round(), two), x[:0], keys[:0], nothing[:0])


def test_scores_alone_make_no_claim_about_the_graph() -> None:
    assert spsa(2).scores_only
    assert eot(2, nes(2)).scores_only
    assert not eot(2).scores_only


# --- models ---------------------------------------------------------------------------------------


def test_keys_go_to_models_that_take_them() -> None:
    assert takes_keys(StochasticLinear())
    assert not takes_keys(LinearModel())
    assert takes_keys(lambda x, keys=None: x)
    assert not takes_keys(lambda x: x)
    assert not takes_keys(torch.relu)  # a built-in without a signature
    assert is_stochastic(StochasticLinear())
    assert not is_stochastic(LinearModel())
    model, x = StochasticLinear(), images(2)
    assert torch.equal(call(model, x, random.keys(0, 2)), model(x, keys=random.keys(0, 2)))


@pytest.mark.parametrize(
    ("model", "got"),
    [
        (lambda x: x.flatten(1)[:1], r"\(1, 48\)"),
        (lambda x: x, r"\(3, 3, 4, 4\)"),
        (lambda x: [x], "list"),
    ],
)
def test_call_refuses_what_is_no_batch_of_logits(model: Any, got: str) -> None:
    with pytest.raises(ModelError, match=f"the model gave {got} for a batch of 3"):
        call(model, images(3))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_logits_come_back_as_float32(half: torch.dtype) -> None:
    assert call(lambda x: x.flatten(1).to(half), images(2)).dtype == torch.float32


def test_a_large_batch_on_the_cpu_is_differentiated_in_parts() -> None:
    # Oracle: the same samples given one part at a time, and the count of passes.
    model = Counting(TinyConv())
    x, y, keys = images(2001, (3, 6, 6)).double(), zeros(2001), random.keys(0, torch.arange(2001))
    size = comfortable(x)
    assert size < 2001
    assert size * 108 <= 200_000
    whole = backprop(model, x, y, margin, keys)
    assert (model.forwards, len(whole.logits)) == (2001, 2001)
    for start in range(0, 2001, size):
        at = slice(start, start + size)
        part = backprop(model, x[at], y[at], margin, keys[at])
        for got, expected in zip(whole, part, strict=True):
            assert torch.equal(got[at], expected)
    assert comfortable(images(4, (3, 300, 300))) == 4
    assert comfortable(x[:0]) == 1
