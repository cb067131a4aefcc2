from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from feint.attacks import hopskipjump
from feint.core import random
from feint.core.errors import RangeError, ShapeError
from feint.core.norms import distance
from tests.contracts.attack import AttackContract
from tests.contracts.attack_harness import HostSyncs
from tests.tiny import Counting, LinearModel, Round, TinyConv, behind, images, predicted


class TestHopSkipJump(AttackContract):
    attack = staticmethod(hopskipjump)
    kwargs: ClassVar = {"steps": 4, "probes": 25}
    random = True

    def test_finds_the_least_distance_on_a_linear_model(self, norm: str) -> None:
        # Oracle: closed form. A walk follows the boundary with the class in which it began, which
        # need not be the nearest: its distance is compared with that of the class it ends in.
        model = LinearModel(dtype=torch.float64)
        x = images(6, low=0.4, high=0.6).double()
        y = predicted(model, x)
        x_adv = self.run(model, x, y, norm, steps=10, probes=100)
        reached = predicted(model, x_adv)
        assert bool((reached != y).all())
        own = model.distances(x, y, norm).gather(1, reached[:, None])[:, 0]
        assert bool((distance(x_adv, x, norm) >= model.distance(x, y, norm)).all())
        assert bool((distance(x_adv, x, norm) <= 1.3 * own).all())


class OneHot(nn.Module):
    """Nothing but the decision of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        return torch.zeros_like(logits).scatter(1, logits.argmax(1, keepdim=True), 1.0)


@pytest.mark.parametrize(("norm", "most"), [("l2", 1.03), ("linf", 1.15)])
def test_finds_the_least_distance(norm: str, most: float) -> None:
    # Oracle: closed form, |z_y − z_j| / ‖w_y − w_j‖_q, q dual to the norm.
    model = LinearModel(classes=2, dtype=torch.float64)
    x = images(4, low=0.35, high=0.65, seed=4).double()
    y = predicted(model, x)
    x_adv = hopskipjump(model, x, y, norm=norm, steps=20, probes=150)
    assert bool((predicted(model, x_adv) != y).all())
    ratio = distance(x_adv, x, norm) / model.distance(x, y, norm)
    assert bool((ratio >= 1 - 1e-9).all())
    assert bool((ratio <= most).all()), ratio


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_only_decisions_are_used(norm: str) -> None:
    # Oracle: the same run on a model that tells nothing else, bit by bit.
    model = TinyConv()
    x = images(3, (3, 6, 6)).double()
    y = predicted(model, x)
    kwargs: dict[str, Any] = {"norm": norm, "steps": 3, "probes": 20}
    found = hopskipjump(model, x, y, **kwargs)
    assert torch.equal(hopskipjump(OneHot(model), x, y, **kwargs), found)
    rounded = behind(Round(64), model)  # a gradient of zero is no matter
    assert bool((predicted(rounded, hopskipjump(rounded, x, y, **kwargs)) != y).all())


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_queries_are_those_documented(norm: str) -> None:
    # Oracle: closed form; 8 starts are enough for a linear model.
    inner = LinearModel()
    model = Counting(inner)
    x = images(3)
    y = predicted(inner, x)
    hopskipjump(model, x, y, norm=norm, steps=4, probes=30, most_probes=50)
    halvings = math.ceil(math.log2(48**1.5 if norm == "l2" else 48**2))
    probes = 30 + 42 + 50 + 50  # 30√2 = 42.4, then the most
    assert model.forwards == 3 * (1 + 8 + halvings + probes + 4 * (10 + halvings))
    assert model.backwards == 0
    for n, expected in ((3 * 32 * 32, (18, 24)), (3 * 224 * 224, (26, 35))):
        assert (math.ceil(1.5 * math.log2(n)), math.ceil(2 * math.log2(n))) == expected


def test_waits_do_not_grow_with_the_steps() -> None:
    # Oracle: count of waiting operations.
    model = LinearModel()
    x = images(3)
    y = predicted(model, x)

    def waits(steps: int, stop: str) -> int:
        with HostSyncs() as syncs:
            hopskipjump(model, x, y, steps=steps, probes=5, stop=stop)
        return syncs.count

    for stop in ("success", "never"):
        assert waits(8, stop) == waits(2, stop)


def test_a_target_is_reached_from_a_start_of_its_class() -> None:
    # Oracle: closed form: the distance to the boundary with the target, where it is the nearest.
    model = LinearModel(classes=3, dtype=torch.float64)
    x = images(6, low=0.35, high=0.65, seed=2).double()
    y = predicted(model, x)
    target = model.distances(x, y, "l2").argmin(1)
    pool = images(200, seed=5).double()
    start = torch.stack([pool[predicted(model, pool) == t][0] for t in target])
    x_adv = hopskipjump(model, x, target, targeted=True, start=start, tries=1, steps=12, probes=80)
    assert torch.equal(predicted(model, x_adv), target)
    assert bool((distance(x_adv, x, "l2") <= 1.3 * model.distance(x, y, "l2")).all())


def test_what_is_adversarial_already_stays() -> None:
    # Oracle: closed form: its distance is zero, and it costs one query.
    inner = LinearModel()
    model = Counting(inner)
    x = images(4)
    wrong = (predicted(inner, x) + 1) % 5
    assert torch.equal(hopskipjump(model, x, wrong), x)
    assert model.forwards == 4
    assert torch.equal(hopskipjump(inner, x, wrong, stop="never", steps=1, probes=4), x)


def test_the_mask_confines_starts_probes_and_steps() -> None:
    # Oracle: the trace: no query differs from the clean image outside of the mask.
    model = LinearModel()
    x = images(3)
    y = predicted(model, x)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., :3] = True
    outside = ~mask.expand_as(x)

    def trace(_: int, points: Tensor, logits: Tensor, loss: Tensor, rows: Tensor) -> None:
        changed = (points - x[rows]).masked_fill(~outside[rows], 0)
        assert float(changed.abs().max()) == 0
        torch.testing.assert_close(loss, -distance(points, x[rows], "l2"))

    x_adv = hopskipjump(model, x, y, steps=3, probes=20, mask=mask, trace=trace)
    assert bool((predicted(model, x_adv) != y).all())


def test_more_queries_come_nearer() -> None:
    # Oracle: property: what a longer walk has seen includes what the shorter one has.
    model = TinyConv()
    x = images(4, (3, 6, 6)).double()
    y = predicted(model, x)
    keys = random.keys(0, 4)
    short, long = (hopskipjump(model, x, y, steps=s, probes=40, seed=keys) for s in (1, 6))
    assert bool((distance(long, x, "l2") <= distance(short, x, "l2")).all())
    assert bool((distance(long, x, "l2") < 0.9 * distance(short, x, "l2")).any())


def test_bad_options() -> None:
    model, x, y = LinearModel(), images(2), torch.tensor([0, 1])
    for name, value in (("probes", 0), ("tries", 0), ("gamma", 0.0), ("most_probes", 0)):
        with pytest.raises(RangeError, match=name):
            hopskipjump(model, x, y, **{name: value})
    with pytest.raises(ShapeError, match="start"):
        hopskipjump(model, x, y, start=x[:1])
