"""The result table as GitHub Markdown."""

from __future__ import annotations

import re
from pathlib import Path

from feint.reports.data import ReportData
from feint.reports.layout import footnotes, groups, note, summary
from feint.store.files import write_atomic

__all__ = ["markdown", "write"]

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|~#])")


def _plain(text: str) -> str:
    """Text that Markdown shows as it stands, inside a table too."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def markdown(data: ReportData) -> str:
    """The table, its notes and the verdict.

    Numbers are percentages with 95 % intervals. What users named is escaped.

    Example:
        >>> from feint.evaluation.verdict import conclude
        >>> markdown(ReportData([], [], conclude([], []))).startswith("| model + defense |")
        True
    """
    titles = [
        "model + defense",
        "scenario",
        "attack",
        "budget",
        "accuracy %",
        "95 %",
        "n",
        "published",
        "8-bit",
        "mean rms",
        "mean max \\|δ\\|",
        "forward / backward",
    ]
    left = 4
    lines = [
        f"| {' | '.join(titles)} |",
        f"|{'|'.join([' --- '] * left + [' ---: '] * (len(titles) - left))}|",
    ]
    for group in groups(data):
        for row in group.rows:
            n = str(len(row.result.rows["index"])) + (f" × {row.draws}" if row.draws > 1 else "")
            cells = [
                group.name,
                row.scenario,
                row.attack,
                row.budget,
                row.accuracy.split(" ")[0],
                row.interval[1:-1].replace(", ", "–"),
                n,
                row.claim,
                row.rounded,
                row.rms,
                row.linf,
                row.passes,
            ]
            lines.append(f"| {' | '.join(map(_plain, cells))} |")
    lines += ["", _plain(summary(data)) + "."]
    for number, claim in enumerate(footnotes(data), 1):
        lines += ["", f"{number}. Published: {_plain(note(data, claim))}."]
    head = f"**Grade {data.verdict.grade}.** "
    lines += ["", head + "  \n".join(map(_plain, data.verdict.text.splitlines()))]
    return "\n".join(lines) + "\n"


def write(data: ReportData, path: str | Path) -> Path:
    """Write `markdown(data)` to a file, all of it or nothing, and return its path.

    Raises:
        DataError: It cannot be written.
    """
    path = Path(path)
    write_atomic(path, markdown(data).encode())
    return path
