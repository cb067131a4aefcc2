"""The result table as plain text cells, from which terminal and Markdown are drawn."""

from __future__ import annotations

from dataclasses import dataclass

from feint.core.errors import UnknownNameError
from feint.evaluation import CellResult
from feint.evaluation.scenarios import get_scenario
from feint.reports.data import Claim, ReportData, threats
from feint.reports.words import (
    attack_words,
    budget,
    deployment_words,
    interval,
    mean,
    passes,
    percent,
    rate_words,
    significant,
    threat_words,
)

__all__ = [
    "Group",
    "Row",
    "footnotes",
    "groups",
    "knowledge",
    "note",
    "raised",
    "sentences",
    "summary",
]

_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Row:
    """One cell of the evaluation, as text."""

    scenario: str
    attack: str
    budget: str
    accuracy: str
    interval: str
    claim: str
    """The published number as an accuracy, with its footnote's number; empty if there is none."""
    rounded: str
    rms: str
    linf: str
    passes: str
    draws: int
    result: CellResult


@dataclass(frozen=True)
class Group:
    """The rows of one pipeline."""

    name: str
    rows: tuple[Row, ...]


def raised(number: int) -> str:
    """A footnote's number, raised."""
    return str(number).translate(_RAISED)


def footnotes(data: ReportData) -> list[Claim]:
    """The claims that some cell of the table is about, in the order of their numbers."""
    used = (data.claim(r) for group in data.pipelines().values() for r in group)
    return list(dict.fromkeys(c for c in used if c is not None))


def groups(data: ReportData) -> list[Group]:
    """The table, grouped by pipeline."""
    notes = footnotes(data)
    return [
        Group(deployment_words(key), tuple(_row(data, notes, r) for r in group))
        for key, group in data.pipelines().items()
    ]


def _row(data: ReportData, notes: list[Claim], result: CellResult) -> Row:
    cell, rows = result.cell, result.rows
    attacked = cell.attack != "none"
    claim = data.claim(result)
    text = ""
    if claim is not None:
        text = percent(data.worth(claim, result)) + raised(notes.index(claim) + 1)
    return Row(
        cell.scenario,
        attack_words(cell),
        f"{cell.norm} {budget(cell.norm, cell.eps)}" if attacked else "–",
        rate_words(result.accuracy),
        interval(result.accuracy),
        text,
        percent(result.accuracy_8bit.value),
        significant(mean(rows["rms"])) if attacked else "–",
        significant(mean(rows["linf"])) if attacked else "–",
        passes(result),
        result.draws,
        result,
    )


def note(data: ReportData, claim: Claim) -> str:
    """A claim's footnote: the number as published, its source, and what it would mean here."""
    text = claim.words()
    if not claim.of_clean:
        return text
    clean = data.reference(next(r for r in data.results if data.claim(r) == claim))
    if clean is None:
        return text + "; the clean accuracy that it is a share of was not measured here"
    value = percent(claim.accuracy(clean.accuracy))
    return f"{text}; of the {percent(clean.accuracy.value)} % measured here that is {value} %"


def summary(data: ReportData) -> str:
    """One line under the table: threat, counts, how to read the columns."""
    counts = sorted({len(r.rows["index"]) for r in data.results})
    images = " to ".join(dict.fromkeys(str(n) for n in (counts[0], counts[-1]))) if counts else "0"
    draws = sorted({r.draws for r in data.results if r.draws > 1})
    parts = [f"{images} images"]
    known = threats(data.results)
    if len(known) == 1:
        parts.insert(0, threat_words(known[0]))
    if draws:
        parts.append(f"{draws[-1]} held-out draws per image where the pipeline is random")
    return "; ".join(parts)


def sentences(data: ReportData) -> list[tuple[str, str]]:
    """The verdict's lines, each parted into the pipeline's name, if it has one, and the rest."""
    bounds = data.verdict.bounds
    names = {deployment_words((b.model, b.defense, b.votes, b.combine)) for b in bounds}
    lines = []
    for line in data.verdict.text.splitlines():
        name = max((n for n in names if line.startswith(n + ": ")), key=len, default="")
        lines.append((name, line[len(name) :]))
    return lines


def knowledge(scenario: str) -> str:
    """What the attacker of a scenario knows; empty for a scenario of another version."""
    try:
        return get_scenario(scenario).knowledge
    except UnknownNameError:
        return ""
