"""What the figures of a diagnosis share: canvas, maps on one colour scale, sets, words."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from feint.diagnostics import Measured, Number
from feint.reports.figures import INK, RULE, SOFT

__all__ = [
    "COLORS",
    "Grid",
    "arrays",
    "bare",
    "brief",
    "canvas",
    "middle",
    "number",
    "percent",
    "plain",
    "scaled",
    "sets",
    "short",
    "stacked",
]

COLORS = ("#2463a8", "#bf3a1d", "#1d7a70", "#94650a", "#7453a0", "#5d5a54")
"""Subjects, in order."""
LARGEST, SHOWN = 48, 32
"""Maps with a longer side are shown as their middle, or no pixel pattern could be seen."""
Map = NDArray[Any]


def canvas(width: float, height: float) -> Figure:
    """An empty figure without global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def bare(axes: Any) -> None:
    """No frame, small soft labels."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8, labelcolor=SOFT)


def plain(text: str) -> str:
    """Text that matplotlib draws as it stands: no mathematics between dollars."""
    return text.replace("$", r"\$")


def brief(text: str) -> str:
    """A model's spec without its kind and without folders."""
    return re.sub(r"\S*/", "", text).removeprefix("bundled:")


def short(text: str, length: int = 34) -> str:
    """A name that fits above a map: the kind of spec and folders go, then its middle."""
    text = plain(brief(text))
    keep = length // 2 - 1
    return text if len(text) <= length else f"{text[:keep]}…{text[-keep:]}"


def stacked(name: str, width: int = 14) -> str:
    """A name on as many lines as it takes, broken behind hyphens, slashes and blanks."""
    lines = [""]
    for part in re.findall(r"[^-/ ]*[-/ ]?", name):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def percent(number: Number | float | None, digits: int = 0) -> str:
    """A share as per cent: "87 %"."""
    value = number.value if isinstance(number, Number) else number
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.{digits}f} %"


def number(value: Number | None, digits: int = 2) -> str:
    """A number with so many decimals."""
    if value is None or value.value is None or math.isnan(value.value):
        return "–"
    return "∞" if math.isinf(value.value) else f"{value.value:.{digits}f}"


def middle(found: Map) -> Map:
    """The map, or its middle if it is large; the cut begins at an even row and column."""
    height, width = found.shape[-2:]
    if max(height, width) <= LARGEST:
        return found
    rows, columns = min(SHOWN, height), min(SHOWN, width)
    top, left = (height - rows) // 2 // 2 * 2, (width - columns) // 2 // 2 * 2
    return found[..., top : top + rows, left : left + columns]


def scaled(found: Map) -> Map:
    """A map in multiples of its own mean, so that maps of several models share a scale."""
    mean = float(np.nanmean(found)) if np.isfinite(found).any() else 0.0
    return found / mean if mean > 0 else found


class Grid:
    """A grid of panels: a column per subject, a title, colour bars at the right of their row."""

    def __init__(self, title: str, names: Sequence[str], rows: int, size: float = 2.35) -> None:
        self.names = names
        width = max(5.2, size * len(names) + 1.1)
        self.figure = canvas(width, 0.7 + rows * (size + 0.2))
        self.figure.suptitle(title, size=11, weight="bold", color=INK, wrap=True)
        self.axes = self.figure.subplots(rows, len(names), squeeze=False)
        for axes in self.axes.flat:
            bare(axes)
            axes.set_xticks([])
            axes.set_yticks([])

    def maps(
        self,
        row: int,
        maps: Sequence[Map],
        notes: Sequence[str],
        label: str,
        *,
        top: float | None = None,
        bottom: float = 0.0,
    ) -> None:
        """A row of maps on one colour scale, each with the subject's name and a note.

        Args:
            row: Which.
            maps: One per subject; NaN is left blank.
            notes: One per subject: what is seen.
            label: Of the colour bar.
            top: Upper end of the scale; by default the 99.5th per cent of all values.
            bottom: Lower end.
        """
        if top is None:
            every = np.concatenate([m[np.isfinite(m)].ravel() for m in maps])
            top = float(np.quantile(every, 0.995)) if every.size else 1.0
            top = top if top > bottom else max(float(every.max(initial=0)), bottom + 1e-12)
        for axes, found, name, note in zip(self.axes[row], maps, self.names, notes, strict=True):
            drawn = axes.imshow(found, cmap="magma", vmin=bottom, vmax=top, interpolation="nearest")
            axes.set_title(f"{short(name)}\n{note}", size=8.5, color=INK)
            if found.shape[0] < 2:
                axes.set_aspect("auto")
        # Beside all rows, so that the panels of a column stay in line.
        rows = len(self.axes)
        bar = self.figure.colorbar(
            drawn,
            ax=list(self.axes.flat),
            shrink=0.82 / rows,
            aspect=18,
            anchor=(0, 1 - (row + 0.14) / rows),
        )
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=8, labelcolor=SOFT)
        bar.set_label(label, size=8.5, color=SOFT)


_SETS = ("#f4f2ec", "#9fc3ea", "#e8b04b", "#8f2a12")


def sets(grid: Grid, row: int, pairs: Sequence[tuple[Map, Map]], what: str) -> None:
    """A row of two sets of pixels: C, another one, and where they meet.

    Args:
        grid: Where to draw.
        row: Which row.
        pairs: (C, the other) per subject, bool.
        what: The other set's name.
    """
    colors = ListedColormap(_SETS)
    for axes, (connected, other) in zip(grid.axes[row], pairs, strict=True):
        state = middle(connected).astype(int) + 2 * middle(other).astype(int)
        axes.imshow(state, cmap=colors, vmin=-0.5, vmax=3.5, interpolation="nearest")
        share = (connected & other).sum() / max(1, int(connected.sum()))
        axes.set_title(f"{percent(float(share), 1)} of C in {what}", size=8.5, color=INK)
    names = ("neither", "C only", f"{what} only", f"C and {what}")
    handles = [
        Patch(facecolor=c, edgecolor=RULE, label=n) for c, n in zip(_SETS, names, strict=True)
    ]
    grid.figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=8,
        labelcolor=INK,
    )


def arrays(found: Sequence[Measured], key: str) -> list[Map]:
    """One array of every subject."""
    return [np.asarray(m.arrays[key]) for m in found]
