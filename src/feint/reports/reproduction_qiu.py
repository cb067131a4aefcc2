"""Figures of S1: attacks round by round, and what RDG does to an image."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from feint.recipes.reproduce import Entry, Reproduction
from feint.recipes.schema import Drawing
from feint.reports.diagnostics_drawing import COLORS, bare, canvas, plain
from feint.reports.figures import INK, RULE, SOFT
from feint.reports.reproduction_figures import drawing

__all__: list[str] = []

_MARKERS = "osD^vPX*<>"
_LINES = (*COLORS, "#c2185b", "#2e8b57", "#8d6e63", "#1a1a1a")
"""Enough to tell ten defenses apart."""


def _value(entry: Entry, kind: str) -> float:
    if kind == "published":
        found = entry.point.published
        return np.nan if found is None else 100 * found
    number = entry.ours if kind == "ours" else entry.adaptive
    return np.nan if number is None or number.value is None else 100 * number.value


@drawing("rounds")
def _rounds(found: Reproduction, wanted: Drawing) -> Figure:
    """S1 Fig. 3: one panel each for the published curves, ours counted both ways, and adaptive."""
    counts, defenses, rounds = (list(labels) for labels in found.recipe.axes.values())
    at = np.array([float(r) for r in rounds])
    entries = {e.point.labels: e for e in found.entries}
    panels = [
        ("published (S1)", counts[0], "published"),
        *((f"ours, {c}", c, "ours") for c in counts),
    ]
    if any(e.adaptive is not None for e in found.entries):
        panels.append((f"FD's shift undone, {counts[-1]}", counts[-1], "adaptive"))
    figure = canvas(2.75 * len(panels) + 1.3, 3.1)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, count, kind) in zip(grid, panels, strict=True):
        for i, defense in enumerate(defenses):
            y = np.array([_value(entries[count, defense, r], kind) for r in rounds])
            known = np.isfinite(y)
            if known.any():
                axes.plot(at[known], y[known], color=_LINES[i % len(_LINES)], lw=1.4, ms=4,
                          marker=_MARKERS[i % len(_MARKERS)], label=plain(defense))  # fmt: skip
        bare(axes)
        axes.grid(axis="y", color=RULE, lw=0.6)
        axes.set_axisbelow(True)
        axes.set_ylim(-3, 103)
        axes.set_xlim(at[0] - 2, at[-1] + 2)
        axes.set_xlabel("round", fontsize=8, color=INK)
        axes.set_title(title, fontsize=9, color=INK, loc="left")
    grid[0].set_ylabel(f"{wanted.options.get('y', '')} (%)", fontsize=8, color=INK)
    handles, labels = grid[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=7.5, frameon=False)
    return figure


@drawing("properties")
def _properties(found: Reproduction, _: Drawing) -> Figure:
    """S1 Table I as bars: a panel for each property, published beside both readings."""
    presets, defenses, names = (list(labels) for labels in found.recipe.axes.values())
    entries = {e.point.labels: e for e in found.entries}
    figure = canvas(10.4, 4.2)
    grid = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    at = np.arange(len(defenses), dtype=float)
    for axes, name in zip(grid, names, strict=True):
        line = [entries[presets[0], d, name] for d in defenses]
        published = [np.nan if e.point.published is None else e.point.published for e in line]
        axes.barh(at - 0.27, published, 0.25, color="#d9b979", label="published")
        for i, preset in enumerate(presets):
            ours = [entries[preset, d, name].ours for d in defenses]
            middle = np.array([np.nan if n.value is None else n.value for n in ours])
            low = np.array(
                [m if n.low is None else n.low for n, m in zip(ours, middle, strict=True)]
            )
            high = np.array(
                [m if n.high is None else n.high for n, m in zip(ours, middle, strict=True)]
            )
            axes.barh(at + 0.27 * i, middle, 0.25, color=COLORS[i], label=f"ours, {preset}")
            axes.errorbar(middle, at + 0.27 * i, xerr=[middle - low, high - middle], fmt="none",
                          ecolor=INK, lw=0.7)  # fmt: skip
        axes.set_yticks(at, [plain(d) for d in defenses])
        bare(axes)
        axes.grid(axis="x", color=RULE, lw=0.6)
        axes.set_axisbelow(True)
        axes.set_xlim(left=0)
        axes.set_title(plain(name), fontsize=9, color=INK, loc="left")
    grid[0].invert_yaxis()
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


@drawing("side by side")
def _side_by_side(found: Reproduction, wanted: Drawing) -> Figure:
    """A table of shares three times on one scale: published, ours, and the adaptive attacker's.

    Rows are the first axis and columns the last; option `keep` says which label of another one.
    """
    names = list(found.recipe.axes)
    rows, columns = (list(found.recipe.axes[n]) for n in (names[0], names[-1]))
    keep = {str(k): str(v) for k, v in dict(wanted.options.get("keep", {})).items()}
    cells = {
        (e.point.labels[0], e.point.labels[-1]): e
        for e in found.entries
        if all(e.point.labels[names.index(axis)] == label for axis, label in keep.items())
    }
    kinds = {"published": "published", "ours": "ours", "adaptive": "attacker who knows"}
    values = {
        kind: np.array([[_value(cells[r, c], kind) for c in columns] for r in rows])
        for kind in kinds
    }
    values = {kind: found_ for kind, found_ in values.items() if np.isfinite(found_).any()}
    size = (0.55 * len(columns) + 0.5) * len(values) + 1.8
    figure = canvas(size, 0.42 * len(rows) + 1.1)
    grid = figure.subplots(1, len(values), sharey=True, squeeze=False)[0]
    for axes, (kind, table) in zip(grid, values.items(), strict=True):
        axes.imshow(table, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        for i, j in np.ndindex(table.shape):
            if np.isfinite(table[i, j]):
                axes.text(j, i, f"{table[i, j]:.0f}", ha="center", va="center", fontsize=8,
                          color="white" if table[i, j] < 60 else "black")  # fmt: skip
        axes.set_xticks(range(len(columns)), [plain(c) for c in columns], rotation=35, ha="right")
        axes.set_yticks(range(len(rows)), [plain(r) for r in rows])
        bare(axes)
        axes.set_title(kinds[kind], fontsize=9, color=INK, loc="left")
    told = ", ".join(keep.values())
    grid[0].set_ylabel(f"{told or wanted.options.get('y', 'accuracy')} (%)", fontsize=8, color=SOFT)
    return figure


def _ends(line: NDArray[Any], strips: int, mirrored: bool) -> tuple[NDArray[Any], NDArray[Any]]:
    """Where strips begin along an axis, from the starting corner: in the image, in the result."""
    starts = np.arange(0, len(line), len(line) // strips)
    if mirrored:
        return line[len(line) - 1 - starts] + 1, len(line) - starts
    return line[starts], starts


@drawing("grid distortion")
def _grid(found: Reproduction, _: Drawing) -> Figure:
    """S1 Fig. 2 from the object: corner, strips, where they go, result; and numbers."""
    strongest = found.entries[len(found.recipe.axes["δ"]) - 1]
    arrays = {name: np.asarray(value) for name, value in strongest.arrays.items()}
    image, seen = (arrays[n].transpose(1, 2, 0).clip(0, 1) for n in ("image", "seen"))
    rows, columns, strips = arrays["rows"], arrays["columns"], int(arrays["strips"])
    far = [bool(m) for m in arrays["mirrored"]]
    ends = [_ends(line, strips, m) for line, m in zip((rows, columns), far, strict=True)]
    figure = canvas(10.2, 4.9)
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.45, 1]).flat
    panels = list(top.subplots(1, 4))
    corner = [len(line) - 0.5 if m else -0.5 for line, m in zip((rows, columns), far, strict=True)]
    titles = (
        "1  starting corner",
        "2  strips in the image",
        "3  strips in the result",
        "4  result",
    )
    for number, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        axes.imshow(seen if number > 1 else image, interpolation="nearest")
        axes.set_title(title, fontsize=9, color=INK, loc="left")
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.axis("off")
    panels[0].plot(
        corner[1], corner[0], marker="o", ms=12, mfc="#ffd000", mec="black", clip_on=False
    )
    for axes, which in ((panels[1], 0), (panels[2], 1)):
        for r in ends[0][which]:
            axes.axhline(r - 0.5, color="#ffd000", lw=0.9)
        for c in ends[1][which]:
            axes.axvline(c - 0.5, color="#ffd000", lw=0.9)
    charts = list(bottom.subplots(1, 2))
    lines: dict[str, list[Entry]] = {}
    for entry in found.entries:
        lines.setdefault(entry.point.labels[0], []).append(entry)
    for axes, (name, line) in zip(charts, lines.items(), strict=True):
        share = name == "pixels dropped"
        values = [(100 if share else 1) * (e.ours.value or 0.0) for e in line]
        axes.bar(range(len(line)), values, 0.6, color=COLORS[0])
        for i, v in enumerate(values):
            axes.text(i, v, f"{v:.0f} %" if share else f"{v:.1f} px", ha="center", va="bottom",
                      fontsize=8, color=INK)  # fmt: skip
        axes.set_xticks(range(len(line)), [f"δ = {e.point.labels[1]}" for e in line])
        bare(axes)
        axes.set_yticks([])
        axes.set_ylim(0, 1.2 * max(*values, 1e-9))
        axes.set_title(plain(name), fontsize=9, color=SOFT, loc="left")
    return figure
