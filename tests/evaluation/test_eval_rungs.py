"""The ladder's rungs and the adaptive attacker. Oracles: the declarations, and numbers by hand."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from feint.core.errors import ConfigError, UnknownNameError
from feint.core.registry import DEFENSES
from feint.defenses import parse
from feint.defenses.base import Defense, Params, backward_rule
from feint.evaluation import SCENARIOS, Batch, Cell, Subject, expand
from feint.evaluation.adaptive import candidates, rule_options
from feint.evaluation.attackers import parse_attack
from feint.evaluation.breaks import BREAKS, Break, known_break
from feint.evaluation.rungs import basic_attacks, ladder, rung_cells, white_box_cells
from feint.evaluation.shard import attack_shard
from tests.evaluation.planted import Coin, Jitter, Opaque, Spy, Steps, Through
from tests.evaluation.test_eval_results import result
from tests.tiny import LinearModel, images

BASE = Cell("none", "m", "d")
X = images(4)
BATCH = Batch(X, torch.zeros(4, dtype=torch.int64), torch.arange(4))


class Broken(Steps):
    """A third party's defense that declares how it is broken."""

    known_break: ClassVar[dict[str, Any]] = {
        "rule": "backwards",
        "draws": 12,
        "losses": ("margin",),
        "attacks": ("fgsm",),
    }


# --- what goes where -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scenario", "attacks", "expected"),
    [
        ("none", ["pgd"], ["none"]),
        ("gray-box", ["pgd", "square"], ["pgd", "square"]),
        ("white-box", ["pgd", "square"], ["pgd", "square"]),
        ("score", ["pgd", "square(queries=9)"], ["square(queries=9)"]),
        ("score", ["pgd(gradient=spsa(4))", "hopskipjump"], ["pgd(gradient=spsa(4))"]),
        ("score", ["pgd"], ["square(queries=130)", "spsa(steps=2, samples=32)"]),
        ("decision", ["pgd", "hopskipjump(steps=2)"], ["hopskipjump(steps=2)"]),
        ("decision", ["pgd"], ["hopskipjump(steps=10, probes=10)"]),
        ("semi-brute-force", ["pgd"], ["pgd(steps=7, random_start=False)"]),
        ("semi-brute-force", ["bim(steps=3)", "square"], ["bim(steps=3)"]),
    ],
)
def test_attacks_go_to_those_who_can_make_them(
    scenario: str, attacks: list[str], expected: list[str]
) -> None:
    cells = rung_cells(BASE, scenario, attacks, defense=Through(), queries=130, rounds=7)
    assert [(c.scenario, c.attack) for c in cells] == [(scenario, a) for a in expected]


def test_a_random_pipeline_is_asked_several_times_for_a_score() -> None:
    """Queries stay what they are: a quarter of the points, four draws each."""
    first = rung_cells(BASE, "score", [], defense=Jitter(), queries=400)[0]
    assert parse_attack(first.attack).kwargs == {"queries": 100, "draws": 4}


@pytest.mark.parametrize("scenario", ["gray-box", "removal", "semi-brute-force"])
def test_without_a_defense_there_is_nothing_to_leave_out(scenario: str) -> None:
    assert rung_cells(Cell("none", "m"), scenario, ["pgd"]) == []


def test_several_sources() -> None:
    cells = expand(BASE, ["pgd"], ["transfer"], source=["a", "b"], undefended=False)
    assert [c.source for c in cells] == ["", "a", "b"]


@pytest.mark.parametrize("norm", ["l1", "l0"])
def test_a_norm_without_attacks_on_decisions(norm: str) -> None:
    base = Cell("none", "m", "d", norm=norm)
    with pytest.raises(ConfigError, match=f"no attack is known for scenario 'decision' in {norm}"):
        rung_cells(base, "decision", ["pgd"], defense=Through())


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if s not in ("none", "decision")])
def test_every_rung_has_attacks_that_fit_every_threat(
    norm: str, targeted: bool, scenario: str
) -> None:
    """Oracle: the attacker accepts them before any work."""
    subject = Subject(LinearModel(), Jitter(), LinearModel(seed=9))
    base = Cell("none", "m", "d", norm=norm, targeted=targeted)
    cells = rung_cells(base, scenario, basic_attacks(norm), defense=subject.defense, sources=["s"])
    assert cells
    for cell in cells:
        subject.attacker(cell).settings()


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scenario", "defense", "attack", "match"),
    [
        ("score", Through(), "pgd", "sees scores and no gradients"),
        ("decision", Through(), "square", "sees decisions only"),
        ("semi-brute-force", Through(), "square", "follows gradients and stops"),
        ("semi-brute-force", Jitter(), "pgd(gradient=backprop)", "one draw of a random"),
        ("adaptive", Opaque(), "pgd", "nothing stands in for it"),
        ("adaptive", Jitter(), "pgd(gradient=backprop)", "one draw of a random"),
        ("white-box", Jitter(), "worst_of(attacks='pgd(gradient=backprop)')", "one draw of a"),
        ("adaptive", Jitter(), "worst_of(attacks='pgd, bim(gradient=backprop)')", "one draw of a"),
    ],
)
def test_cells_that_ignore_a_part_are_refused(
    scenario: str, defense: Defense, attack: str, match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        Subject(LinearModel(), defense).attacker(Cell(scenario, "m", "d", attack))


def test_black_boxes_never_differentiate() -> None:
    """Oracle: a spy on the model."""
    for scenario, attack in (("score", "square(queries=9)"), ("decision", "hopskipjump(steps=1)")):
        spy = Spy(LinearModel())
        attack_shard(Cell(scenario, "m", "d", attack), Subject(spy, Steps()), BATCH, 8)
        assert spy.asked > 0
        assert spy.differentiated == 0


# --- rules and breaks ----------------------------------------------------------------------------


def test_rules_part_by_part() -> None:
    assert rule_options(None) == ["default"]
    assert rule_options(parse("fd")) == ["default", "aligned", "identity"]
    assert rule_options(parse("fd*2 + rdg")) == [
        "default",
        "aligned + aligned + default",
        "identity + identity + default",
        "default + default + identity",
    ]
    assert rule_options(Opaque()) == []


@pytest.mark.parametrize("rule", ["aligned + default", "default + identity"])
def test_rules_of_a_chain_in_a_cell(rule: str) -> None:
    """Oracle: the rules that the view's own parts say they have."""
    subject = Subject(LinearModel(), parse("fd + rdg"))
    view = subject.attacked(Cell("white-box", "m", "fd + rdg", "pgd", backward=rule))
    wanted = [r if r != "default" else None for r in rule.split(" + ")]
    parts = view.defense.views
    for part, asked in zip(parts, wanted, strict=True):
        assert part.backward_rule == (asked or part.defense.recommended_rule)


def test_the_table_of_breaks_fits_the_defenses() -> None:
    """Every built-in defense has an entry with a source, whose rule it declares."""
    missing = [name for name in DEFENSES if name not in BREAKS and not _own(name)]
    assert missing == []
    for name in DEFENSES:
        entry = BREAKS.get(name)
        if entry is None:
            continue
        assert entry.source
        rules = DEFENSES[name].component.backward_rules()
        assert entry.rule in ("default", *rules), name
        for attack in entry.attacks:
            parse_attack(attack)


def _own(name: str) -> bool:
    return hasattr(DEFENSES[name].component, "known_break")


def test_a_third_party_declares_its_break() -> None:
    assert known_break(Broken()) == Break("backwards", 12, 40, ("margin",), ("fgsm",))
    tried = candidates(Broken())
    assert (tried[0].backward, tried[0].attack) == ("backwards", "pgd(loss='margin')")
    assert ("backwards", "fgsm") in [(c.backward, c.attack) for c in tried]
    assert known_break(Steps()) == Break()


@pytest.mark.parametrize(
    ("declared", "error", "match"),
    [
        ({"rule": "identty"}, UnknownNameError, "did you mean 'identity'"),
        ({"stps": 3}, UnknownNameError, "did you mean 'steps'"),
        ("pgd", ConfigError, "expected a mapping"),
        ({"draws": 0}, ConfigError, "draws 0; expected a whole number"),
        ({"losses": ()}, ConfigError, "no loss"),
    ],
)
def test_breaks_that_are_none(declared: Any, error: type[Exception], match: str) -> None:
    class Wrong(Steps):
        known_break = declared

    with pytest.raises(error, match=match):
        known_break(Wrong())


def test_a_break_comes_first_and_the_search_varies_everything() -> None:
    """FD's own break is a rule, RDG's 30 draws; the search has rules, losses, draws, restarts."""
    found = candidates(parse("fd + rdg"))
    assert found[0].origin.startswith("known break of fd, rdg")
    assert parse_attack(found[0].attack).kwargs["gradient"].__qualname__ == "eot(30)"
    rules = {c.backward for c in found}
    assert set(rule_options(parse("fd + rdg"))) <= rules
    words = " ".join(c.attack for c in found)
    for needed in ("loss='margin'", "apgd", "eot(1)", "eot(32)", "steps=320"):
        assert needed in words
    assert len({(c.backward, c.attack) for c in found}) == len(found)
    fixed = [c.attack for c in candidates(parse("fd"))]
    assert any("restarts=3" in a for a in fixed)
    assert not any("eot" in a for a in fixed)


def test_few_draws_are_taken_exactly() -> None:
    """Eight neighbours: no more draws than these, and a sample leaves when all are adversarial."""
    found = [c.attack for c in candidates(parse("pixel_shift(random=True)"))]
    assert "pgd(stop='success')" in found
    assert not any("eot(30)" in a or "eot(9)" in a for a in found)


def test_without_a_rule_gradients_come_from_scores() -> None:
    found = candidates(Opaque())
    assert found
    assert not any(parse_attack(c.attack).needs_gradient for c in found)


class Dice(Opaque):
    """Random, and without a rule."""

    stochastic = True

    def draw(self, keys: Tensor, shape: torch.Size) -> Params:
        return {}


def test_bpda_eot_and_both() -> None:
    """Each declared rule, the mean over draws, and one draw a step."""
    texts = [
        (c.backward, c.attack) for c in white_box_cells(BASE, ["pgd", "bim"], parse("fd + rdg"))
    ]
    assert texts == [
        ("default", "pgd"),
        ("default", "bim"),
        ("aligned + default", "pgd"),
        ("identity + default", "pgd"),
        ("default + identity", "pgd"),
        ("default", "pgd(gradient=eot(1))"),
    ]
    (only,) = white_box_cells(BASE, ["pgd"], Dice())
    assert not parse_attack(only.attack).needs_gradient


class TwoRules(Steps):
    """Stands in with another function, too."""

    @backward_rule("half")
    def half(self, x: Tensor, params: Params) -> Tensor:
        return x / 2


def test_adaptive_shares_its_examples_with_white_box() -> None:
    """Oracle: equal addresses, for an equal attack on an equal view."""
    subject = Subject(LinearModel(), TwoRules())
    cells = [
        *white_box_cells(BASE, basic_attacks("linf"), subject.defense),
        *rung_cells(BASE, "adaptive", [], defense=subject.defense),
    ]
    addresses = {
        (c.scenario, c.backward, c.attack): c.attack_key(subject.context(c, "data")) for c in cells
    }
    for attack in ("pgd", "pgd(loss='margin')"):
        same = [addresses[s, "default", attack] for s in ("white-box", "adaptive")]
        assert len(set(same)) == 1


# --- the ladder ----------------------------------------------------------------------------------


def test_the_ladder_is_the_worst_case_of_each_rung() -> None:
    """Oracle: counted by hand. The removal rung judges another pipeline and is no worst case."""

    def cell(scenario: str, attack: str = "pgd", **more: Any) -> Cell:
        return Cell(scenario, "m", "d", "none" if scenario == "none" else attack, **more)

    rungs = ladder(
        [
            result(cell("none"), [1, 1, 1, 1]),
            result(cell("gray-box"), [1, 1, 1, 0]),
            result(cell("removal"), [0, 0, 0, 0]),
            result(cell("white-box"), [0, 1, 1, 1]),
            result(cell("white-box", "bim"), [1, 0, 1, 1]),
            result(cell("white-box", eps=0.5), [0, 0, 0, 0]),  # another threat
            result(cell("adaptive"), [1, 1, 0, 1]),
        ]
    )
    assert [(r.scenario, r.accuracy.value, len(r.cells)) for r in rungs] == [
        ("none", 1.0, 1),
        ("gray-box", 0.75, 1),
        ("removal", 0.0, 1),
        ("white-box", 0.5, 2),
        ("adaptive", 0.75, 1),
        ("worst case", 0.0, 5),
    ]
    assert rungs[3].as_dict()["strongest"] == {"attack": "pgd", "backward": "default", "source": ""}
    assert rungs[0].hits is None


def test_the_ladder_of_a_targeted_threat() -> None:
    aimed = Cell("white-box", "m", "d", "pgd", targeted=True)
    rows = result(aimed, [1, 1, 0, 0], target_hits=np.array([0, 0, 0, 1]))
    rungs = ladder([result(Cell("none", "m", "d", targeted=True), [1, 1, 1, 1]), rows])
    assert rungs[1].hits is not None
    assert (rungs[1].accuracy.value, rungs[1].hits.value) == (0.5, 0.25)
    assert rungs[0].hits is None


def test_no_ladder() -> None:
    with pytest.raises(ConfigError, match="no cell has an attack"):
        ladder([result(BASE, [1])])
    with pytest.raises(ConfigError, match="of 2 pipelines"):
        ladder([result(BASE, [1]), result(Cell("none", "n"), [1])])


def test_semi_brute_force_goes_by_another_address() -> None:
    """Same objects and attack, other examples: white-box and semi-brute force are told apart."""
    subject = Subject(Coin(0.9), Through())
    cells = [
        Cell(s, "m", "d", "pgd(steps=2, gradient=eot(2))")
        for s in ("white-box", "semi-brute-force")
    ]
    assert len({c.attack_key(subject.context(c, "data")) for c in cells}) == 2
