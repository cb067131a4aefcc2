"""Figures of S2: deflected images, perturbation and activation maps, the search, ranks."""

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

_MAP = "magma"


def _picture(array: Any) -> NDArray[Any]:
    return np.asarray(array, float).transpose(1, 2, 0).clip(0, 1)


def _thumbnail(picture: NDArray[Any], side: int = 112) -> NDArray[Any]:
    """Means over squares of pixels, so that the shorter side has `side` or a little more."""
    step = max(1, min(picture.shape[:2]) // side)
    height, width = (n // step for n in picture.shape[:2])
    whole = picture[: height * step, : width * step]
    cells: NDArray[Any] = whole.reshape(height, step, width, step, *picture.shape[2:])
    return cells.mean((1, 3))  # type: ignore[no-any-return]


def _empty(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _percent(entry: Entry) -> float:
    return np.nan if entry.ours.value is None else 100 * entry.ours.value


@drawing("deflections")
def _deflections(found: Reproduction, _: Drawing) -> Figure:
    """S2 Fig. 1: a row for each number of deflections, differences on one scale around gray."""
    after = {e.point.labels[1]: e for e in found.entries[len(found.entries) // 2 :]}
    before = {e.point.labels[1]: e for e in found.entries[: len(found.entries) // 2]}
    figure = canvas(6.8, 2.15 * len(before) + 0.2)
    grid = figure.subplots(len(before), 3, squeeze=False)
    for row, (count, entry) in zip(grid, before.items(), strict=True):
        clean, moved, denoised = (
            np.asarray(entry.arrays[n], float) for n in ("clean", "deflected", "denoised")
        )
        # One gain for all rows: ±0.5 of the range of pixel values fills the scale.
        pictures = (moved, 0.5 + (moved - clean), 0.5 + (denoised - clean))
        for axes, picture in zip(row, pictures, strict=True):
            axes.imshow(_picture(picture), interpolation="none")  # embedded as it is
            _empty(axes)
        row[0].set_ylabel(f"K = {count}", fontsize=9, color=INK)
        for axes, one in ((row[1], entry), (row[2], after[count])):
            axes.set_xlabel(f"rms {one.ours.value:.3g}", fontsize=8, color=SOFT)
    for axes, title in zip(
        grid[0], ("deflected", "difference", "difference after denoising"), strict=True
    ):
        axes.set_title(title, fontsize=9, color=INK)
    return figure


@drawing("places")
def _places(found: Reproduction, _: Drawing) -> Figure:
    """S2 Fig. 3: where perturbations lie; colors from 0 to three times an even spread, for all."""
    columns = 4
    rows = -(-len(found.entries) // columns)
    figure = canvas(1.75 * columns + 0.7, 2.0 * rows + 0.2)
    grid = figure.subplots(rows, columns, squeeze=False)
    shown = None
    for axes, entry in zip(grid.flat, found.entries, strict=False):
        picture = np.asarray(entry.arrays["map"], float)
        picture = picture / max(picture.mean(), 1e-30)
        shown = axes.imshow(picture, cmap=_MAP, vmin=0, vmax=3, interpolation="none")
        axes.set_title(plain(entry.point.labels[-1]), fontsize=9, color=INK)
        axes.set_xlabel(f"{_percent(entry):.0f} % on the object's half", fontsize=7, color=SOFT)
    for axes in grid.flat:
        _empty(axes)
    for axes in grid.flat[len(found.entries) :]:
        axes.set_visible(False)
    if shown is not None:
        bar = figure.colorbar(shown, ax=grid, shrink=0.7, pad=0.01)
        bar.set_label("times an even spread", fontsize=8, color=SOFT)
        bar.ax.tick_params(labelsize=7, length=0)
        bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


@drawing("activation maps")
def _maps(found: Reproduction, _: Drawing) -> Figure:
    """S2 Figs. 4 and 7: image, and each kind of map before and after the attack."""
    kinds = list(found.recipe.axes["map"])
    lines: list[tuple[str, dict[str, Entry], int]] = []
    attacks: dict[str, dict[str, Entry]] = {}
    for entry in found.entries:
        attacks.setdefault(entry.point.labels[0], {})[entry.point.labels[1]] = entry
    for attack, pair in attacks.items():
        count = min(len(e.arrays.get("clean", ())) for e in pair.values())
        lines += [(attack, pair, i) for i in range(count)]
    titles = ["image", *(f"{k}, {when}" for k in kinds for when in ("clean", "attacked"))]
    figure = canvas(1.55 * len(titles) + 0.5, 1.62 * max(1, len(lines)) + 0.35)
    if not lines:
        figure.text(0.5, 0.5, "no image fell to the attack", ha="center", color=SOFT)
        return figure
    grid = figure.subplots(len(lines), len(titles), squeeze=False)
    for row, (attack, pair, i) in zip(grid, lines, strict=True):
        clean = _thumbnail(_picture(pair[kinds[0]].arrays["clean"][i]))
        row[0].imshow(clean, interpolation="none")
        shown = [pair[k].arrays[w][i] for k in kinds for w in ("before", "after")]
        for axes, picture in zip(row[1:], shown, strict=True):
            small = _thumbnail(np.asarray(picture, float))
            axes.imshow(small, cmap=_MAP, vmin=0, vmax=1, interpolation="none")
        for axes in row:
            _empty(axes)
        if len(attacks) > 1 or i == 0:
            row[0].set_ylabel(plain(attack), fontsize=9, color=INK)
        if i == 0:
            for place, kind in enumerate(kinds):
                kept = pair[kind].ours.value
                words = "" if kept is None else f"correlation {kept:.2f} (all images)"
                row[2 + 2 * place].set_xlabel(words, fontsize=6.5, color=SOFT)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=8.5, color=INK)
    return figure


@drawing("search")
def _search(found: Reproduction, _: Drawing) -> Figure:
    """S2 Fig. 5: accuracy against each parameter, a line for each attack."""
    panels: dict[str, list[str]] = {}
    for label in found.recipe.axes["setting"]:
        panels.setdefault(label.partition(" = ")[0], []).append(label)
    entries = {e.point.labels: e for e in found.entries}
    figure = canvas(3.3 * len(panels) + 1.1, 3.1)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    lines = (*COLORS, "#1a1a1a")
    for axes, (parameter, labels) in zip(grid, panels.items(), strict=True):
        at = np.arange(len(labels))
        for color, attack in zip(lines, found.recipe.axes["attack"], strict=False):
            line = [entries[attack, label].ours for label in labels]
            y = np.array([100 * (n.value or 0.0) for n in line])
            axes.plot(
                at, y, color=color, marker="o", ms=3.5, lw=1.4, alpha=0.9, label=plain(attack)
            )
        axes.set_xticks(at, [label.partition(" = ")[2] for label in labels])
        bare(axes)
        axes.grid(axis="y", color=RULE, lw=0.6)
        axes.set_axisbelow(True)
        axes.set_ylim(-3, 103)
        axes.set_xlabel(parameter, fontsize=9, color=INK)
    grid[0].set_ylabel("accuracy (%)", fontsize=8, color=INK)
    handles, names = grid[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", fontsize=7.5, frameon=False)
    return figure


@drawing("ranks")
def _ranks(found: Reproduction, _: Drawing) -> Figure:
    """S2 Fig. 6: bars by rank, a color for each attack; 0 is beyond the top five."""
    sides, attacks, ranks = (list(labels) for labels in found.recipe.axes.values())
    entries = {e.point.labels: e for e in found.entries}
    figure = canvas(9.4, 3.0)
    grid = figure.subplots(1, len(sides), sharey=True, squeeze=False)[0]
    width = 0.82 / len(attacks)
    for axes, side in zip(grid, sides, strict=True):
        for i, attack in enumerate(attacks):
            color = "#1a1a1a" if attack.startswith("all") else COLORS[i % len(COLORS)]
            at = np.arange(len(ranks)) + (i - (len(attacks) - 1) / 2) * width
            heights = [np.nan_to_num(_percent(entries[side, attack, r])) for r in ranks]
            axes.bar(at, heights, width, color=color, label=plain(attack))
            published = [entries[side, attack, r].point.published for r in ranks]
            for x, value in zip(at, published, strict=True):
                if value is not None:
                    axes.plot(x, 100 * value, marker="D", ms=5, mfc="white", mec=INK, ls="none")
        axes.set_xticks(range(len(ranks)), ranks)
        bare(axes)
        axes.grid(axis="y", color=RULE, lw=0.6)
        axes.set_axisbelow(True)
        axes.set_title(plain(side), fontsize=9, color=INK, loc="left")
        axes.set_xlabel("rank (0: beyond the top five; ◇ published)", fontsize=8, color=INK)
    grid[0].set_ylabel("images that fell (%)", fontsize=8, color=INK)
    handles, names = grid[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", fontsize=7.5, frameon=False)
    return figure
