"""Figures as files, PNG and vector: the story, accuracy against eps, the images.

Drawn with matplotlib's objects, without its global state; the same data give the same file.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory
from PIL import Image

from feint.core.errors import ConfigError
from feint.reports.curves import curves, telling
from feint.reports.data import ReportData
from feint.reports.pictures import galleries
from feint.reports.story import story
from feint.reports.svg import TICKS, ticks
from feint.reports.words import interval_of, percent
from feint.store.files import write_atomic

__all__ = ["curve_figure", "image_figure", "save", "story_figure"]

INK, SOFT, RULE = "#1c1b19", "#5d5a54", "#dedad1"
MARKS: dict[str, dict[str, Any]] = {
    "none": {"color": SOFT, "marker": "o", "markerfacecolor": "white"},
    "claim": {"color": "#94650a", "marker": "D", "markerfacecolor": "white"},
    "gray-box": {"color": "#2463a8", "marker": "o"},
    "transfer": {"color": "#1d7a70", "marker": "s"},
    "removal": {"color": "#7453a0", "marker": "v"},
    "decision": {"color": "#5f6f14", "marker": "p"},
    "score": {"color": "#5f6f14", "marker": "h"},
    "semi-brute-force": {"color": "#a83279", "marker": "P"},
    "white-box": {"color": "#bf3a1d", "marker": "^"},
    "adaptive": {"color": "#8c1c13", "marker": "d"},
    "bare": {"color": SOFT, "marker": "x"},
    "worst": {"color": INK, "marker": "|"},
}
"""How each kind is drawn; the page's light colors."""
_OTHER: dict[str, Any] = {"color": INK, "marker": "X"}
_SUFFIXES = (".svg", ".png", ".pdf")


def _figure(width: float, height: float, layout: Literal["constrained"] | None = None) -> Figure:
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _bare(axes: Any) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=7.5, labelcolor=SOFT)


def story_figure(data: ReportData) -> Figure:
    """The ladder: per pipeline clean, undefended, published ◇, every rung, the worst case.

    Clean accuracy runs through each lane as a dashed line of reference.

    Every dot and diamond has the id `"lane-L-mark-M"`, its whisker the same with `"-whisker"`.
    """
    lanes = story(data)
    lines = sum(len(lane.marks) + 1.5 for lane in lanes) or 1.0
    height = 0.55 + 0.22 * lines
    figure = _figure(8.4, height)
    axes = figure.add_axes((0.385, 0.4 / height, 0.41, 0.22 * lines / height))
    _bare(axes)
    axes.set_xlim(0, 100)
    axes.set_ylim(lines - 0.5, -0.5)
    axes.set_yticks([])
    axes.set_xticks(TICKS, [f"{t} %" if t == 100 else str(t) for t in TICKS])
    across = blended_transform_factory(figure.transFigure, axes.transData)
    words: dict[str, Any] = {"transform": across, "va": "center", "clip_on": False}
    y = 0.0
    for number, lane in enumerate(lanes):
        name, end = _short(_plain(lane.name), 90), y + len(lane.marks) + 0.5
        axes.text(0.02, y, name, weight="bold", size=8.5, color=INK, **words)
        axes.text(0.98, y, lane.threat, size=7.5, color=SOFT, ha="right", **words)
        axes.vlines(TICKS, y + 0.5, end, color=RULE, linewidth=0.7, zorder=0)
        if lane.clean is not None:
            at = 100 * lane.clean
            axes.vlines([at], y + 0.5, end, color=SOFT, linewidth=0.7, linestyle="--", zorder=0)
        for place, mark in enumerate(lane.marks):
            y += 1
            style, gid = MARKS.get(mark.kind, _OTHER), f"lane-{number}-mark-{place}"
            if mark.measured:
                (line,) = axes.plot(
                    [100 * mark.low, 100 * mark.high],
                    [y, y],
                    color=style["color"],
                    alpha=0.4,
                    linewidth=2.4,
                    solid_capstyle="butt",
                    clip_on=False,
                )
                line.set_gid(f"{gid}-whisker")
            elif mark.low < mark.high:
                ends = [100 * mark.low, 100 * mark.high]
                axes.plot(ends, [y, y], color=style["color"], linestyle=":", linewidth=1.6)
            size = 11 if mark.kind == "worst" else 5.5
            edge = 3.0 if mark.kind == "worst" else 1.4
            shape: dict[str, Any] = {"linestyle": "none", "markersize": size}
            shape["markeredgewidth"] = edge
            (dot,) = axes.plot([100 * mark.value], [y], clip_on=False, **shape, **style)
            dot.set_gid(gid)
            label = axes.text(0.03, y, mark.label, size=8, color=INK, **words)
            label.set_gid(f"{gid}-label")
            note = _short(_plain(mark.note), 33)
            axes.text(0.15, y, note, size=7.5, color=SOFT, **words)
            axes.text(0.862, y, percent(mark.value), size=8, color=INK, ha="right", **words)
            beside = "elsewhere" if mark.context else "claim"
            if mark.measured:
                beside = interval_of(mark.low, mark.high)
            axes.text(0.98, y, beside, size=7.5, color=SOFT, ha="right", **words)
        y += 1.5
    return figure


def curve_figure(data: ReportData) -> Figure:
    """Accuracy against eps, one panel per pipeline and norm, a line per scenario, 95 % whiskers."""
    found = telling(curves(data))
    across = min(3, max(1, len(found)))
    down = -(-len(found) // across) or 1
    figure = _figure(0.3 + 2.8 * across, 0.3 + 2.3 * down, "constrained")
    for number, curve in enumerate(found):
        axes = figure.add_subplot(down, across, number + 1)
        _bare(axes)
        axes.set_title(_short(_plain(curve.name), 42), size=7.5, weight="bold", color=INK)
        reach = max(c.reach for c in found if c.norm == curve.norm) or 1.0
        axes.set_xlim(-0.03 * reach, reach * 1.03)
        axes.set_ylim(-3, 103)
        axes.set_yticks(TICKS)
        axes.grid(axis="y", color=RULE, linewidth=0.7)
        marks = ticks(reach, curve.norm)
        axes.set_xticks([eps for eps, _ in marks], [text for _, text in marks], size=7)
        axes.set_xlabel(f"eps ({curve.norm})", size=7.5, color=SOFT)
        for series in curve.series:
            eps, rates = zip(*series.points, strict=True)
            value = np.array([r.value for r in rates])
            spread = [value - [r.low for r in rates], np.array([r.high for r in rates]) - value]
            axes.errorbar(
                eps,
                100 * value,
                100 * np.clip(spread, 0, None),
                label=series.scenario,
                linestyle="--" if series.derived else "-",
                linewidth=1.3,
                elinewidth=1,
                markersize=4,
                **MARKS.get(series.scenario, _OTHER),
            )
        axes.legend(frameon=False, fontsize=7, labelcolor=INK)
    if not found:
        figure.text(0.5, 0.5, "nothing was attacked", ha="center", color=SOFT)
    return figure


def image_figure(data: ReportData) -> Figure:
    """The telling images: clean, attacked, the perturbation enlarged, the input gradient."""
    shown = galleries(data)
    across = max((len(s.pictures) for g in shown for s in g.strips), default=1)
    rows = sum(len(g.strips) for g in shown)
    tall = max(0.5, rows * 1.45 + len(shown) * 0.4)
    figure = _figure(1.2 * across + 0.1, tall)
    y = tall
    for gallery in shown:
        y -= 0.3
        name = _plain(f"{gallery.name}, {gallery.attack}")
        figure.text(0.01, y / tall, name, size=8, weight="bold", color=INK)
        y -= 0.1
        for strip in gallery.strips:
            y -= 1.45
            for place, picture in enumerate(strip.pictures):
                box = ((0.05 + 1.2 * place) / (1.2 * across + 0.1), (y + 0.05) / tall)
                axes = figure.add_axes((*box, 1.1 / (1.2 * across + 0.1), 1.1 / tall))
                axes.set_axis_off()
                raw = base64.b64decode(picture.uri.partition(",")[2])
                axes.imshow(np.asarray(Image.open(io.BytesIO(raw))), interpolation="nearest")
                color = {True: "#2d7249", False: "#b3261e", None: SOFT}[picture.right]
                title = f"{picture.title}\n{_short(_plain(picture.caption), 22)}"
                axes.set_title(title, size=6.5, color=color, pad=2)
    if not rows:
        figure.text(0.5, 0.5, "no images", ha="center", color=SOFT)
    return figure


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as .svg, .png or .pdf, without dates: equal figures give equal files.

    Raises:
        ConfigError: Another suffix.
        DataError: It cannot be written.
    """
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"{path.name}: a figure is saved as {', '.join(_SUFFIXES)}")
    kind = path.suffix[1:]
    none = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}[kind]
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "feint", "svg.fonttype": "none"}):
        figure.savefig(buffer, format=kind, dpi=200, metadata=none)
    write_atomic(path, buffer.getvalue())
    return path


def _plain(text: str) -> str:
    """Text that matplotlib draws as it stands: no mathematics between dollars."""
    return text.replace("$", r"\$")


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
