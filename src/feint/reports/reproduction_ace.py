"""Drawings of ACE's figures: label maps, and heat maps layer by layer."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from feint.recipes.reproduce import Reproduction
from feint.recipes.schema import Drawing
from feint.reports.diagnostics_drawing import canvas, plain
from feint.reports.figures import INK, SOFT
from feint.reports.reproduction_figures import drawing, series

__all__: list[str] = []

_LABELS = ListedColormap(
    ["#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#edc948", "#b07aa1", "#9c755f",
     "#ff9da7", "#bab0ac"]
)  # fmt: skip


@drawing("label maps")
def _label_maps(found: Reproduction, wanted: Drawing) -> Figure:
    """S0 Figs. 4 and 8: the image, then its label maps along the last axis; one row an image."""
    lines = series(found)
    columns = 1 + max(len(line) for line in lines.values())
    figure = canvas(1.7 * columns, 1.75 * len(lines) + 0.5)
    grid = figure.subplots(len(lines), columns, squeeze=False)
    for row, (key, line) in enumerate(lines.items()):
        first = line[0].arrays
        at = min(int(line[0].point.fields.get("row", 0)), len(first["image"]) - 1)
        shown = np.clip(np.asarray(first["image"][at], float).transpose(1, 2, 0), 0, 1)
        grid[row, 0].imshow(shown, interpolation="nearest")
        grid[row, 0].set_ylabel(plain(", ".join(key)), fontsize=8, color=INK)
        for column, entry in enumerate(line, 1):
            labels = np.asarray(entry.arrays[str(entry.point.fields["array"])][at])
            reach = float(np.max(entry.arrays["axis"]))
            axes = grid[row, column]
            axes.imshow(
                labels % 10, cmap=_LABELS, vmin=-0.5, vmax=9.5, origin="lower",
                interpolation="nearest", extent=(-reach, reach, -reach, reach),
            )  # fmt: skip
            axes.plot(0, 0, "+", color="black", ms=5, mew=1)
            if row == 0:
                axes.set_title(plain(f"λ = {entry.point.labels[-1]}"), fontsize=9, color=INK)
            if row == len(lines) - 1:
                axes.set_xlabel("off the connected pixels", fontsize=7, color=SOFT)
            if column == 1:
                axes.set_ylabel("on them", fontsize=7, color=SOFT)
        for axes in grid[row]:
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
    return figure


@drawing("layers")
def _layers(found: Reproduction, wanted: Drawing) -> Figure:
    """S0 Figs. 6 and 7: one heat map for each layer, in the network's order."""
    entry = found.entries[0]
    maps = {k: np.asarray(v, float) for k, v in entry.arrays.items() if min(np.shape(v)) > 1}
    columns = min(len(maps), int(wanted.options.get("columns", 6)))
    rows = -(-len(maps) // columns)
    figure = canvas(1.35 * columns, 1.5 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(maps) :]:
        axes.set_visible(False)
    for number, (axes, (name, heat)) in enumerate(zip(grid.flat, maps.items(), strict=False)):
        axes.imshow(heat, cmap="magma", vmin=0, interpolation="nearest")
        title = f"layer {number}" if number else "input"
        axes.set_title(f"{title}, {heat.shape[0]}×{heat.shape[1]}", fontsize=6.5, color=INK)
        axes.set_xlabel(plain(".".join(name.split(".")[-4:])) if number else "", fontsize=5)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    return figure
