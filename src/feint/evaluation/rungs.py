"""The ladder: which cells make up each rung for a pipeline, and what each rung leaves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from feint.core.errors import ConfigError
from feint.core.registry import ATTACKS
from feint.defenses.base import Defense
from feint.evaluation.adaptive import candidates, rule_options
from feint.evaluation.attackers import parse_attack
from feint.evaluation.cell import Cell
from feint.evaluation.metrics import Rate, rate
from feint.evaluation.results import CellResult, by_deployment, worst
from feint.evaluation.scenarios import SCENARIOS, get_scenario

__all__ = ["QUERIES", "ROUNDS", "Rung", "basic_attacks", "ladder", "rung_cells", "white_box_cells"]

QUERIES = 1000
"""Queries per sample that a black-box attacker has, unless told otherwise; attacks that cannot be
stopped at a number keep to it roughly."""
ROUNDS = 50
"""Rounds of a semi-brute force, as in S1's Fig. 3."""
_BASIC = ("pgd", "pgd(loss='margin')")
_UNDEFENDED = ("gray-box", "removal", "semi-brute-force")
"""Scenarios that say nothing of their own where there is no defense."""


def basic_attacks(norm: str) -> list[str]:
    """The attacks that are run where nobody names any."""
    return list(_BASIC) if norm != "l0" else ["fmn", "jsma"]


def rung_cells(
    base: Cell,
    scenario: str,
    attacks: Sequence[str],
    *,
    defense: Defense | None = None,
    sources: Sequence[str] = (),
    queries: int = QUERIES,
    steps: int = 40,
    rounds: int = ROUNDS,
) -> list[Cell]:
    """The cells of one scenario for one pipeline.

    Named attacks go to the scenarios whose attacker can make them: those on scores to `"score"`,
    those on decisions to `"decision"`, those that follow gradients to `"semi-brute-force"`; a
    scenario for which none is named, but for the `basic_attacks`, has attacks of its own.
    `"adaptive"` has its own throughout (`feint.evaluation.adaptive`). Without a defense,
    `"gray-box"`, `"removal"` and `"semi-brute-force"` say what `"white-box"` says, and are empty.

    Args:
        base: Model, defense, threat, judge and seed; its scenario and attack do not count.
        scenario: Its name.
        attacks: Attack expressions.
        defense: The object that `base.defense` names.
        sources: Specs of the models that `"transfer"` attacks.
        queries: Queries per sample of a black-box attacker, where no attack is named.
        steps: Steps of the adaptive attacks.
        rounds: Rounds of the semi-brute force, where no attack is named.

    Raises:
        ConfigError: If nothing that is known fits the scenario in this norm.
        UnknownNameError: If the scenario is unknown.
    """
    kind = get_scenario(scenario)
    clean = replace(base, scenario="none", attack="none", source="")
    if scenario == "none":
        return [clean]
    if base.defense == "none" and scenario in _UNDEFENDED:
        return []
    if scenario == "adaptive":
        tried = candidates(defense, norm=base.norm, targeted=base.targeted, steps=steps)
        return [
            replace(clean, scenario=scenario, attack=c.attack, backward=c.backward) for c in tried
        ]
    random_ = defense is not None and defense.stochastic
    own = {
        "score": lambda: _scores(base.norm, queries, random_),
        "decision": lambda: _decisions(base.norm, queries),
        "semi-brute-force": lambda: _rounds(base.norm, rounds),
    }
    chosen = list(attacks)
    if scenario in own:
        named = [a for a in attacks if a not in basic_attacks(base.norm) and _asks(a, kind.asks)]
        chosen = named or own[scenario]()
    if not chosen:
        raise ConfigError(
            f"no attack is known for scenario {scenario!r} in {base.norm}; name one (--attack), or "
            "leave the scenario out"
        )
    return [
        replace(clean, scenario=scenario, attack=attack, source=source)
        for source in (sources if kind.attacked == "source" else ("",))
        for attack in chosen
    ]


def white_box_cells(base: Cell, attacks: Sequence[str], defense: Defense | None) -> list[Cell]:
    """White-box cells with BPDA (each declared rule), with EOT, and with both.

    Every rule that the defense's parts declare is tried with the first attack, and the recommended
    ones with all. Against a random pipeline each follows the mean over draws; the recommended rules
    are tried on a fresh single draw a step as well, which is BPDA alone. Against parts that declare
    no rule, gradients are estimated from scores.
    """

    def cell(attack: str, backward: str = "default") -> Cell:
        return replace(base, scenario="white-box", source="", attack=attack, backward=backward)

    options = rule_options(defense)
    if not options:
        return [cell("pgd(gradient=spsa(32), steps=10)")]
    cells = [cell(attack) for attack in attacks]
    cells += [cell(attacks[0], rule) for rule in options[1:]]
    first = parse_attack(attacks[0])
    bare = attacks[0] == first.info.name
    if defense is not None and defense.stochastic and bare and first.needs_gradient:
        cells.append(cell(f"{first.info.name}(gradient=eot(1))"))
    return cells


def _asks(text: str, kind: str) -> bool:
    """Whether an attack is of the kind that a scenario's attacker can make."""
    attack = parse_attack(text)
    if kind == "score":
        return not attack.needs_gradient and attack.info.knowledge != "decision"
    if kind == "decision":
        return attack.info.knowledge == "decision"
    return attack.info.knowledge == "gradient" and {"gradient", "stop"} <= set(
        attack.info.parameters
    )


def _fitting(texts: Iterable[str], norm: str) -> list[str]:
    names = ((text, text.partition("(")[0]) for text in texts)
    return [text for text, name in names if name in ATTACKS and norm in ATTACKS[name].norms]


def _scores(norm: str, queries: int, stochastic: bool) -> list[str]:
    """Random search, and gradients estimated from scores, at a number of queries."""
    draws = 4 if stochastic else 1
    pairs = 32
    steps = max(1, queries // (2 * pairs + 1))
    search = f"square(queries={max(1, queries // draws)}"
    search += f", draws={draws})" if stochastic else ")"
    found = _fitting(
        [
            search,
            f"spsa(steps={steps}, samples={pairs})",
            f"one_pixel(popsize={pairs}, generations={steps * 2})",
        ],
        norm,
    )
    return found or [f"pgd(steps={steps}, gradient=spsa({pairs}))"]


def _decisions(norm: str, queries: int) -> list[str]:
    """HopSkipJump with so many probes that ten steps take about so many queries."""
    steps = 10
    roots = sum(math.sqrt(t) for t in range(1, steps + 1))
    probes = max(10, round((queries - 28 * steps - 30) / roots))
    return _fitting([f"hopskipjump(steps={steps}, probes={probes})"], norm)


def _rounds(norm: str, rounds: int) -> list[str]:
    if norm == "l0":
        return _fitting([f"fmn(steps={rounds})"], norm)
    return [f"pgd(steps={rounds}, random_start=False)"]


@dataclass(frozen=True)
class Rung:
    """What one kind of attacker leaves of a pipeline within one threat model."""

    scenario: str
    accuracy: Rate
    """Per-sample worst case over the rung's cells."""
    hits: Rate | None
    """In a targeted threat: share of draws that give the target, under the cell that hits most."""
    cells: tuple[CellResult, ...]

    @property
    def strongest(self) -> CellResult:
        """The cell that leaves the least on its own."""
        return min(self.cells, key=lambda r: r.accuracy.value)

    def as_dict(self) -> dict[str, object]:
        """Plain data."""
        best = self.strongest.cell
        return {
            "scenario": self.scenario,
            "accuracy": self.accuracy.as_dict(),
            "hits": None if self.hits is None else self.hits.as_dict(),
            "cells": len(self.cells),
            "strongest": {"attack": best.attack, "backward": best.backward, "source": best.source},
        }


def ladder(
    results: Sequence[CellResult],
    *,
    norm: str | None = None,
    eps: float | None = None,
    targeted: bool | None = None,
) -> list[Rung]:
    """The rungs of one deployed pipeline, weakest attacker first, and last the worst case of all.

    Args:
        results: Cells of one deployed pipeline (`by_deployment`), over the same samples.
        norm: The threat model; by default that of the first cell with an attack.
        eps: As `norm`.
        targeted: As `norm`.

    Returns:
        A `Rung` for every scenario that has cells: `"none"` for clean accuracy, and at the end
        `"worst case"` over all cells that judge the deployed pipeline.

    Raises:
        ConfigError: If the cells are of several pipelines, or none has an attack.

    Example:
        >>> import torch
        >>> from feint.evaluation import evaluate
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).eval()
        >>> x = torch.rand(8, 3, 2, 2)
        >>> found = evaluate(model, x, model(x).argmax(1), scenarios=["white-box", "score"])
        >>> [rung.scenario for rung in ladder(found.results)]
        ['none', 'score', 'white-box', 'worst case']
    """
    groups = by_deployment(results)
    if len(groups) != 1:
        raise ConfigError(f"the cells are of {len(groups)} pipelines; give those of one")
    first = next((r.cell for r in results if r.cell.attack != "none"), None)
    if first is None:
        raise ConfigError("no cell has an attack, so there is no ladder")
    threat = (
        first.norm if norm is None else norm,
        first.eps if eps is None else eps,
        first.targeted if targeted is None else targeted,
    )
    here = [
        r
        for r in results
        if r.cell.attack == "none" or (r.cell.norm, r.cell.eps, r.cell.targeted) == threat
    ]
    rungs = [
        _rung(name, [r for r in here if r.cell.scenario == name], threat[2]) for name in SCENARIOS
    ]
    deployed = [r for r in here if get_scenario(r.cell.scenario).judged == "pipeline"]
    return [r for r in (*rungs, _rung("worst case", deployed, threat[2])) if r is not None]


def _rung(name: str, cells: list[CellResult], targeted: bool) -> Rung | None:
    if not cells:
        return None
    aimed = [r for r in cells if r.cell.targeted and r.cell.attack != "none"]
    hits = None
    if targeted and aimed:
        best = max(aimed, key=lambda r: r.hits.value)
        hits = rate(best.rows["target_hits"] / best.rows["draws"], best.draws)
    return Rung(name, worst(cells), hits, tuple(cells))
