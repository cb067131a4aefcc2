"""Oracles for the minimal-norm attacks, beyond the contract of every attack."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from feint.core.gradients import eot
from feint.core.norms import distance
from tests.contracts.attack import AttackContract
from tests.contracts.attack_harness import HostSyncs
from tests.tiny import (
    Counting,
    LinearModel,
    StochasticLinear,
    TinyConv,
    images,
    predicted,
)


def least(model: LinearModel, x: Tensor, y: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """Closed form: least distance to another class in the box where it does not bind, and class.

    l0: a pixel gains the most when each channel goes to the end of the box that its weight wants;
    the fewest pixels are those of largest gain.
    """
    if norm != "l0":
        found = model.distances(x, y, norm).min(1)
        return found.values, found.indices
    weight, bias = model.weight.detach().double(), model.bias.detach().double()
    logits = (x.double()[:, None] * weight).flatten(2).sum(2) + bias
    gap = logits.gather(1, y[:, None]) - logits
    slope = weight[None] - weight[y][:, None]  # (B, K, C, H, W)
    clean = x.double()[:, None]
    gain = torch.where(slope > 0, slope * (1 - clean), -slope * clean).sum(2).flatten(2)
    gained = gain.sort(2, descending=True).values.cumsum(2)
    count = (gained <= gap[..., None]).sum(2) + 1.0
    found = count.scatter(1, y[:, None], torch.inf).min(1)
    return found.values, found.indices


def in_the_box(model: LinearModel, x: Tensor, y: Tensor) -> Tensor:
    """Closed form for two classes: least l2 distance with a binding box, (B,).

    The nearest point of a half-space and a box is x + clip(λ·w) for one λ, found by bisection.
    """
    weight, bias = model.weight.detach().double(), model.bias.detach().double()
    x = x.double()
    slope = weight[1 - y] - weight[y]
    gap = ((x[:, None] * weight).flatten(2).sum(2) + bias).gather(1, y[:, None])
    gap = gap - ((x[:, None] * weight).flatten(2).sum(2) + bias).gather(1, 1 - y[:, None])
    low, high = torch.zeros(len(x), 1).double(), torch.full((len(x), 1), 1e3).double()
    delta = torch.zeros_like(x)
    for _ in range(100):
        middle = (low + high) / 2
        delta = (x + middle[..., None, None] * slope).clamp(0, 1) - x
        enough = (delta * slope).flatten(1).sum(1, keepdim=True) >= gap
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return delta.flatten(1).norm(dim=1)


class MinimalContract(AttackContract):
    """What a minimal-norm attack owes on top: the true distance, and the nearest point it saw."""

    tolerance = 1.02
    precise: ClassVar[dict[str, Any]] = {}
    """Further keywords for the tests against closed forms."""
    passes: ClassVar[int] = 1
    """Forward passes of a step."""
    scale: ClassVar[float] = 1.0
    """Of the linear models' logits; their distances do not depend on it."""
    boxed: ClassVar[float] = 1.02
    """How many times the least l2 distance it may need where the box binds."""

    @pytest.mark.parametrize("targeted", [False, True])
    def test_true_distance_within_two_percent(self, norm: str, targeted: bool) -> None:
        # Oracle: closed form. The target is the nearest class, so both answers are the same.
        model = LinearModel(dtype=torch.float64, scale=self.scale)
        x = images(8, low=0.35, high=0.65, seed=4).double()
        y = predicted(model, x)
        true, other = least(model, x, y, norm)
        x_adv = self.run(
            model, x, other if targeted else y, norm, targeted=targeted, **self.precise
        )
        now = predicted(model, x_adv)
        assert torch.equal(now, other) if targeted else bool((now != y).all())
        ratio = distance(x_adv, x, norm) / true
        assert bool((ratio >= 1 - 1e-9).all())
        assert bool((ratio <= self.tolerance).all()), ratio

    # The contract's own form of the test above does not know l0.
    test_finds_the_least_distance_on_a_linear_model = None

    def test_true_distance_where_the_box_binds(self) -> None:
        # Oracle: closed form. Half of the values are 0 or 1, and many of them want to go further.
        if "l2" not in self.info.norms:
            return
        model = LinearModel(classes=2, dtype=torch.float64, scale=self.scale)
        x = images(8, seed=5).double()
        x = torch.where(images(8, seed=6) < 0.5, x.round(), x)
        y = predicted(model, x)
        x_adv = self.run(model, x, y, "l2", **self.precise)
        ratio = distance(x_adv, x, "l2") / in_the_box(model, x, y)
        assert bool((predicted(model, x_adv) != y).all())
        assert bool((ratio >= 1 - 1e-9).all())
        assert bool((ratio <= self.boxed).all()), ratio

    def test_misclassified_samples_return_themselves(self, norm: str) -> None:
        # Oracle: closed form: their distance is zero.
        model = LinearModel()
        x = images(6)
        y = predicted(model, x)
        wrong = torch.where(torch.arange(6) % 2 == 0, (y + 1) % 5, y)
        for stop in ("success", "never"):
            x_adv = self.run(model, x, wrong, norm, stop=stop)
            assert torch.equal(x_adv[::2], x[::2])
            assert bool((predicted(model, x_adv) != wrong).all())

    @pytest.mark.parametrize("stop", ["success", "never"])
    def test_returns_the_nearest_adversarial_point_it_saw(self, norm: str, stop: str) -> None:
        # Oracle: the trace.
        model = TinyConv()
        x = images(5, (3, 6, 6)).double()
        y = predicted(model, x)
        nearest = torch.full((5,), torch.inf, dtype=torch.float64)

        def trace(_: int, points: Tensor, logits: Tensor, loss: Tensor, rows: Tensor) -> None:
            size = distance(points, x[rows], norm)
            hit = logits[:, 0].argmax(1) != y[rows]
            nearest[rows] = torch.minimum(nearest[rows], torch.where(hit, size, torch.inf))

        x_adv = self.run(model, x, y, norm, stop=stop, trace=trace)
        found = nearest.isfinite()
        assert bool(found.any())
        assert torch.equal(distance(x_adv, x, norm)[found], nearest[found])
        assert torch.equal(x_adv[~found], x[~found])
        assert bool((predicted(model, x_adv) != y)[found].all())

    def test_all_draws_must_agree(self, norm: str) -> None:
        # Oracle: the trace: the draws at the point returned.
        model = StochasticLinear(sigma=0.1, dtype=torch.float64)
        x = images(4).double()
        y = predicted(LinearModel(dtype=torch.float64), x)
        seen: list[tuple[Tensor, Tensor, Tensor]] = []

        def trace(_: int, points: Tensor, logits: Tensor, loss: Tensor, rows: Tensor) -> None:
            seen.append((rows, points, logits))

        x_adv = self.run(model, x, y, norm, gradient=eot(6), trace=trace)
        split, agreed = 0, torch.zeros(4, dtype=torch.bool)
        for rows, points, logits in seen:
            hits = (logits.argmax(2) != y[rows][:, None]).double().mean(1)
            same = (points == x_adv[rows]).flatten(1).all(1)
            agreed[rows] = agreed[rows] | (same & (hits == 1))
            split += int(((hits > 0) & (hits < 1)).sum())
        moved = (x_adv != x).flatten(1).any(1)
        assert bool(moved.any())
        assert bool(agreed[moved].all())
        assert split > 0  # some points did fool a part of the draws, and were not good enough

    def test_stop_success_saves_passes_and_loses_nothing(self, norm: str) -> None:
        # Oracle: counts. What is adversarial already costs one pass, and successes are the same.
        inner = LinearModel()
        x = images(8)
        y = predicted(inner, x)
        half = torch.cat([(y[:4] + 1) % 5, y[4:]])
        counts, fooled = {}, {}
        for stop in ("success", "never"):
            model = Counting(inner)
            fooled[stop] = predicted(inner, self.run(model, x, half, norm, stop=stop)) != half
            counts[stop] = model.forwards
        assert counts["success"] < counts["never"]
        assert torch.equal(fooled["success"], fooled["never"])
        assert bool(fooled["success"].all())
        model = Counting(inner)
        self.run(model, x[:4], half[:4], norm, stop="success")
        assert model.forwards == 4
        model = Counting(inner)
        self.run(model, x, half, norm)
        assert model.forwards == counts["success"]  # the default for a deterministic model
        model.stochastic, model.forwards = True, 0
        self.run(model, x, half, norm)
        assert model.forwards > counts["success"]  # a stochastic one takes every step

    def test_no_host_synchronisation_within_a_step(self, norm: str) -> None:
        # Oracle: count of waiting operations, with few and with many steps.
        model = LinearModel()
        x = images(4, low=0.45, high=0.55)
        y = predicted(model, x)

        def waits(steps: int, stop: str) -> int:
            with HostSyncs() as syncs:
                self.run(model, x, y, norm, steps=steps, stop=stop)
            return syncs.count

        few = waits(2, "never")
        assert waits(12, "never") == few > 0
        assert waits(12, "success") <= waits(2, "success") + 10 * self.kwargs.get("search_steps", 1)

    def test_calls_are_those_documented(self, norm: str) -> None:
        # Oracle: closed form: `steps` (and what the docstring adds) bound the passes of a sample.
        inner = LinearModel()
        model = Counting(inner)
        x = images(3)
        y = predicted(inner, x)
        rounds = self.kwargs.get("search_steps", 1)
        self.run(model, x, y, norm, steps=4, stop="never")
        assert model.forwards <= 3 * (rounds * 5 * self.passes + 2)
