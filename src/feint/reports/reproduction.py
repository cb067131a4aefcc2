"""A reproduced table or figure, as people read it: terminal, Markdown, JSON and figure files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from feint.diagnostics.numbers import Number
from feint.recipes.reproduce import Entry, Reproduction
from feint.reports import (  # noqa: F401  (they register their drawings)
    reproduction_ace,
    reproduction_pixel_deflection,
    reproduction_prm,
    reproduction_qiu,
    reproduction_s2snet,
)
from feint.reports.figures import save
from feint.reports.reproduction_figures import DRAWINGS, draw
from feint.store.files import write_atomic

__all__ = ["DRAWINGS", "Rendered", "number_words", "write"]

_NARROW = 6
"""Width that is left to a label in a narrow terminal."""
_SIGN = {True: "hit", False: "miss", None: ""}
_STYLE = {True: "green", False: "yellow", None: ""}
_ANSWER = {"holds": "green", "fails": "bold red", "undecided": "yellow"}


def number_words(number: Number | None, share: bool) -> str:
    """`"81.5 [75.5, 86.3]"`: shares in percent, other numbers with three digits."""
    if number is None or number.value is None:
        return "–"

    def text(value: float) -> str:
        return f"{100 * value:.1f}" if share else f"{value:.3g}"

    if number.low is None or number.high is None:
        return text(number.value)
    return f"{text(number.value)} [{text(number.low)}, {text(number.high)}]"


def _published(entry: Entry) -> str:
    value = entry.point.published
    if value is None:
        return "–"
    return f"{100 * value:.4g}" if entry.share else f"{value:.4g}"


def _head(axes: Sequence[str], found: Reproduction) -> list[str]:
    head = [*axes, "published", "ours [95 %]", ""]
    return [*head, "adaptive [95 %]"] if _knows(found) else head


def _knows(found: Reproduction) -> bool:
    return any(e.adaptive is not None for e in found.entries)


def _row(entry: Entry, known: bool) -> list[str]:
    row = [
        *entry.point.labels,
        _published(entry),
        number_words(entry.ours, entry.share),
        _SIGN[entry.hit],
    ]
    return [*row, number_words(entry.adaptive, entry.share)] if known else row


def _layout(found: Reproduction, room: int) -> tuple[int, list[int]]:
    """How many of the last axes are columns, two if there is room, and the width of every column.

    If there is no room for one axis either, its labels are folded.
    """
    axes, known = list(found.recipe.axes), _knows(found)
    rows = [_head(axes, found), *(_row(e, known) for e in found.entries)]
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    labels = min(len(axes), 2)
    widths = widths[len(axes) - labels :]
    gaps = 3 * (len(widths) - 1) + 2  # the box has edges, too
    if labels == 2 and sum(widths) + gaps > room:
        labels, widths, gaps = 1, widths[1:], gaps - 3
    if sum(widths) + gaps > room:
        widths[0] = max(_NARROW, widths[0] - (sum(widths) + gaps - room))
    return labels, widths


def _units(found: Reproduction) -> str:
    kinds = {e.share for e in found.entries}
    if kinds == {True}:
        return "Shares in percent."
    return "" if kinds == {False} else "Shares in percent; other numbers as they are."


def _summary(found: Reproduction) -> str:
    known = found.hits + found.misses
    text = "there are no published numbers to compare with" if not known else ""
    if known:
        text = f"{found.hits} of {known} published numbers agree within the sampling errors"
    if found.scale == "smoke":
        text += "; a smoke test says nothing about the paper"
    if found.evaluations and _checks(found) != "none":
        blind = any(e.verdict.withheld for e in found.evaluations) and not found.failed
        told = f"failed checks: {', '.join(found.failed)}" if found.failed else "no check failed"
        text += f"; {told}"
        text += ", and no verdict where only blind attackers were tried" if blind else ""
    return text


def _lacking(found: Reproduction) -> list[str]:
    """What must be given before the rest of the table can be measured."""
    return list(dict.fromkeys(e.point.lacks for e in found.entries if e.point.lacks))


def _checks(found: Reproduction) -> str:
    """Which checks the scale asks for."""
    return found.recipe.scales[found.scale].checks


class Rendered:
    """The table in a terminal; narrow or wide, plain in a pipe."""

    def __init__(self, found: Reproduction) -> None:
        self.found = found

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        found, recipe = self.found, self.found.recipe
        yield Text(f"{recipe.place}: {recipe.title}", style="bold")
        yield Text(f"{recipe.name}, scale {found.scale}: {recipe.scales[found.scale].about}")
        known = _knows(found)
        labels, widths = _layout(found, options.max_width)
        deep = len(recipe.axes) - labels  # those before the labels' axes head a part each
        head = _head(list(recipe.axes)[deep:], found)
        parts = groupby(found.entries, lambda e: e.point.labels[:deep])
        for number, (heading, part) in enumerate(parts):
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=number == 0)
            for place, (name, width) in enumerate(zip(head, widths, strict=True)):
                left = place < labels or not name
                table.add_column(
                    escape(name),
                    width=width,
                    overflow="fold",
                    justify="left" if left else "right",
                    style="red" if known and place == len(head) - 1 else None,
                )
            before = ""
            for entry in part:
                row = _row(entry, known)[deep:]
                cells = [Text(text) for text in row]
                if labels > 1 and row[0] == before:
                    cells[0] = Text("")
                before = row[0]
                cells[labels + 2].stylize(_STYLE[entry.hit])
                table.add_row(*cells)
            if heading:
                yield Text("\n" + ", ".join(heading), style="bold")
            yield table
        for text in _lacking(found):
            yield Text(f"left out: {text}", style="yellow")
        for claim in found.claims:
            line = Text(f"{claim.answer:9} ", style=_ANSWER[claim.answer])
            who = "" if claim.claim.by == "paper" else " (we say)"
            line.append(f"{claim.claim.say}{who}", style="default not bold")
            yield line
            yield Text(f"          {claim.evidence}", style="dim")
        yield Text(_summary(found))


def markdown(found: Reproduction) -> str:
    """The table as a page of its own."""
    recipe, axes, known = found.recipe, list(found.recipe.axes), _knows(found)
    lines = [f"# {recipe.place}: {recipe.title}", ""]
    lines += [f"`{found.provenance['command']}`", ""]
    lines += [f"**Scale `{found.scale}`.** {recipe.scales[found.scale].about} {_units(found)}", ""]
    if recipe.about:
        lines += [recipe.about, ""]
    head = _head([*axes], found)
    lines += [_line(head), _line(["---"] * len(head))]
    lines += [_line(_row(e, known)) for e in found.entries]
    for text in _lacking(found):
        lines += ["", f"Left out: {text}."]
    lines += ["", _summary(found)[:1].upper() + _summary(found)[1:] + ".", ""]
    if found.claims:
        lines += ["| claim | by | the numbers say | evidence |", "|---|---|---|---|"]
        lines += [
            _line([c.claim.say, c.claim.by, f"**{c.answer}**", c.evidence]) for c in found.claims
        ]
        lines.append("")
    if recipe.drawing is not None:
        stem = recipe.name.partition("/")[2]
        lines += [f"![{recipe.title}]({stem}.png)", ""]
    about = found.provenance
    git = about.get("git") or {}
    if about.get("models"):
        used = ", ".join(f"`{name}`" for name in about["models"])
        lines += [f"Models: {used}. Images: {_images(about)}.", ""]
    lines += [
        f"{about['cpu']}, {about['cores']} cores, torch {about['packages']['torch']}, feint "
        f"{about['packages']['feint']}, commit {str(git.get('commit') or 'unknown')[:12]}, seed "
        f"{about['seed']}; {found.seconds:.0f} s of work.",
        "",
    ]
    return "\n".join(lines)


def _images(about: Mapping[str, Any]) -> str:
    """How many images of which sets."""
    told = []
    for name, held in about["data"].items():
        height, width = held["shape"][-2:]
        told.append(f"{held['samples']} of `{name.partition(' @ ')[0]}` ({height}×{width})")
    return ", ".join(told)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write(found: Reproduction, folder: Path) -> list[Path]:
    """Write `TABLE.json`, `TABLE.md`, and the figure as `TABLE.svg` and `TABLE.png`.

    Args:
        found: The result.
        folder: Made if it is not there.

    Raises:
        DataError: A file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = found.recipe.name.partition("/")[2]
    text = json.dumps(found.as_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    files = [folder / f"{stem}.json", folder / f"{stem}.md"]
    write_atomic(files[0], text.encode())
    write_atomic(files[1], markdown(found).encode())
    figure: Figure | None = draw(found)
    if figure is not None:
        for suffix in (".svg", ".png"):
            files.append(folder / f"{stem}{suffix}")
            save(figure, files[-1])
    return files
