"""Figures of S1: attacks round by round, and what RDG does to an image."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

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


@drawing("grid distortion")
def _grid(found: Reproduction, _: Drawing) -> Figure:
    """S1 Fig. 2 from the object: corner, strips, where they go, result; and numbers."""
    strongest = found.entries[len(found.recipe.axes["δ"]) - 1]
    arrays = {name: np.asarray(value) for name, value in strongest.arrays.items()}
    image, seen = (arrays[n].transpose(1, 2, 0).clip(0, 1) for n in ("image", "seen"))
    rows, columns, strips = arrays["rows"], arrays["columns"], int(arrays["strips"])
    step = (len(rows) // strips, len(columns) // strips)
    starts = [np.arange(0, len(line), d) for line, d in zip((rows, columns), step, strict=True)]
    figure = canvas(10.2, 4.9)
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.45, 1]).flat
    panels = list(top.subplots(1, 4))
    corner = [0 if line[0] == 0 else len(line) - 1 for line in (rows, columns)]
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
    for axes, down, across in (
        (panels[1], rows[starts[0]], columns[starts[1]]),
        (panels[2], starts[0], starts[1]),
    ):
        for r in down:
            axes.axhline(r - 0.5, color="#ffd000", lw=0.9)
        for c in across:
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
