"""The story figure's data: per pipeline, the published claim and every rung of knowledge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feint.evaluation import SCENARIOS, CellResult
from feint.evaluation.results import worst
from feint.reports.data import ReportData, Threat, threats
from feint.reports.words import attack_words, deployment_words, threat_words

__all__ = ["Lane", "Mark", "story"]


@dataclass(frozen=True)
class Mark:
    """One row of a lane: a dot with its whiskers, or a diamond for a claim."""

    kind: str
    """`"claim"`, or the scenario's name (`"none"` is clean accuracy)."""
    label: str
    value: float
    low: float
    high: float
    note: str = ""
    others: tuple[float, ...] = ()
    """Accuracy under each attack, where the dot is the worst case of several."""

    @property
    def measured(self) -> bool:
        """Whether the mark has an interval."""
        return self.kind != "claim"


@dataclass(frozen=True)
class Lane:
    """A deployed pipeline within one threat model."""

    name: str
    threat: str
    marks: tuple[Mark, ...]


def story(data: ReportData) -> list[Lane]:
    """One lane per deployed pipeline and threat model, in order of appearance."""
    lanes = []
    for key, group in data.pipelines().items():
        clean = data.clean(group[0])
        known: list[Threat | None] = [*threats(group)]
        for threat in known or [None]:
            marks = [] if clean is None else [_dot("none", "clean", [clean])]
            marks += _rungs(data, group, threat)
            words = "no attacker" if threat is None else threat_words(threat)
            lanes.append(Lane(deployment_words(key), words, tuple(marks)))
    return lanes


def _rungs(
    data: ReportData,
    group: Sequence[CellResult],
    threat: Threat | None,
) -> list[Mark]:
    marks: list[Mark] = []
    for name in SCENARIOS:
        if name == "none":
            continue
        cells = [
            r
            for r in group
            if r.cell.scenario == name and (r.cell.norm, r.cell.eps, r.cell.targeted) == threat
        ]
        claimed = [(r, claim) for r in cells if (claim := data.claim(r)) is not None]
        for claim in dict.fromkeys(c for _, c in claimed):
            value = data.worth(claim, claimed[0][0])
            if value is not None:
                note = f"{name}, " + claim.words().partition(", ")[0]
                marks.append(Mark("claim", "published", value, value, value, note))
            if len(cells) > 1:  # beside the claim its own attack, not the worst of several
                again = [r for r, c in claimed if c == claim]
                marks.append(_dot(name, "reproduced", again))
        if cells:
            marks.append(_dot(name, name, cells))
    return marks


def _dot(kind: str, label: str, cells: Sequence[CellResult]) -> Mark:
    bound = worst(cells)
    if len(cells) > 1:
        note = f"worst of {len(cells)} attacks"
        others = tuple(c.accuracy.value for c in cells)
    else:
        note = "" if kind == "none" else attack_words(cells[0].cell)
        note = note if label in ("clean", kind) else f"{kind}, {note}"
        others = ()
    return Mark(kind, label, bound.value, bound.low, bound.high, note, others)
