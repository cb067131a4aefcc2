"""What the contract of a defense asks of its gradients, and what all its tests share.

Oracles: finite differences in float64, autograd of the stand-in, a plain loop over draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.errors import UnknownNameError
from feint.core.gradients import backprop, eot
from feint.core.spec import format_value
from feint.defenses.base import Defense, Params, View


def images(seed: int, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Random images, float32, by Feint's own generator."""
    return random.uniform(random.keys(seed, [0])[0], shape, low, high)


def pairwise(a: Tensor, b: Tensor) -> Tensor:
    """Inner product per sample."""
    return (a * b).flatten(1).sum(1)


class Head(nn.Module):
    """A smooth classifier behind a front, with keys."""

    def __init__(self, front: nn.Module, weight: Tensor) -> None:
        super().__init__()
        self.front, self.weight = front, weight
        self.stochastic = getattr(front, "stochastic", False)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        return torch.tanh(self.front(x, keys)).flatten(1) @ self.weight


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, y, reduction="none")


class GradientContract:
    """The half of `DefenseContract` that differentiates; inherit from that one.

    Its attributes describe the images that the defense is tested on.
    """

    cls: ClassVar[type[Defense]]
    configs: ClassVar[Sequence[dict[str, Any]]] = ({},)
    channels: ClassVar[tuple[int, ...]] = (1, 3)
    min_side: ClassVar[int] = 1
    """Smallest side that works; one pixel less must raise ShapeError."""
    max_side: ClassVar[int] = 17
    side: ClassVar[int] = 12
    """Side of the images where hypothesis does not choose it."""
    batch_atol: ClassVar[float] = 1e-6
    """What a sample may change by with its batch-mates (0 where no sum can be reordered)."""
    rtol: ClassVar[float] = 1e-5
    """Of derivatives against finite differences in float64."""
    step: ClassVar[float] = 1e-6
    """Half the distance of a finite difference."""

    def build(self, config: dict[str, Any]) -> Defense:
        """An instance; override it for constructors with positional arguments."""
        return self.cls(**config)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "config" in metafunc.fixturenames:
            configs = type(self).configs
            metafunc.parametrize("config", configs, ids=[_label(c) for c in configs])

    def batch(self, b: int = 4, seed: int = 0, **kwargs: float) -> tuple[Tensor, Tensor]:
        x = images(seed, b, self.channels[-1], self.side, self.side, **kwargs)
        return x, random.keys(seed, b)

    def test_differentiable_is_what_it_says(self, config: dict[str, Any]) -> None:
        """Oracle: central differences in float64 along random directions."""
        defense = self.build(config).double()
        x, keys = self.batch(3, low=0.25, high=0.75)
        x = x.double()
        direction = random.normal(random.keys(9, 3), x.shape[1:], torch.float64)
        weight = random.normal(random.keys(8, 3), x.shape[1:], torch.float64)
        params = defense.sample(x, keys)
        leaf = x.clone().requires_grad_()
        y = defense.replay(leaf, params)
        if not defense.differentiable:
            if y.requires_grad:
                (g,) = torch.autograd.grad((y * weight).sum(), leaf, allow_unused=True)
                useful = g is not None and _agrees(defense, x, params, direction, weight, g, 1e-2)
                assert not useful, "autograd gives a useful gradient: declare differentiable"
            assert defense.backward_rules(), "neither differentiable nor any backward rule"
            return
        (g,) = torch.autograd.grad((y * weight).sum(), leaf)
        assert bool(g.flatten(1).any(1).all()), "the gradient is zero"
        h = self.step
        up, down = (defense.replay(x + s * h * direction, params) for s in (1, -1))
        expected = pairwise(up - down, weight) / (2 * h)
        torch.testing.assert_close(
            pairwise(g, direction), expected, rtol=self.rtol, atol=float(weight.norm()) * 1e-8
        )

    def test_views_forward_is_bit_exact(self, config: dict[str, Any]) -> None:
        defense = self.build(config)
        x, keys = self.batch()
        y = defense(x, keys)
        rules = (None, *defense.backward_rules())
        for rule in rules:
            view = defense.view(rule)
            assert isinstance(view, View)
            assert view.stochastic == defense.stochastic
            assert torch.equal(view(x, keys), y)
            assert torch.equal(view(x.clone().requires_grad_(), keys), y)
            with torch.no_grad():
                assert torch.equal(view(x, keys), y)
            with torch.inference_mode():
                assert torch.equal(view(x, keys), y)

    def test_views_backward_is_that_of_the_stand_in(self, config: dict[str, Any]) -> None:
        """Oracle: autograd through the stand-in."""
        defense = self.build(config)
        x, keys = self.batch()
        cotangent = random.normal(random.keys(4, len(x)), x.shape[1:])
        for rule in defense.backward_rules():
            view, stand_in = defense.view(rule), _stand_in(defense, rule)
            params = defense.sample(x, keys)
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            out = view(a, keys)
            (got,) = torch.autograd.grad(out, a, cotangent, retain_graph=True)
            (again,) = torch.autograd.grad(out, a, cotangent)
            (expected,) = torch.autograd.grad(stand_in(b, params), b, cotangent)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(got, again), "a second backward pass differs"
            assert bool(got.isfinite().all())
            assert bool(got.flatten(1).any(1).all()), f"{rule}: zero gradient"
            twice = torch.autograd.grad(view(view(a, keys), keys).sum(), a)[0]
            assert bool(twice.isfinite().all())

    def test_unknown_rule_is_refused(self, config: dict[str, Any]) -> None:
        with pytest.raises(UnknownNameError, match="backward rule"):
            self.build(config).view("no such rule")

    def test_expectation_over_draws(self, config: dict[str, Any]) -> None:
        """Oracle: a plain loop over the draws."""
        defense = self.build(config)
        x, keys = self.batch(3)
        y = torch.tensor([0, 1, 2])
        weight = random.normal(random.keys(2, [0])[0], (x[0].numel(), 4))
        draws = random.fold(keys, "eot", 0, torch.arange(5))
        for rule in defense.backward_rules():
            model = Head(defense.view(rule), weight)
            got = eot(5)(model, x, y, cross_entropy, keys)
            each = [backprop(model, x, y, cross_entropy, draws[:, i]).gradient for i in range(5)]
            expected = torch.stack(each).mean(0)
            scale = float(expected.abs().max())
            torch.testing.assert_close(got.gradient, expected, rtol=1e-3, atol=1e-4 * scale)
            assert bool(got.gradient.isfinite().all())
            assert got.logits.shape == (3, 5, 4)


def _stand_in(defense: Defense, rule: str) -> Callable[[Tensor, Params], Tensor]:
    return defense.stand_in(rule)


def _agrees(
    defense: Defense,
    x: Tensor,
    params: Params,
    direction: Tensor,
    weight: Tensor,
    gradient: Tensor,
    h: float,
) -> bool:
    """Whether a gradient, not all zero, predicts a change over the visible distance `h`."""
    if not bool(gradient.any()):
        return False
    up, down = (defense.replay(x + s * h * direction, params) for s in (1, -1))
    expected = pairwise(up - down, weight) / (2 * h)
    return bool(((pairwise(gradient, direction) - expected).abs() < 0.01 * expected.abs()).all())


def _label(config: dict[str, Any]) -> str:
    """The same name in every process: pytest-xdist compares what its workers collect."""
    return ",".join(f"{k}={format_value(v)}" for k, v in config.items())[:60] or "default"
