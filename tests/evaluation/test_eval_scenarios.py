"""Scenarios: what is attacked, what is judged, and which draws. Oracle: spies and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from feint.core.errors import ConfigError, FeintError, UnknownNameError
from feint.defenses.base import Defense, Params
from feint.evaluation import SCENARIOS, Batch, Cell, Pipeline, Subject, expand
from feint.evaluation.shard import attack_shard, judge_shard
from tests.evaluation.planted import Coin, Jitter, Opaque, Spy, Steps, Through
from tests.tiny import LinearModel, images

X = images(4)
BATCH = Batch(X, torch.zeros(4, dtype=torch.int64), torch.arange(4))
SPECS = {"model": "m", "defense": "d", "attack": "pgd(steps=2)"}


class Watched(Defense):
    """Doubles contrast, and notes what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[Tensor] = []

    def transform(self, x: Tensor, params: Params) -> Tensor:
        self._seen.append(x.detach().clone())
        return (2 * x - 0.5).clamp(0, 1)


def run(scenario: str) -> dict[str, Any]:
    """Images that each part was asked during the attack and the judgement of one cell."""
    model, source, defense = Spy(LinearModel()), Spy(LinearModel(seed=9)), Watched()
    subject = Subject(model, defense, source)
    cell = Cell(scenario, **SPECS, source="s" if scenario == "transfer" else "")
    found = attack_shard(cell, subject, BATCH, 8)
    attack = {
        "model": model.asked,
        "gradients": model.differentiated,
        "source": source.asked,
        "defense": sum(map(len, defense._seen)),
    }
    for part in (model, source):
        part.forget()
    defense._seen.clear()
    judge_shard(cell, subject, BATCH, found, 8)
    judged = {
        "model": model.asked,
        "source": source.asked,
        "defense": sum(map(len, defense._seen)),
    }
    return {"attack": attack, "judge": judged, "found": found}


@pytest.mark.parametrize(
    ("scenario", "attacked", "defended"),
    [
        ("gray-box", {"model"}, True),
        ("white-box", {"model", "defense"}, True),
        ("removal", {"model", "defense"}, False),
        ("transfer", {"source"}, True),
    ],
)
def test_what_is_attacked_and_what_is_judged(
    scenario: str, attacked: set[str], defended: bool
) -> None:
    found = run(scenario)
    asked = {name for name in ("model", "source", "defense") if found["attack"][name]}
    assert asked == attacked
    if "model" in attacked:
        assert found["attack"]["gradients"] > 0
    judged = found["judge"]
    assert judged["model"] == 8  # four images, and four rounded to 8 bits
    assert judged["defense"] == (8 if defended else 0)
    assert judged["source"] == 0
    # Where another pipeline is judged, every step is taken: 3 forward passes for 2 steps.
    if scenario != "white-box":
        assert found["found"].forwards == 4 * 3


def test_no_attacker_no_attack() -> None:
    model = Spy(LinearModel())
    found = attack_shard(Cell("none", "m"), Subject(model), BATCH, 8)
    assert model.asked == 0
    assert torch.equal(found.x_adv, X)
    judge_shard(Cell("none", "m"), Subject(model), BATCH, found, 8)
    assert model.asked == 8


def test_gray_box_follows_the_bare_models_gradient() -> None:
    """Oracle: one FGSM step against a linear model is the sign of its weights, defense or not."""
    model = LinearModel(dtype=torch.float64)
    x = X.double() * 0.2 + 0.4
    y = model(x).argmin(1)  # far from predicted: the loss's gradient is not small
    batch = Batch(x, y, torch.arange(4))
    cell = Cell("gray-box", "m", "d", "pgd(steps=1, random_start=False, step_size=8/255)")
    bare = attack_shard(cell, Subject(model, Through()), batch, 8)
    other = attack_shard(cell, Subject(model, Steps()), batch, 8)
    assert torch.equal(bare.x_adv, other.x_adv)


@pytest.mark.parametrize("votes", [1, 3])
def test_white_box_attacks_exactly_what_is_judged(votes: int) -> None:
    """Oracle: bit equality of the logits on the same keys."""
    from feint.core import random

    subject = Subject(LinearModel(), Jitter())
    cell = Cell("white-box", **SPECS, votes=votes)
    keys = random.keys(5, 4)
    assert torch.equal(subject.attacked(cell)(X, keys), subject.judged(cell)(X, keys))
    assert subject.attacked(cell).votes == votes


def test_the_cells_rule_is_taken() -> None:
    """Oracle: the misleading rule turns the step around."""
    model = LinearModel()
    y = model(X).argmin(1)
    batch = Batch(X * 0.2 + 0.4, y, torch.arange(4))
    attack = "pgd(steps=1, random_start=False, step_size=8/255, stop='never')"
    moves = []
    for rule in ("identity", "backwards"):
        cell = Cell("white-box", "m", "d", attack, backward=rule)
        subject = Subject(model, Steps(levels=255))
        moves.append(subject.attacker(cell).view.defense.backward_rule)
        attack_shard(cell, subject, batch, 8)
    assert moves == ["identity", "backwards"]


@pytest.mark.parametrize(
    ("defense", "more", "error", "match"),
    [
        (Opaque(), {}, ConfigError, r"nothing stands in for it .*gradient=spsa\(64\)"),
        (Steps(), {"backward": "identty"}, UnknownNameError, "did you mean 'identity'"),
        (Jitter(), {"attack": "pgd(gradient=backprop)"}, ConfigError, "one draw of a random"),
        (Through(), {"norm": "l0"}, ConfigError, "no norm 'l0'"),
        (Through(), {"attack": "pgd(eps=0.5)"}, FeintError, "more than the threat model's"),
        (Through(), {"attack": "pgdd"}, UnknownNameError, "did you mean 'pgd'"),
        (Through(), {"votes": 4}, ConfigError, "nothing in this pipeline is random"),
    ],
)
def test_white_box_cells_that_are_refused(
    defense: Defense, more: dict[str, Any], error: type[Exception], match: str
) -> None:
    cell = Cell("white-box", **{**SPECS, **more})
    with pytest.raises(error, match=match):
        Subject(LinearModel(), defense).attacker(cell)


def test_scores_need_no_rule() -> None:
    """A defense without any backward rule can still be attacked by scores, knowingly."""
    subject = Subject(LinearModel(), Opaque())
    cell = Cell("white-box", "m", "d", "pgd(steps=1, gradient=spsa(4))")
    assert isinstance(subject.attacked(cell), Pipeline)
    attack_shard(cell, subject, BATCH, 8)


def test_targeted_cells_need_targets() -> None:
    cell = Cell("white-box", "m", attack="pgd(steps=1)", targeted=True)
    with pytest.raises(ConfigError, match="needs a target for every sample"):
        attack_shard(cell, Subject(LinearModel()), BATCH, 8)
    aimed = Batch(X, BATCH.y, BATCH.index, torch.full((4,), 3))
    found = attack_shard(cell, Subject(LinearModel()), aimed, 8)
    rows = judge_shard(cell, Subject(LinearModel()), aimed, found, 8)
    assert rows["target"].tolist() == [3] * 4
    hit = LinearModel()(found.x_adv).argmax(1) == 3
    assert rows["target_hits"].tolist() == hit.long().tolist()


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"scenario": "grey-box"}, "did you mean 'gray-box'"),
        ({"scenario": "transfer"}, "needs a source model"),
        ({"source": "s"}, "has no source"),
        ({"attack": "none"}, "'none' goes with 'none'"),
        ({"scenario": "none"}, "'none' goes with 'none'"),
        ({"eps": -1}, "finite number ≥ 0"),
        ({"eps": float("nan")}, "finite number ≥ 0"),
        ({"eps": float("inf")}, "finite number ≥ 0"),
        ({"norm": "l3"}, "expected one of linf"),
        ({"votes": 0}, "votes is 0"),
        ({"judge_draws": 0.5}, "judge_draws is 0.5"),
    ],
)
def test_cells_that_mean_nothing(more: dict[str, Any], match: str) -> None:
    with pytest.raises(FeintError, match=match):
        Cell(**{"scenario": "white-box", **SPECS, **more})


def test_expansion() -> None:
    base = Cell("none", "m", "d", backward="identity", votes=5)
    plain = ["none", "gray-box", "removal", "transfer", "white-box"]
    assert [name for name in SCENARIOS if name in plain] == plain
    cells = expand(base, ["pgd", "fgsm"], plain, source="s")
    names = [(c.scenario, c.defense, c.attack) for c in cells]
    assert names[:4] == [
        ("none", "none", "none"),
        ("white-box", "none", "pgd"),
        ("white-box", "none", "fgsm"),
        ("none", "d", "none"),
    ]
    assert names[4:] == [
        (s, "d", a)
        for s in ("gray-box", "removal", "transfer", "white-box")
        for a in ("pgd", "fgsm")
    ]
    assert {c.votes for c in cells if c.defense == "none"} == {1}
    assert {c.backward for c in cells if c.defense == "none"} == {"default"}
    assert [c.source for c in cells if c.scenario == "transfer"] == ["s", "s"]
    bare = expand(Cell("none", "m"), ["pgd"], ["none", "gray-box", "removal", "white-box"])
    assert [c.scenario for c in bare] == ["none", "white-box"]
    assert len(expand(base, ["pgd", "pgd"], ["white-box"], undefended=False)) == 2
    with pytest.raises(UnknownNameError, match="did you mean 'white-box'"):
        expand(base, [], ["whitebox"])


def test_a_stochastic_bare_model_is_judged_by_draws_without_its_defense() -> None:
    """In `removal` the defense goes, the model's own randomness stays."""
    x = images(4, (3, 2, 2))
    batch = Batch(x, torch.zeros(4, dtype=torch.int64), torch.arange(4))
    cell = Cell("removal", "m", "d", "pgd(steps=1, gradient=eot(2))", judge_draws=6)
    subject = Subject(Coin(0.5), Through())
    rows = judge_shard(cell, subject, batch, attack_shard(cell, subject, batch, 8), 64)
    assert rows["draws"].tolist() == [6] * 4
