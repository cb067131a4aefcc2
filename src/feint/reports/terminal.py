"""The report in a terminal: plain at 80 columns, wider where there is room, readable in a pipe."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Literal, Protocol

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from feint.evaluation import Finding
from feint.reports.data import ReportData, threats
from feint.reports.layout import Row, footnotes, groups, note, raised, sentences, summary
from feint.reports.words import columns_apart

__all__ = ["render", "table"]

_STYLES = {
    "none": "dim",
    "gray-box": "blue",
    "transfer": "cyan",
    "removal": "magenta",
    "white-box": "bold red",
    "adaptive": "bold red",
}
Column = tuple[str, Literal["left", "right"], list[str]]
"""Title, justification, texts."""
_ACCURACY = "accuracy % [95 %]"
_INDENT, _GAP = 2, 2
_STATUS = {"fail": "bold red", "warn": "yellow"}
_ASCII = str.maketrans(
    {"–": "-", "…": "~", "≤": "<=", "×": "x", "λ": "lambda", "δ": "d", "‖": "|"}
    | {digit: f"({n})" for n, digit in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
)


class Say(Protocol):
    """Prints a text, wrapped; its first `bold` characters are bold."""

    def __call__(self, text: str = "", style: str = "", indent: int = 0, bold: int = 0) -> None: ...


class _Fitted:
    """Draws the table for the width that it is given."""

    def __init__(self, data: ReportData) -> None:
        self.data = data

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield _stack(self.data, options.max_width, ascii_only=options.ascii_only)


def table(data: ReportData, *, width: int | None = None) -> Table:
    """The result table: a block per pipeline, a line per cell, no line wrapped.

    Args:
        data: What to show.
        width: Columns to fit into; by default those of the console that it is printed on. Below
            100 columns the distances are left out, and long attacks are cut with "…".

    Example:
        >>> from feint.evaluation.verdict import conclude
        >>> table(ReportData([], [], conclude([], []))).row_count
        1
    """
    if width is not None:
        return _stack(data, width, ascii_only=False)
    outer = Table.grid()
    outer.add_row(_Fitted(data))
    return outer


def _columns(data: ReportData, rows: Sequence[Row], width: int) -> list[Column]:
    """(title, justification, texts) of every column that is shown."""
    wide = width >= 100
    columns: list[Column] = [
        ("scenario", "left", [r.scenario for r in rows]),
        ("attack", "left", [r.attack for r in rows]),
    ]
    if wide or len(threats(data.results)) > 1:
        columns.append(("budget", "left", [r.budget for r in rows]))
    columns.append((_ACCURACY, "right", [r.accuracy for r in rows]))
    if any(r.claim for r in rows):
        columns.append(("published" if wide else "publ.", "right", [r.claim for r in rows]))
    columns.append(("8-bit", "right", [r.rounded for r in rows]))
    if wide:
        columns.append(("rms", "right", [r.rms for r in rows]))
        columns.append(("max |δ|", "right", [r.linf for r in rows]))
    columns.append(("fwd / bwd", "right", [r.passes for r in rows]))
    return columns


def _stack(data: ReportData, width: int, *, ascii_only: bool) -> Table:
    blocks = groups(data)
    rows = [row for block in blocks for row in block.rows]
    outer = Table.grid()
    if not rows:
        outer.add_row(Text("Nothing was evaluated."))
        return outer
    columns = [
        (_tidy(title, ascii_only), justify, [_tidy(t, ascii_only) for t in texts])
        for title, justify, texts in _columns(data, rows, width)
    ]
    sizes = [max(cell_len(t) for t in (title, *texts)) for title, _, texts in columns]
    # Everything but the attack keeps its width; the attack takes what is left.
    spare = width - _INDENT - sum(sizes) - _GAP * (len(columns) - 1)
    sizes[1] = max(8, min(sizes[1], sizes[1] + spare))
    shown = [_tidy(t, ascii_only) for t in columns_apart(columns[1][2], sizes[1])]
    columns[1] = ("attack", "left", shown)
    colored = [i for i, (title, _, _) in enumerate(columns) if title in ("scenario", _ACCURACY)]

    def lines(texts: Sequence[Sequence[str]], styles: Sequence[str], whole: bool) -> Padding:
        grid = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
        for (_, justify, _), size in zip(columns, sizes, strict=True):
            grid.add_column(justify=justify, width=size, no_wrap=True, overflow="crop")
        for line, style in zip(texts, styles, strict=True):
            grid.add_row(
                *(Text(t, style=style if whole or i in colored else "") for i, t in enumerate(line))
            )
        return Padding(grid, (0, 0, 0, _INDENT))

    outer.add_row(lines([[title for title, _, _ in columns]], ["dim"], whole=True))
    done = 0
    for number, block in enumerate(blocks):
        here = range(done, done + len(block.rows))
        done += len(block.rows)
        if number:
            outer.add_row("")
        (name,) = columns_apart([_tidy(block.name, ascii_only)], width)
        outer.add_row(Text(_tidy(name, ascii_only), style="bold", no_wrap=True))
        outer.add_row(
            lines(
                [[texts[i] for _, _, texts in columns] for i in here],
                [_STYLES.get(rows[i].scenario, "") for i in here],
                whole=False,
            )
        )
    return outer


def _tidy(text: str, ascii_only: bool) -> str:
    if not ascii_only:
        return text
    return text.translate(_ASCII).encode("ascii", "replace").decode()


def render(console: Console, data: ReportData) -> None:
    """Print the whole report: table, notes, findings, verdict, where the page is, how to rerun.

    Text that users gave (names, paths, evidence) is never read as markup. Only the page's path is
    let run over the edge, so that it can be copied.

    Args:
        console: Where to print. A console that is no terminal, or with NO_COLOR, gets plain text.
        data: What to print.

    Example:
        >>> from feint.evaluation.verdict import conclude
        >>> console = Console(record=True, width=80, quiet=True)
        >>> render(console, ReportData([], [], conclude([], [])))
    """
    ascii_only = console.options.ascii_only

    def say(text: str = "", style: str = "", indent: int = 0, bold: int = 0) -> None:
        whole = Text(_tidy(text, ascii_only), style=style)
        whole.stylize("bold", 0, bold)
        for line in whole.wrap(console, console.width - indent):
            line.rstrip()
            console.print(Text(" " * indent) + line, highlight=False)

    console.print(table(data), highlight=False)
    say()
    say(summary(data), "dim")
    for number, claim in enumerate(footnotes(data), 1):
        say(f"{raised(number)} published: {note(data, claim)}", "dim")
    _findings(say, data.findings)
    say()
    bad = data.verdict.withheld
    say(
        f"Grade {data.verdict.grade}" + (" – verdict withheld" if bad else ""),
        "bold red" if bad else "bold",
    )
    for name, rest in sentences(data):
        say(name + rest, indent=_INDENT, bold=len(name))
    if data.html or data.run or data.command:
        say()
    for title, path in (("report", data.html), ("run", data.run)):
        if path:
            text = Text.assemble((f"{title:<8}", "dim"), _tidy(path, ascii_only))
            console.print(text, highlight=False, soft_wrap=True)
    if data.command:
        for number, line in enumerate(_shell(data.command, console.width - 8)):
            text = Text.assemble(
                ("again   " if number == 0 else " " * 8, "dim"), _tidy(line, ascii_only)
            )
            console.print(text, highlight=False, soft_wrap=True)


def _findings(say: Say, findings: Sequence[Finding]) -> None:
    passed = sum(f.status == "pass" for f in findings)
    say()
    say(f"{passed} of {len(findings)} checks passed" if findings else "no check was run")
    for status in ("fail", "warn"):
        for check in dict.fromkeys(f.check for f in findings if f.status == status):
            say(f"{status}  {check}", _STATUS[status], _INDENT)
            for finding in findings:
                if (finding.check, finding.status) == (check, status):
                    say(f"{finding.subject}: {finding.evidence}", "", _INDENT + 6)


def _shell(command: str, width: int) -> list[str]:
    """A command on several lines, broken before options, that can be pasted as it stands."""
    try:
        words = shlex.split(command)
    except ValueError:
        return [command]
    pieces: list[str] = []
    for word in words:
        plain = "'" in word and not set(word) & set('"\\$`!')
        quoted = f'"{word}"' if plain else shlex.quote(word)
        joins = pieces and not word.startswith("-") and pieces[-1].startswith("-")
        if pieces and joins and " " not in pieces[-1]:
            pieces[-1] += f" {quoted}"
        else:
            pieces.append(quoted)
    lines: list[str] = []
    for piece in pieces:
        if lines and len(lines[-1]) + len(piece) + 3 <= width:
            lines[-1] += f" {piece}"
        else:
            lines.append(piece if not lines else f"  {piece}")
    return [line + (" \\" if i + 1 < len(lines) else "") for i, line in enumerate(lines)]
