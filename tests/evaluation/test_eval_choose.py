"""Examples chosen by estimated probability. Oracles: known probabilities, bit equality."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from feint.core import random
from feint.evaluation import Batch, Cell, Subject
from feint.evaluation.choose import KEPT, Shortlist
from feint.evaluation.shard import attack_shard, judge_shard
from tests.evaluation.planted import Jitter, Through, plant
from tests.tiny import LinearModel, images

X = images(6, (3, 2, 2)) * 0.2
Y = torch.zeros(6, dtype=torch.int64)


class Bright(nn.Module):
    """Says class 1 with a probability that is the image's mean brightness; keyed."""

    stochastic = True

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        keys = random.entropy_keys(len(x), x.device) if keys is None else keys
        wrong = (random.uniform(keys) < x.mean((1, 2, 3))).to(x.dtype)
        return torch.stack([torch.full_like(wrong, 0.5), wrong], 1) + 0 * x.mean((1, 2, 3))[:, None]


def lucky(
    model: Any, x: Tensor, y: Tensor, *, eps: float = 1.0, seed: Any = 0, trace: Any = None
) -> Tensor:
    """Evaluates images of brightness 0.2 (a lucky success), 0.9 (seen to fail once) and beyond."""
    rows = torch.arange(len(x))
    hit, miss = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    for value, said in ((0.2, hit), (0.9, miss), (0.5, miss)):
        logits = said.expand(len(x), 1, 2)
        trace(0, torch.full_like(x, value), logits, torch.zeros(len(x)), rows)
    return torch.full_like(x, 0.2)


def test_a_lucky_point_loses_to_a_likely_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the probabilities: 0.9 and not 0.2; white-box takes what the attack returned."""
    name = plant(monkeypatch, "lucky", lucky)
    batch, subject = Batch(X, Y, torch.arange(6)), Subject(Bright(), Through())
    found = {}
    for scenario in ("white-box", "adaptive"):
        cell = Cell(scenario, "m", "d", name, eps=1.0)
        monkeypatch.setattr("feint.evaluation.attackers.Attacker._refuse_single_draws", _nothing)
        found[scenario] = attack_shard(cell, subject, batch, 4)
        rows = judge_shard(cell, subject, batch, found[scenario], 64)
        right = 1 - rows["correct"].mean() / 32
        assert right == pytest.approx(0.9 if scenario == "adaptive" else 0.2, abs=0.12)
    assert (found["adaptive"].x_adv == 0.9).all()
    assert (found["white-box"].x_adv == 0.2).all()


def _nothing(self: object) -> None:
    return None


def test_points_beyond_the_budget_are_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a budget that holds 0.5 but not 0.9, 0.5 is taken."""
    name = plant(monkeypatch, "lucky", lucky)
    monkeypatch.setattr("feint.evaluation.attackers.Attacker._refuse_single_draws", _nothing)
    cell = Cell("adaptive", "m", "d", name, eps=0.5)
    found = attack_shard(cell, Subject(Bright()), Batch(X, Y, torch.arange(6)), 6)
    assert (found.x_adv == 0.5).all()


def test_the_list_keeps_the_best() -> None:
    """Six evaluations of rising loss and one of a higher share. Oracle: sorted by hand."""
    listed = Shortlist(X[:2], Y[:2], False, "linf", 1.0)
    rows = torch.tensor([0, 1, 0])  # the first sample has two restarts
    for step in range(6):
        points = torch.stack([X[0] + 0.01 * step, X[1] + 0.01 * step, X[0] - 1.0])
        logits = torch.tensor([[1.0, 0.0]]).expand(3, 1, 2)
        listed(step, points, logits, torch.tensor([step, -step, -9.0]), rows)
    logits = torch.tensor([[0.0, 1.0]])[:, None]
    listed(6, X[:1] + 0.5, logits, torch.tensor([-5.0]), torch.tensor([0]))
    kept = sorted(float((p - X[0]).mean()) for p in listed.points[0])
    assert kept == pytest.approx([0.03, 0.04, 0.05, 0.5], abs=1e-6)
    kept = sorted(float((p - X[1]).mean()) for p in listed.points[1])
    assert kept == pytest.approx([0.0, 0.01, 0.02, 0.03], abs=1e-6)
    assert listed.points.shape[1] == KEPT


def test_where_nothing_is_random_nothing_is_chosen() -> None:
    """And the address of such a cell says nothing of it; that of a random one does."""
    cell = Cell("adaptive", "m", "d", "pgd(steps=2)")
    fixed, rolled = Subject(LinearModel(), Through()), Subject(LinearModel(), Jitter())
    assert not fixed.attacker(cell).choose
    assert rolled.attacker(cell).choose
    assert "chosen" not in fixed.context(cell, "data")["attack"]
    assert "chosen of 4 on 24 draws" in rolled.context(cell, "data")["attack"]


@pytest.mark.parametrize("size", [2, 6])
def test_the_choice_does_not_depend_on_the_batch(size: int) -> None:
    """Oracle: bit equality on a linear model."""
    x = images(6)
    subject = Subject(LinearModel(), Jitter(sigma=0.3))
    cell = Cell("adaptive", "m", "d", "pgd(steps=4, gradient=eot(2))", eps=0.1)
    batch = Batch(x, Y, torch.arange(6))
    whole = attack_shard(cell, subject, batch, 6)
    assert torch.equal(attack_shard(cell, subject, batch, size).x_adv, whole.x_adv)
    plain = attack_shard(Cell("white-box", "m", "d", cell.attack, eps=0.1), subject, batch, 6)
    assert whole.forwards == plain.forwards + 6 * (KEPT + 1) * 24
    assert bool(((whole.x_adv - x).abs() <= 0.1 + 1e-7).all())
