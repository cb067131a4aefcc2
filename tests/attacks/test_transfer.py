from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import signal
from torch import Tensor

from feint.attacks import mi_fgsm, transfer
from feint.attacks.transfer import _blurred, _Diverse, _gaussian
from feint.core import random
from feint.core.errors import ConfigError, GradientError, ModelError, RangeError
from feint.core.gradients import backprop, eot
from feint.core.losses import cross_entropy
from feint.core.norms import distance
from tests.contracts.attack import AttackContract
from tests.tiny import (
    Counting,
    Detach,
    LinearModel,
    StochasticLinear,
    TinyConv,
    behind,
    images,
    predicted,
)


class TestTransfer(AttackContract):
    attack = staticmethod(transfer)
    # Plain momentum, whose steps have closed forms; the blurs are tested one by one below.
    kwargs: ClassVar = {"preset": "mi", "steps": 5, "step_size": 0.15}


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("targeted", [False, True])
def test_succeeds_if_and_only_if_eps_exceeds_the_distance(norm: str, targeted: bool) -> None:
    # Oracle: closed form, |z_y − z_j| / ‖w_y − w_j‖_q, q dual to the norm.
    model = LinearModel(classes=2)
    x = images(4, low=0.4, high=0.6)
    y = predicted(model, x)
    label = 1 - y if targeted else y
    for i, least in enumerate(model.distance(x, y, norm).tolist()):
        one = slice(i, i + 1)
        for factor in (0.98, 1.02):
            x_adv = transfer(
                model, x[one], label[one], preset="mi", eps=factor * least, norm=norm,
                targeted=targeted,
            )  # fmt: skip
            assert bool(predicted(model, x_adv) != y[one]) is (factor > 1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_momentum_alone_is_mi_fgsm(norm: str) -> None:
    # Oracle: the other attack, bit by bit.
    model = TinyConv()
    x = images(5, (3, 6, 6)).double()
    y = predicted(model, x)
    eps = {"linf": 0.05, "l2": 0.4}[norm]
    kwargs = {"eps": eps, "norm": norm, "steps": 4, "step_size": eps / 4, "stop": "never"}
    expected = mi_fgsm(model, x, y, **kwargs)
    assert torch.equal(transfer(model, x, y, preset="mi", **kwargs), expected)
    assert torch.equal(transfer(model, x, y, diversity=0, kernel=1, scales=1, **kwargs), expected)


# --- the blurs ------------------------------------------------------------------------------------


def slope(model: Any, x: Tensor, y: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(model(leaf), y).sum(), leaf)
    return gradient


@pytest.mark.parametrize("side", [3, 7])
def test_the_kernel_is_a_convolution_of_the_gradient(side: int) -> None:
    # Oracle: scipy.signal.convolve2d with the Gaussian written out.
    model = TinyConv()
    x = images(2, (3, 8, 9)).double()
    y = predicted(model, x)
    found = _blurred(backprop, 0.0, 0.1, side, 1)(model, x, y, cross_entropy, random.keys(0, 2))
    line = np.exp(-(np.linspace(-3, 3, side) ** 2) / 2)
    taps = np.outer(line, line) / line.sum() ** 2
    plain = slope(model, x, y).numpy()
    for i in range(2):
        for c in range(3):
            expected = signal.convolve2d(plain[i, c], taps, mode="same")
            np.testing.assert_allclose(found.gradient[i, c].numpy(), expected, atol=1e-12)
    torch.testing.assert_close(found.logits[:, 0], model(x).detach())
    torch.testing.assert_close(_gaussian(side).sum(), torch.tensor(1.0, dtype=torch.float64))


def test_the_scales_are_averaged() -> None:
    # Oracle: by hand: the mean of d J(x/2ⁱ)/dx over the copies.
    model = TinyConv()
    x = images(3, (3, 6, 6)).double()
    y = predicted(model, x)
    found = _blurred(backprop, 0.0, 0.1, 1, 4)(model, x, y, cross_entropy, random.keys(0, 3))
    expected = sum(slope(model, x / 2**i, y) / 2**i for i in range(4)) / 4
    torch.testing.assert_close(found.gradient, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.logits[:, 0], model(x).detach())
    torch.testing.assert_close(found.loss, cross_entropy(model(x), y).detach())


class Show(torch.nn.Module):
    """Gives the image back as its logits."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def test_diversity_reduces_and_places() -> None:
    # Oracle: torch's bilinear interpolation, and every place that the reduced image may have.
    x = images(40, (1, 10, 12)).double()
    seen = _Diverse(Show(), 0.6, 0.3)(x, random.keys(0, 40)).view_as(x)
    whole = (seen == x).flatten(1).all(1)
    assert 8 <= int(whole.sum()) <= 26  # 40·0.4 = 16, and the few that are reduced by nothing
    sizes = set()
    for image, got in zip(x[~whole], seen[~whole], strict=True):
        matches = []
        for h in range(7, 11):
            for w in range(8, 13):
                small = F.interpolate(image[None], (h, w), mode="bilinear", align_corners=False)
                for top in range(10 - h + 1):
                    for left in range(12 - w + 1):
                        pad = (left, 12 - w - left, top, 10 - h - top)
                        if torch.allclose(F.pad(small, pad)[0], got, rtol=0, atol=1e-9):
                            matches.append((h, w))
        assert len(matches) == 1
        sizes.add(matches[0])
    assert len(sizes) >= 3


def test_diversity_evaluates_the_point_itself() -> None:
    # Oracle: counts, the trace, and the model's own logits.
    inner = TinyConv()
    model = Counting(inner)
    x = images(3, (3, 6, 6)).double()
    y = predicted(inner, x)
    points: list[Tensor] = []

    def trace(_: int, point: Tensor, logits: Tensor, loss: Tensor, active: Tensor) -> None:
        points.append(point)
        torch.testing.assert_close(logits[:, 0], inner(point), rtol=0, atol=1e-9)

    x_adv = transfer(model, x, y, steps=4, scales=2, stop="never", trace=trace)
    assert model.forwards == 3 * (4 * 2 + 4 + 1)
    assert model.backwards == 3 * 4 * 2
    assert len(points) == 5
    for i in range(3):
        assert any(torch.equal(x_adv[i], p[i]) for p in points)
    assert bool((distance(x_adv, x, "linf") <= 8 / 255).all())


@pytest.mark.parametrize("stochastic", [False, True])
def test_all_blurs_at_once_know_no_batch(stochastic: bool) -> None:
    # Oracle: property: each sample alone, in another order; another seed differs.
    model = StochasticLinear(dtype=torch.float64) if stochastic else TinyConv()
    shape = (3, 4, 4) if stochastic else (3, 6, 6)
    x, keys = images(4, shape).double(), random.keys(5, 4)
    y = torch.tensor([0, 1, 2, 3])
    gradient = eot(3) if stochastic else None
    kwargs = {"steps": 3, "diversity": 0.7, "resize": 0.4, "kernel": 3, "scales": 2}

    def attacked(rows: Tensor, seed: Tensor = keys) -> Tensor:
        return transfer(model, x[rows], y[rows], seed=seed[rows], gradient=gradient, **kwargs)

    order = torch.tensor([2, 0, 3, 1])
    whole = attacked(torch.arange(4))
    torch.testing.assert_close(attacked(order), whole[order], rtol=0, atol=1e-9)
    single = torch.cat([attacked(torch.tensor([i])) for i in range(4)])
    torch.testing.assert_close(single, whole, rtol=0, atol=1e-9)
    assert not torch.equal(attacked(torch.arange(4), random.keys(6, 4)), whole)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_nesterov_looks_where_the_momentum_leads(norm: str) -> None:
    # Oracle: the recursion written out: v ← μ·v + g/mean|g| with g at x + μ·α·v.
    inner = TinyConv()
    model = Counting(inner)
    x = images(4, (3, 6, 6), low=0.3, high=0.7).double()
    y = predicted(inner, x)
    eps, step, decay = {"linf": 0.2, "l2": 4.0}[norm], {"linf": 0.02, "l2": 0.3}[norm], 0.8
    point, velocity, path = x, torch.zeros_like(x), [x]
    for _ in range(4):
        g = slope(inner, point + decay * step * velocity, y)
        velocity = decay * velocity + g / g.abs().mean((1, 2, 3), keepdim=True)
        size = velocity.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        unit = velocity.sign() if norm == "linf" else velocity / size
        point = (point + step * unit).clamp(0, 1)
        path.append(point)
    seen: list[Tensor] = []
    transfer(
        model, x, y, norm=norm, eps=eps, steps=4, step_size=step, decay=decay, diversity=0,
        kernel=1, nesterov=True, stop="never", trace=lambda s, p, *rest: seen.append(p),
    )  # fmt: skip
    torch.testing.assert_close(torch.stack(seen), torch.stack(path), rtol=0, atol=1e-9)
    assert (model.forwards, model.backwards) == (4 * (2 * 4 + 1), 4 * 4)


# --- sources --------------------------------------------------------------------------------------


def test_gradients_come_from_the_sources_alone() -> None:
    # Oracle: the attack on the source itself; the target is not asked.
    target = Counting(LinearModel(seed=1))
    source = LinearModel(seed=2)
    x = images(4)
    y = predicted(source, x)
    found = transfer(target, x, y, sources=[source], steps=3)
    assert torch.equal(found, transfer(source, x, y, steps=3))
    assert target.forwards == 0


@pytest.mark.parametrize("fuse", ["logits", "probability"])
def test_an_ensemble_is_the_mean(fuse: str) -> None:
    # Oracle: closed form: the mean logits of linear models are those of the mean weights; for
    # probabilities, the mean softmax.
    parts = [LinearModel(seed=s, dtype=torch.float64) for s in (1, 2, 3)]
    x = images(4).double()
    y = predicted(parts[0], x)
    seen: list[Tensor] = []
    kwargs = {"eps": 0.1, "steps": 3, "preset": "mi", "stop": "never"}
    found = transfer(
        parts[0], x, y, sources=parts, fuse=fuse,
        trace=lambda s, p, z, *rest: seen.append(z[:, 0].softmax(1)), **kwargs,
    )  # fmt: skip
    if fuse == "logits":
        mean = LinearModel(dtype=torch.float64)
        with torch.no_grad():
            for name in ("weight", "bias"):
                average = torch.stack([getattr(p, name) for p in parts]).mean(0)
                getattr(mean, name).copy_(average)
        expected = transfer(mean, x, y, **kwargs)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    else:
        average = torch.stack([p(x).softmax(1) for p in parts]).mean(0).detach()
        torch.testing.assert_close(seen[0], average, rtol=0, atol=1e-12)


def test_a_source_without_gradient_is_named() -> None:
    x = images(2)
    parts = [behind(Detach(), LinearModel()), behind(Detach(), LinearModel(seed=3))]
    with pytest.raises(GradientError, match="front"):
        transfer(parts[0], x, torch.tensor([0, 1]), sources=parts)


@pytest.mark.parametrize("preset", ["mi", "di", "ti", "si"])
def test_presets_move_within_the_ball(preset: str) -> None:
    # Oracle: property; on the source the loss rises.
    model = TinyConv()
    x = images(3, (3, 6, 6)).double()
    y = predicted(model, x)
    x_adv = transfer(model, x, y, preset=preset, steps=3, stop="never")
    assert bool((distance(x_adv, x, "linf") <= 8 / 255).all())
    assert bool((cross_entropy(model(x_adv), y) > cross_entropy(model(x), y)).all())


def test_bad_options() -> None:
    model, x, y = LinearModel(), images(1), torch.tensor([0])
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"sources": []}, ConfigError, "at least one"),
        ({"sources": model}, ConfigError, "list of models"),
        ({"sources": [model, model], "fuse": "loss"}, ConfigError, "fuse"),
        ({"sources": [model, LinearModel(classes=4)]}, ModelError, "same classes"),
        ({"kernel": 4}, ConfigError, "odd"),
        ({"kernel": 0}, RangeError, "kernel"),
        ({"scales": 0}, RangeError, "scales"),
        ({"diversity": 1.5}, RangeError, "diversity"),
        ({"resize": 1.0}, RangeError, "resize"),
        ({"decay": -1.0}, RangeError, "decay"),
    ]
    for kwargs, error, message in cases:
        with pytest.raises(error, match=message):
            transfer(model, x, y, **kwargs)
