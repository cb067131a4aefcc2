"""The ladder figure's data: per pipeline, what was published and what each attacker leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feint.evaluation import SCENARIOS, CellResult, Rate
from feint.evaluation.results import worst
from feint.evaluation.scenarios import get_scenario
from feint.reports.claims import published
from feint.reports.data import Deployment, ReportData, Threat, threats
from feint.reports.words import attack_words, deployment_words, percent, threat_words

__all__ = ["KINDS", "Lane", "Mark", "story"]

KINDS = ("none", "bare", "claim", *(name for name in SCENARIOS if name != "none"), "worst")
"""Kinds of marks, in the order of the legend: clean, the undefended control, published, every
scenario from the weakest attacker to the strongest, and the worst case of all."""


@dataclass(frozen=True)
class Mark:
    """One row of a lane: a dot with its whiskers, or a diamond for a claim."""

    kind: str
    """One of `KINDS`."""
    label: str
    value: float
    low: float
    high: float
    note: str = ""
    others: tuple[float, ...] = ()
    """Accuracy under each attack, where the dot is the worst case of several."""
    context: bool = False
    """Whether a claim is about another model, other data or another budget than the run's."""

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

    @property
    def clean(self) -> float | None:
        """Accuracy without attacker, the lane's line of reference."""
        return next((m.value for m in self.marks if m.kind == "none"), None)


def story(data: ReportData) -> list[Lane]:
    """One lane per deployed pipeline and threat model, in order of appearance.

    The bare model has no lane of its own where a defended one shows it as its control and nothing
    but white-box attacks was run on it.
    """
    lanes = []
    pipelines = data.pipelines()
    shown = {
        (key[0], threat)
        for key, group in pipelines.items()
        if key[1] != "none"
        for threat in threats(group)
    }
    for key, group in pipelines.items():
        clean = data.clean(group[0])
        plain = key[1] == "none" and {r.cell.scenario for r in group} <= {"none", "white-box"}
        known: list[Threat | None] = [*threats(group)]
        for threat in known or [None]:
            if plain and (key[0], threat) in shown:
                continue
            marks = [] if clean is None else [_dot("none", "clean", [clean])]
            marks += _control(pipelines, key, threat)
            marks += _rungs(data, key, group, threat)
            words = "no attacker" if threat is None else threat_words(threat)
            lanes.append(Lane(deployment_words(key), words, tuple(marks)))
    return lanes


def _here(group: Sequence[CellResult], threat: Threat | None) -> list[CellResult]:
    return [
        r
        for r in group
        if r.cell.attack != "none" and (r.cell.norm, r.cell.eps, r.cell.targeted) == threat
    ]


def _control(
    pipelines: dict[Deployment, list[CellResult]], key: Deployment, threat: Threat | None
) -> list[Mark]:
    """The bare model under the same threat: what the attacks are worth where nothing defends."""
    if key[1] == "none":
        return []
    bare = pipelines.get((key[0], "none", 1, "mean_probability"), [])
    cells = [r for r in _here(bare, threat) if r.cell.scenario == "white-box"]
    return [_dot("bare", "undefended", cells)] if cells else []


def _rungs(
    data: ReportData, key: Deployment, group: Sequence[CellResult], threat: Threat | None
) -> list[Mark]:
    marks: list[Mark] = []
    here = _here(group, threat)
    own = any(data.claim(r) is not None for r in group)
    for name in SCENARIOS:
        if name == "none":
            continue
        cells = [r for r in here if r.cell.scenario == name]
        claimed = [(r, claim) for r in cells if (claim := data.claim(r)) is not None]
        for claim in dict.fromkeys(c for _, c in claimed):
            value = data.worth(claim, claimed[0][0])
            if value is not None:
                note = f"{name}, " + claim.words().partition(", ")[0]
                marks.append(Mark("claim", "published", value, value, value, note))
            if len(cells) > 1:  # beside the claim its own attack, not the worst of several
                again = [r for r, c in claimed if c == claim]
                marks.append(_dot(name, "reproduced", again))
        if here and not own:
            marks += _context(data, key, group[0], name)
        if cells:
            marks.append(_dot(name, name, cells))
    judged = [r for r in here if get_scenario(r.cell.scenario).judged == "pipeline"]
    if len({r.cell.scenario for r in judged}) > 1:
        marks.append(_worst(data, key, judged, threat))
    return marks


def _context(data: ReportData, key: Deployment, any_cell: CellResult, scenario: str) -> list[Mark]:
    """What was published about the defense in this scenario, about other models and data."""
    marks = []
    for found in published(key[1]):
        share = found.share_of
        clean = data.reference(any_cell) if share == "bare" else data.clean(any_cell)
        if found.scenario != scenario or (share and clean is None):
            continue
        scale = clean.accuracy.value if share and clean is not None else 1.0
        ends = [percent(v) for v in dict.fromkeys((found.low, found.high))]
        words = f"{' to '.join(ends)} %" + (" of clean accuracy" if share else "")
        # One plain number is the mark's own value.
        number = f"; {words}" if share or len(ends) > 1 else ""
        note = f"{found.source}: {found.about}{number}"
        low, high = scale * found.low, scale * found.high
        middle = (low + high) / 2
        marks.append(Mark("claim", "published", middle, low, high, note, context=True))
    return marks


def _worst(
    data: ReportData, key: Deployment, judged: Sequence[CellResult], threat: Threat | None
) -> Mark:
    """The verdict's bound, or the worst of what was tried where nobody who knows was."""
    bound: Rate | None = next(
        (
            b.worst
            for b in data.verdict.bounds
            if (b.model, b.defense, b.votes, b.combine) == key
            and (b.norm, b.eps, b.targeted) == threat
        ),
        None,
    )
    if bound is None:
        found, note = worst(judged), "of what was tried: no bound, nobody who knows was"
    else:
        found, note = bound, f"per sample, {len(judged)} attacks"
    return Mark("worst", "worst case", found.value, found.low, found.high, note)


def _dot(kind: str, label: str, cells: Sequence[CellResult]) -> Mark:
    bound = worst(cells)
    if len(cells) > 1:
        note = f"worst of {len(cells)} attacks"
        others = tuple(c.accuracy.value for c in cells)
    else:
        note = "" if kind == "none" else attack_words(cells[0].cell)
        note = note if label in ("clean", "undefended", kind) else f"{kind}, {note}"
        others = ()
    return Mark(kind, label, bound.value, bound.low, bound.high, note, others)
