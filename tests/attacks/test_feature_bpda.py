from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from feint.attacks import feature_bpda, pgd
from feint.core import random
from feint.core.errors import ConfigError, GradientError, ShapeError, UnknownNameError
from feint.core.gradients import eot
from feint.core.norms import distance
from feint.defenses import BitDepth
from feint.evaluation import Pipeline
from tests.contracts.attack import AttackContract
from tests.tiny import Counting, LinearModel, TinyConv, images, predicted


class TestFeatureBPDA(AttackContract):
    attack = staticmethod(feature_bpda)
    # The projection knows targets; the distance is tested below.
    kwargs: ClassVar = {"steps": 5, "objective": "projection"}


class Score(nn.Module):
    """Two classes by one number: features w·x, logits (0, w·x − c)."""

    def __init__(self, trap: bool = False) -> None:
        super().__init__()
        self.linear = LinearModel(classes=2, dtype=torch.float64)
        self.features = nn.Identity()
        self.trap = trap

    def forward(self, x: Tensor) -> Tensor:
        difference = self.linear(x).diff(dim=1)[:, 0]
        score = self.features(difference)
        if self.trap:  # the same sign, and a slope that leads the wrong way
            score = score.detach() * 2 - score
        return torch.stack([torch.zeros_like(score), score], 1)


@pytest.mark.parametrize("objective", ["distance", "projection"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_succeeds_if_and_only_if_eps_exceeds_the_distance(norm: str, objective: str) -> None:
    # Oracle: closed form, |z_y − z_j| / ‖w_y − w_j‖_q, q dual to the norm: the feature is the
    # score itself, so that away from the clean one is along the slope.
    model = Score()
    x = images(5, low=0.4, high=0.6).double()
    y = predicted(model, x)
    for i, least in enumerate(model.linear.distance(x, y, norm).tolist()):
        one = slice(i, i + 1)
        for factor in (0.98, 1.02):
            x_adv = feature_bpda(
                model, x[one], y[one], layer="features", objective=objective, norm=norm,
                eps=factor * least,
            )  # fmt: skip
            assert bool(predicted(model, x_adv) != y[one]) is (factor > 1)


def test_passes_a_trap_behind_the_features() -> None:
    # Oracle: closed form. The logits' slope is reversed, so that pgd goes the wrong way and never
    # falls; the features' slope is true. A guide beyond the boundary needs no logits at all.
    model = Score(trap=True)
    x = images(5, low=0.4, high=0.6).double()
    y = predicted(model, x)
    eps = 1.2 * float(model.linear.distance(x, y, "linf").max())
    assert torch.equal(predicted(model, pgd(model, x, y, eps=eps)), y)
    other = 1 - y
    slope = (model.linear.weight[other] - model.linear.weight[y]).detach()
    guide = (x + 2 * eps * slope.sign()).clamp(0, 1)
    assert bool((predicted(model, guide) != y).all())
    x_adv = feature_bpda(model, x, y, layer="features", guide=guide, eps=eps, stop="never")
    assert bool((predicted(model, x_adv) != y).all())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_distance_of_linear_features_grows_as_it_can(norm: str) -> None:
    # Oracle: closed form. Features x·s per pixel (s diagonal): for l2 the farthest points of the
    # ball lie along the largest |s|, at eps·|s|; the ascent reaches 90 % of it; for linf all
    # corners are equally far.
    scale = torch.linspace(0.1, 2.0, 48, dtype=torch.float64).view(3, 4, 4)
    inner = LinearModel(dtype=torch.float64)
    x = images(4, low=0.4, high=0.6).double()
    y = predicted(inner, x)
    eps = {"linf": 0.1, "l2": 0.3}[norm]
    seen: list[Tensor] = []
    feature_bpda(
        inner, x, y, layer=lambda x: x * scale, norm=norm, eps=eps, steps=200, stop="never",
        trace=lambda step, points, *rest: seen.append(points),
    )  # fmt: skip
    far = ((seen[-1] - x) * scale).flatten(1).norm(dim=1)
    most = eps * float(scale.norm()) if norm == "linf" else eps * 2.0
    assert bool((far <= most * (1 + 1e-9)).all())
    assert bool((far >= 0.9 * most).all())


def test_a_guides_features_are_reached() -> None:
    # Oracle: closed form. On features x·s the nearest point of a linf ball is the clipped guide.
    scale = torch.linspace(0.5, 2.0, 48, dtype=torch.float64).view(3, 4, 4)
    inner = LinearModel(dtype=torch.float64)
    x, guide = images(4).double(), images(4, seed=9).double()
    seen: list[Tensor] = []
    feature_bpda(
        inner, x, predicted(inner, x), layer=lambda x: x * scale, guide=guide, eps=0.1, steps=60,
        step_size=0.005, stop="never", trace=lambda step, points, *rest: seen.append(points),
    )  # fmt: skip
    nearest = torch.minimum(torch.maximum(guide, x - 0.1), x + 0.1)
    assert float((seen[-1] - nearest).abs().max()) <= 0.005 + 1e-9


def test_the_default_layer_feeds_the_last_linear_one() -> None:
    # Oracle: the same run with the features written out.
    model = TinyConv()
    x = images(4, (3, 6, 6)).double()
    y = predicted(model, x)

    def features(x: Tensor) -> Tensor:
        hidden = nn.functional.silu(model.norm(model.conv1(4 * x - 2)))
        return torch.tanh(model.conv2(hidden)).mean((2, 3))

    kwargs = {"steps": 6, "eps": 0.05, "stop": "never"}
    found = feature_bpda(model, x, y, **kwargs)
    by_hand = feature_bpda(model, x, y, layer=features, **kwargs)
    torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-9)
    by_name = feature_bpda(model, x, y, layer="conv2", **kwargs)
    assert not torch.allclose(by_name, found)
    assert bool((distance(by_name, x, "linf") <= 0.05).all())


def test_runs_under_a_views_backward_rule_and_eot() -> None:
    # Oracle: closed form: 5-bit steps move the score by at most Σ|w|/64; beyond that and the
    # distance, it falls. Without the view, the rounding stops every gradient, and is named.
    inner = LinearModel(classes=2, dtype=torch.float64)
    pipeline = Pipeline(inner, BitDepth(bits=5)).eval()
    x = images(4, low=0.4, high=0.6).double()
    y = predicted(inner, x)
    eps = float(inner.distance(x, y, "linf").max()) + 2 / 62
    view = pipeline.view("identity")
    x_adv = feature_bpda(view, x, y, eps=eps)
    assert bool((predicted(pipeline, x_adv) != y).all())
    x_adv = feature_bpda(view, x, y, eps=eps, gradient=eot(2))
    assert bool((predicted(pipeline, x_adv) != y).all())


def test_passes_are_those_documented() -> None:
    # Oracle: counts.
    inner = TinyConv()
    model = Counting(inner)
    x = images(3, (3, 6, 6)).double()
    y = predicted(inner, x)
    feature_bpda(model, x, y, steps=4, stop="never")
    assert (model.forwards, model.backwards) == (3 * 5, 3 * 4)
    model.forwards = model.backwards = 0
    feature_bpda(model, x, y, steps=4, stop="never", guide=x.flip(3))
    assert (model.forwards, model.backwards) == (3 * 6, 3 * 4)


def test_guides_travel_with_their_samples() -> None:
    # Oracle: property: each sample alone, while others leave the batch early.
    model = TinyConv()
    x, guide = images(5, (3, 6, 6)).double(), images(5, (3, 6, 6), seed=3).double()
    y = predicted(model, x)
    y[1] = (y[1] + 1) % 5
    kwargs: dict[str, Any] = {"steps": 5, "eps": 0.03}
    keys = random.keys(0, 5)
    for given in (guide, None):
        whole = feature_bpda(model, x, y, guide=given, seed=keys, **kwargs)
        for i in range(5):
            one = slice(i, i + 1)
            own = None if given is None else given[one]
            alone = feature_bpda(model, x[one], y[one], guide=own, seed=keys[one], **kwargs)
            torch.testing.assert_close(alone, whole[one], rtol=0, atol=1e-9)


def test_bad_options() -> None:
    model, x, y = TinyConv(), images(2).double(), torch.tensor([0, 1])
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"layer": "conv3"}, UnknownNameError, "'conv[12]'"),
        ({"layer": 3}, ConfigError, "layer"),
        ({"layer": lambda x: 1.0}, ConfigError, "tensor"),
        ({"objective": "distances"}, ConfigError, "objective"),
        ({"targeted": True}, ConfigError, "guide images"),
        ({"guide": x[:1]}, ShapeError, "guide"),
        ({"layer": lambda x: x.detach(), "guide": x}, GradientError, "graph is cut"),
    ]
    for kwargs, error, message in cases:
        with pytest.raises(error, match=message):
            feature_bpda(model, x, y, **kwargs)
        assert not any(m._forward_hooks for m in model.modules())
