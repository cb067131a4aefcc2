"""Figures of reproduced tables: curves, bars, maps, matrices and images, in the papers' layouts.

A recipe names its drawing, `drawing: {kind: curves}`; a new kind is one function here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from feint.core.errors import UnknownNameError
from feint.diagnostics.numbers import Number
from feint.recipes.reproduce import Entry, Reproduction
from feint.recipes.schema import Drawing
from feint.reports.diagnostics_drawing import COLORS, bare, canvas, plain
from feint.reports.figures import INK, RULE, SOFT

__all__ = ["DRAWINGS", "draw", "drawing", "series"]

DRAWINGS: dict[str, Callable[[Reproduction, Drawing], Figure]] = {}
Maps = NDArray[Any]


def draw(found: Reproduction) -> Figure | None:
    """The recipe's figure; None if it has none.

    Raises:
        UnknownNameError: No such kind of drawing.
    """
    drawing = found.recipe.drawing
    if drawing is None:
        return None
    if drawing.kind not in DRAWINGS:
        raise UnknownNameError("drawing", drawing.kind, DRAWINGS)
    return DRAWINGS[drawing.kind](found, drawing)


def drawing(
    name: str,
) -> Callable[
    [Callable[[Reproduction, Drawing], Figure]], Callable[[Reproduction, Drawing], Figure]
]:
    """Register a function as the drawing of a name."""

    def register(
        function: Callable[[Reproduction, Drawing], Figure],
    ) -> Callable[[Reproduction, Drawing], Figure]:
        DRAWINGS[name] = function
        return function

    return register


def series(found: Reproduction) -> dict[tuple[str, ...], list[Entry]]:
    """Entries along the last axis, by the labels of the others."""
    lines: dict[tuple[str, ...], list[Entry]] = {}
    for entry in found.entries:
        lines.setdefault(entry.point.labels[:-1], []).append(entry)
    return lines


def _panels(found: Reproduction) -> dict[str, dict[tuple[str, ...], list[Entry]]]:
    """Series by the label of the first axis, if there are more than two axes.

    What lacks a model or images is left out, unless everything does.
    """
    panels: dict[str, dict[tuple[str, ...], list[Entry]]] = {}
    lines = series(found)
    measured = {k: line for k, line in lines.items() if not all(e.point.lacks for e in line)}
    for key, line in (measured or lines).items():
        title, rest = (key[0], key[1:]) if len(key) > 1 else ("", key)
        panels.setdefault(title, {})[rest] = line
    return panels


def _ends(numbers: Sequence[Number | None], scale: float) -> tuple[Maps, Maps, Maps]:
    def value(n: Number | None, side: str) -> float:
        if n is None or n.value is None:
            return np.nan
        found = getattr(n, side)
        return scale * (n.value if found is None else found)

    low, middle, high = (
        np.array([value(n, side) for n in numbers]) for side in ("low", "value", "high")
    )
    return low, middle, high


def _unit(found: Reproduction) -> tuple[float, str]:
    share = all(e.share for e in found.entries)
    return (100.0, "%") if share else (1.0, "")


def _positions(labels: Sequence[str]) -> tuple[Maps, bool]:
    """Where labels stand along an axis: as numbers if they are, else one by one."""
    try:
        values = np.array([float(label.rstrip("%")) for label in labels])
    except ValueError:
        return np.arange(len(labels), dtype=float), False
    even = len(values) < 3 or np.allclose(np.diff(values), np.diff(values)[0])
    if not np.isfinite(values).all() or not even:
        return np.arange(len(labels), dtype=float), False
    return values, True


@drawing("curves")
def _curves(found: Reproduction, wanted: Drawing) -> Figure:
    """One panel for each label of the first axis: ours with its interval, published, adaptive."""
    panels, (scale, unit) = _panels(found), _unit(found)
    names = list(found.recipe.axes)
    columns = min(len(panels), int(wanted.options.get("columns", 3)))
    rows = -(-len(panels) // columns)
    figure = canvas(3.6 * columns + 0.6, 2.9 * rows + 0.5)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        labels = list(found.recipe.axes[names[-1]])
        at, numeric = _positions(labels)
        for color, (key, line) in zip(COLORS * 4, lines.items(), strict=False):
            low, middle, high = _ends([e.ours for e in line], scale)
            name = ", ".join(key) or "ours"
            axes.plot(at, middle, color=color, marker="o", ms=3, lw=1.5, label=plain(name))
            axes.fill_between(at, low, high, color=color, alpha=0.15, lw=0)
            _, knowing, _ = _ends([e.adaptive for e in line], scale)
            if np.isfinite(knowing).any():
                axes.plot(at, knowing, color=color, ls=":", marker="X", ms=4, lw=1)
            published = [e.point.published for e in line]
            theirs = np.array([np.nan if v is None else scale * v for v in published])
            if np.isfinite(theirs).any():
                axes.plot(at, theirs, color=color, ls="--", marker="D", ms=3.5, lw=1, mfc="white")
        if not numeric or len(at) < 9:
            axes.set_xticks(at, [plain(text) for text in labels])
        bare(axes)
        axes.grid(axis="y", color=RULE, lw=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(plain(wanted.options.get("x", names[-1])), fontsize=8, color=INK)
        axes.set_title(plain(title), fontsize=9, color=INK, loc="left")
        if scale == 100:
            axes.set_ylim(-3, 103)
    handles: dict[str, Any] = {}
    for axes in grid.flat[: len(panels)]:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    if len(handles) > 1:
        figure.legend(
            list(handles.values()), list(handles), loc="outside right center", fontsize=7.5,
            frameon=False,
        )  # fmt: skip
    for axes in grid[:, 0]:
        label = wanted.options.get("y", "")
        named = f"{label} ({unit})" if label and unit else label or unit
        axes.set_ylabel(plain(named), fontsize=8)
    drawn = ["— ours with 95 % interval"]
    if any(e.point.published is not None for e in found.entries):
        drawn.append("- - ◇ published")
    if any(e.adaptive is not None for e in found.entries):
        drawn.append("··· ✕ adaptive attacker")
    figure.suptitle("   ".join(drawn), fontsize=7.5, color=SOFT, x=0.01, ha="left")
    return figure


@drawing("bars")
def _bars(found: Reproduction, wanted: Drawing) -> Figure:
    """Published, ours and adaptive side by side, a group for each label of the last axis."""
    panels, (scale, unit) = _panels(found), _unit(found)
    lines = [(title, key, line) for title, part in panels.items() for key, line in part.items()]
    columns = min(len(lines), int(wanted.options.get("columns", 2)))
    rows = -(-len(lines) // columns)
    labels = list(found.recipe.axes[list(found.recipe.axes)[-1]])
    figure = canvas(max(3.2, 0.55 * len(labels) + 1.2) * columns, 2.2 * rows + 0.5)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=scale == 100)
    for axes in grid.flat[len(lines) :]:
        axes.set_visible(False)
    slanted = len(labels) > 4 or max(map(len, labels)) * len(labels) > 40
    for axes, (title, key, line) in zip(grid.flat, lines, strict=False):
        at = np.arange(len(line))
        theirs = [
            scale * e.point.published if e.point.published is not None else np.nan for e in line
        ]
        missing = np.full(len(line), np.nan)
        for name, place, color, (low, middle, high) in (
            ("published", at - 0.27, "#d9b979", (missing, np.array(theirs), missing)),
            ("ours", at, COLORS[0], _ends([e.ours for e in line], scale)),
            ("adaptive", at + 0.27, COLORS[1], _ends([e.adaptive for e in line], scale)),
        ):
            if np.isfinite(middle).any():
                axes.bar(place, middle, 0.26, color=color, label=name)
                # A cap, so that nothing left looks otherwise than nothing measured.
                axes.hlines(middle, place - 0.13, place + 0.13, color=color, lw=1.8, zorder=2)
                spread = np.array([middle - low, high - middle])
                axes.errorbar(place, middle, spread, fmt="none", ecolor=INK, lw=0.8, zorder=3)
        axes.set_xticks(at, [plain(text) for text in labels])
        if slanted:
            axes.tick_params(axis="x", rotation=20)
        bare(axes)
        axes.set_title(plain(", ".join([t for t in (title, *key) if t])), fontsize=9, loc="left")
        axes.grid(axis="y", color=RULE, lw=0.6)
        axes.set_axisbelow(True)
        if scale == 100:
            axes.set_ylim(0, 103)
    known: dict[str, Any] = {}
    for axes in grid.flat:  # a panel alone may lack some
        handles, names = axes.get_legend_handles_labels()
        known = dict(zip(names, handles, strict=True)) | known
    drawn = [name for name in ("published", "ours", "adaptive") if name in known]
    figure.legend([known[name] for name in drawn], drawn, loc="outside upper left", ncols=3,
                  fontsize=7.5, frameon=False)  # fmt: skip
    grid[0, 0].set_ylabel(unit, fontsize=8)
    return figure


@drawing("maps")
def _maps(found: Reproduction, wanted: Drawing) -> Figure:
    """Arrays of each point as heat maps: rows of the table down, columns across.

    Options: `array` (the array's name, unless the points say), `shared` (`row`, `all` or `none`:
    the colour scale), `color` (matplotlib's name), `crop` (side of the middle that is shown).
    """
    lines = series(found)
    columns = max(len(line) for line in lines.values())
    figure = canvas(1.45 * columns + 0.9, 1.5 * len(lines) + 0.3)
    grid = figure.subplots(len(lines), columns, squeeze=False)
    shared, crop = wanted.options.get("shared", "row"), int(wanted.options.get("crop", 0))
    color = str(wanted.options.get("color", "magma"))
    pictures = {
        key: [_cropped(np.asarray(e.arrays[_array(e, wanted)], float), crop) for e in line]
        for key, line in lines.items()
    }
    flat = [m for row in pictures.values() for m in row]
    whole = max(float(np.nanmax(m)) for m in flat)
    for row, (key, line) in enumerate(lines.items()):
        top = max(float(np.nanmax(m)) for m in pictures[key])
        for column, entry in enumerate(line):
            axes, picture = grid[row, column], pictures[key][column]
            high = {"row": top, "all": whole}.get(shared, float(np.nanmax(picture)))
            axes.imshow(picture, cmap=color, vmin=0, vmax=high or 1.0, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if row == 0:
                axes.set_title(plain(entry.point.labels[-1]), fontsize=8, color=INK)
        grid[row, 0].set_ylabel(plain(", ".join(key)), fontsize=8, color=INK)
    return figure


def _array(entry: Entry, wanted: Drawing) -> str:
    """The name of the array that is drawn: of the point, or of the drawing."""
    return str(entry.point.fields.get("array") or wanted.options["array"])


def _cropped(picture: Maps, side: int) -> Maps:
    while picture.ndim > 2:
        picture = picture.mean(0)
    if not side or max(picture.shape) <= side:
        return picture
    top, left = ((n - side) // 2 for n in picture.shape)
    return picture[top : top + side, left : left + side]


@drawing("matrix")
def _matrix(found: Reproduction, wanted: Drawing) -> Figure:
    """Numbers as a matrix with its values written in: the last two axes; a panel for the others.

    Where there is an adaptive attacker, a line of panels is ours and, beside it, adaptive.
    """
    names = list(found.recipe.axes)
    rows, columns = list(found.recipe.axes[names[-2]]), list(found.recipe.axes[names[-1]])
    panels: dict[str, dict[tuple[str, str], Entry]] = {}
    for entry in found.entries:
        labels = entry.point.labels
        panels.setdefault(", ".join(labels[:-2]), {})[labels[-2], labels[-1]] = entry
    scale, unit = _unit(found)
    both = any(e.adaptive is not None for e in found.entries)
    kinds = ["ours", "adaptive"] if both else ["ours"]
    width, height = 0.62 * len(columns) + 1.4, 0.5 * len(rows) + 1.0
    across = 2 if both else min(len(panels), 2)
    down = -(-len(panels) * len(kinds) // across)
    figure = canvas(width * across, height * down)
    grid = figure.subplots(down, across, squeeze=False, sharey=both)
    spots = iter(grid.flat)
    for title, cells in panels.items():
        for kind in kinds:
            axes = next(spots)
            values = np.array(
                [[_number(cells.get((r, c)), kind) * scale for c in columns] for r in rows]
            )
            high = 100 if scale == 100 else np.nanmax(values)
            axes.imshow(values, cmap="viridis", vmin=0, vmax=high, aspect="auto")
            for i, j in np.ndindex(values.shape):
                if np.isfinite(values[i, j]):
                    dark = values[i, j] < 0.6 * high
                    text = f"{values[i, j]:.0f}" if scale == 100 else f"{values[i, j]:.2g}"
                    axes.text(j, i, text, ha="center", va="center", fontsize=7,
                              color="white" if dark else "black")  # fmt: skip
            axes.set_xticks(
                range(len(columns)), [plain(c) for c in columns], rotation=30, fontsize=7
            )
            axes.set_yticks(range(len(rows)), [plain(r) for r in rows], fontsize=7)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            axes.set_xlabel(plain(names[-1]), fontsize=8)
            if kind == "ours":
                axes.set_ylabel(plain(names[-2]), fontsize=8)
            more = f" ({unit})" if unit else ""
            axes.set_title(plain(f"{title} {kind if both else ''}{more}".strip()), fontsize=8.5)
    for axes in spots:
        axes.set_visible(False)
    return figure


def _number(entry: Entry | None, kind: str) -> float:
    found = None if entry is None else getattr(entry, kind)
    return np.nan if found is None or found.value is None else float(found.value)


@drawing("images")
def _images(found: Reproduction, wanted: Drawing) -> Figure:
    """Images of the metric `example images`: clean, attacked, difference, what the defense makes.

    Options: `rows` (how many images of each point), `show` (which of clean, attacked, difference,
    seen).
    """
    count = int(wanted.options.get("rows", 1))
    shown = list(wanted.options.get("show", ["clean", "attacked", "difference", "seen"]))
    lines = [(e, i) for e in found.entries for i in range(min(count, len(e.arrays["clean"])))]
    figure = canvas(1.5 * len(shown) + 1.2, 1.5 * len(lines) + 0.3)
    grid = figure.subplots(len(lines), len(shown), squeeze=False)
    for row, (entry, i) in enumerate(lines):
        arrays = {k: np.asarray(v)[i].transpose(1, 2, 0) for k, v in entry.arrays.items()
                  if k in ("clean", "attacked", "seen")}  # fmt: skip
        base, top = ("clean", "attacked") if "attacked" in shown else ("clean", "seen")
        delta = arrays[top].astype(float) - arrays[base].astype(float)
        arrays["difference"] = 0.5 + 0.5 * delta / max(1e-6, float(np.abs(delta).max()))
        for column, kind in enumerate(shown):
            axes = grid[row, column]
            axes.imshow(np.clip(arrays[kind].astype(float), 0, 1), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if row == 0:
                axes.set_title(kind, fontsize=8, color=INK)
        grid[row, 0].set_ylabel(plain("\n".join(entry.point.labels)), fontsize=7, color=INK)
    return figure
