"""Figures of a diagnosis: one per measure, drawn with matplotlib's objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import ListedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from feint.core.errors import UnknownNameError
from feint.diagnostics import Diagnosis, Measured, Number
from feint.diagnostics.numbers import rate
from feint.reports.diagnostics_drawing import (
    COLORS,
    Grid,
    arrays,
    bare,
    canvas,
    middle,
    percent,
    plain,
    scaled,
    sets,
    short,
    stacked,
)
from feint.reports.figures import INK, RULE, SOFT

__all__ = ["FIGURES", "figure"]

LAYERS = 7
"""Most layers in the figure of layers."""


def _found(data: Diagnosis, measure: str) -> list[Measured]:
    return [data.results[measure][name] for name in data.subjects]


def _cut(data: Diagnosis) -> str:
    """What to say of maps that are shown in part."""
    large = max(data.shape[1:]) > 48
    return f" (middle 32×32 of {data.shape[1]}×{data.shape[2]} pixels)" if large else ""


def _range(found: Sequence[Measured], key: str, digits: int = 0) -> str:
    """From the least to the greatest of the subjects' numbers."""
    values = [v for m in found if (v := m.numbers[key].value) is not None and np.isfinite(v)]
    if not values:
        return "–"
    ends = [percent(v, digits) for v in (min(values), max(values))]
    return ends[0] if ends[0] == ends[1] else f"{ends[0].removesuffix(' %')} to {ends[1]}"


def _overlap(data: Diagnosis, _: Sequence[str]) -> Figure:
    found = _found(data, "overlap")
    p = data.options.share
    seen = _range(found, "connected_in_top")
    title = f"Gradient overlap Ω: the top {percent(p)} of the pixels hold {seen} of C{_cut(data)}"
    grid = Grid(title, data.subjects, 2)
    notes = [f"{percent(m.numbers['share_on_connected'])} of Ω on C" for m in found]
    grid.maps(0, [middle(a) for a in arrays(found, "omega")], notes, "Ω / max Ω", top=1.0)
    pairs = zip(arrays(found, "connected"), arrays(found, "top"), strict=True)
    sets(grid, 1, list(pairs), f"G({p:g})")
    return grid.figure


def _gradients(data: Diagnosis, _: Sequence[str]) -> Figure:
    found = _found(data, "gradients")
    seen = _range(found, "share_on_connected")
    c = percent(float(np.mean(found[0].arrays["connected"])))
    title = f"Input gradients: {seen} lies on C, {c} of the pixels{_cut(data)}"
    grid = Grid(title, data.subjects, 2)
    notes = [f"{percent(m.numbers['share_on_connected'])} of Σ|∂L/∂x| on C" for m in found]
    maps = [middle(scaled(a)) for a in arrays(found, "robustness")]
    grid.maps(0, maps, notes, "R, in multiples of its mean")
    pairs = zip(arrays(found, "connected"), arrays(found, "top"), strict=True)
    sets(grid, 1, list(pairs), f"top {percent(data.options.share)} of R")
    return grid.figure


def _telling(maps: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> list[str]:
    """The input, and of each resolution the first and the last layer; at most LAYERS."""
    chosen = [0]
    for i in range(1, len(maps)):
        first = shapes[i] != shapes[i - 1] or i == 1
        last = i + 1 == len(maps) or shapes[i + 1] != shapes[i]
        if (first or last) and min(shapes[i]) >= 2:
            chosen.append(i)
    if len(chosen) > LAYERS:
        places = np.linspace(0, len(chosen) - 1, LAYERS).round().astype(int)
        chosen = [chosen[i] for i in dict.fromkeys(places.tolist())]
    return [maps[i] for i in chosen]


def _layers(data: Diagnosis, _: Sequence[str]) -> Figure:
    found = _found(data, "layers")
    rows = [_telling(list(m.arrays), [a.shape for a in m.arrays.values()]) for m in found]
    across = max(len(r) for r in rows)
    drawing = canvas(1.55 * across + 0.9, 0.8 + 1.75 * len(found))
    title = "Gradients after each layer: uneven strides leave a checkerboard before them"
    drawing.suptitle(plain(title), size=11, weight="bold", color=INK)
    grid = drawing.subplots(len(found), across, squeeze=False)
    for line, measured, layers, name in zip(grid, found, rows, data.subjects, strict=True):
        for axes in line:
            bare(axes)
            axes.set_xticks([])
            axes.set_yticks([])
        for axes, layer in zip(line, layers, strict=False):
            heat = scaled(np.asarray(measured.arrays[layer]))
            drawn = axes.imshow(middle(heat), cmap="magma", vmin=0, vmax=3, interpolation="nearest")
            phase = percent(measured.numbers.get(layer))
            size = "×".join(map(str, heat.shape))
            words = layer.replace("model.net.net.", "").replace("model.", "")
            axes.set_title(f"{_tail(words)}\n{size}, phase {phase}", size=7, color=INK)
        line[0].set_ylabel(short(name, 26), size=8, color=INK)
    bar = drawing.colorbar(drawn, ax=list(grid.flat), shrink=0.7, aspect=24, extend="max")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8, labelcolor=SOFT)
    bar.set_label("h, in multiples of its mean", size=8.5, color=SOFT)
    return drawing


def _tail(name: str) -> str:
    return name if len(name) <= 18 else "…" + name[-17:].lstrip(".")


def _p_attack(data: Diagnosis, _: Sequence[str]) -> Figure:
    found = _found(data, "p_attack")
    counted = [int(m.arrays["counted"].sum()) for m in found]
    title = (
        f"One white pixel breaks {_range(found, 'rate', 1)} of the images, on average{_cut(data)}"
    )
    grid = Grid(title, data.subjects, 1)
    notes = [
        f"on C {percent(m.numbers['on_connected'], 1)}, off C "
        f"{percent(m.numbers['off_connected'], 1)}\n{n} images"
        for m, n in zip(found, counted, strict=True)
    ]
    maps = [_window(100 * a) for a in arrays(found, "rate")]
    highest = max([float(np.nanmax(m)) for m in maps if np.isfinite(m).any()] or [0.0])
    grid.maps(0, maps, notes, "images broken, %", top=highest or 1.0)
    return grid.figure


def _window(rate_: Any) -> Any:
    """The part of the map that was measured."""
    known = np.isfinite(rate_)
    if not known.any():
        return middle(rate_)
    rows, columns = np.flatnonzero(known.any(1)), np.flatnonzero(known.any(0))
    return rate_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _perturbation(data: Diagnosis, _: Sequence[str]) -> Figure:
    found = _found(data, "perturbation")
    seen = _range(found, "share_on_connected")
    title = f"Attacks put {seen} of their perturbation on C{_cut(data)}"
    grid = Grid(title, data.subjects, 1)
    notes = [
        f"{percent(m.numbers['share_on_connected'])} of Σ|δ| on C\naccuracy "
        f"{percent(m.numbers['clean_accuracy'])} → {percent(m.numbers['accuracy'])}"
        for m in found
    ]
    maps = [middle(255 * a) for a in arrays(found, "size")]
    grid.maps(0, maps, notes, "mean |x_adv − x|, 8-bit levels")
    return grid.figure


def _masked(data: Diagnosis, _: Sequence[str]) -> Figure:
    found = _found(data, "masked")
    drawing = canvas(max(6.4, 2.9 * len(found) + 0.4), 3.3)
    title = "Masked attacks: the same perturbation kept on some pixels only"
    drawing.suptitle(title, size=11, weight="bold", color=INK)
    grid = drawing.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for axes, measured, name in zip(grid, found, data.subjects, strict=True):
        bare(axes)
        axes.grid(axis="y", color=RULE, linewidth=0.7)
        shares = 100 * np.asarray(measured.arrays["shares"])
        for key, color, label in (
            ("bottom", COLORS[1], "on the least sensitive pixels"),
            ("top", COLORS[0], "on the most sensitive pixels"),
        ):
            right = np.asarray(measured.arrays[key])
            bands = [rate(torch.from_numpy(row)) for row in np.ascontiguousarray(right)]
            value = [100 * (b.value or 0) for b in bands]
            low, high = ([100 * (getattr(b, end) or 0) for b in bands] for end in ("low", "high"))
            axes.plot(shares, value, color=color, marker="o", markersize=3.5, label=label)
            axes.fill_between(shares, low, high, color=color, alpha=0.13, linewidth=0)
        axes.set_ylim(-3, 103)
        axes.set_xlim(-2, 102)
        axes.set_xlabel("pixels that carry the perturbation, %", size=8.5, color=SOFT)
        gap = percent(measured.numbers["gap"])
        axes.set_title(f"{short(name)}\nmean gap {gap}", size=8.5, color=INK)
    grid[0].set_ylabel(f"accuracy, % (n = {data.n}, band: 95 %)", size=8.5, color=SOFT)
    drawing.legend(
        *grid[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
    )
    return drawing


_PLANES = {
    "mask": ("gradient off C", "gradient on C"),
    "shift": ("perturbation δ", "δ moved by one pixel"),
    "random": ("perturbation δ", "random direction"),
}


def _labels(data: Diagnosis, classes: Sequence[str]) -> Figure:
    found = _found(data, "labels")
    every = np.unique(np.concatenate([m.arrays[p][0].ravel() for m in found for p in _PLANES]))
    own = int(found[0].arrays["label"][0])
    order = [own, *[int(c) for c in every if c != own]]
    palette = ["#e9e5da", *(to_hex(colormaps["tab20"](i % 20)) for i in range(len(order) - 1))]
    code = {label: i for i, label in enumerate(order)}
    drawing = canvas(10.4, 0.9 + 2.75 * len(found))
    title = "Label maps: decision regions around an image (pale: its true class)"
    drawing.suptitle(title, size=11, weight="bold", color=INK)
    grid = drawing.subplots(len(found), 4, squeeze=False, width_ratios=[0.8, 1, 1, 1])
    for line, measured, name in zip(grid, found, data.subjects, strict=True):
        bare(line[0])
        line[0].imshow(np.clip(measured.arrays["image"][0].transpose(1, 2, 0), 0, 1))
        line[0].set_xticks([])
        line[0].set_yticks([])
        line[0].set_title(f"{short(name, 26)}\n{_name(own, classes)}", size=8.5, color=INK)
        axis = measured.arrays["axis"]
        step = float(axis[1] - axis[0]) / 2
        extent = (float(axis[0]) - step, float(axis[-1]) + step) * 2
        for axes, (plane, (right, up)) in zip(line[1:], _PLANES.items(), strict=True):
            bare(axes)
            state = np.vectorize(code.get)(measured.arrays[plane][0])
            axes.imshow(
                state,
                cmap=ListedColormap(palette),
                vmin=-0.5,
                vmax=len(order) - 0.5,
                origin="lower",
                extent=extent,
                interpolation="nearest",
            )
            axes.plot([0], [0], marker="+", color=INK, markersize=7)
            away = _flip(measured.numbers[f"{plane}_flip_right"])
            above = _flip(measured.numbers[f"{plane}_flip_up"])
            axes.set_title(f"label changes: {away} →, {above} ↑", size=8.5, color=INK)
            axes.set_xlabel(f"{right}, l2", size=8, color=SOFT)
            axes.set_ylabel(f"{up}, l2", size=8, color=SOFT)
    shown = order[:12]
    handles = [
        Patch(facecolor=palette[code[c]], edgecolor=RULE, label=_name(c, classes)) for c in shown
    ]
    drawing.legend(
        handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=8.5
    )
    return drawing


def _flip(found: Number) -> str:
    return "never" if found.value is None or np.isinf(found.value) else f"at {found.value:.2g}"


def _name(label: int, classes: Sequence[str]) -> str:
    return plain(classes[label]) if label < len(classes) else f"class {label}"


def _ssim(data: Diagnosis, _: Sequence[str]) -> Figure:
    found = _found(data, "ssim")
    count = len(found)
    drawing = canvas(max(6.6, 2.2 + 1.25 * count), 1.9 + 0.62 * count)
    title = "Similarity of gradients (mean SSIM of their magnitudes)"
    drawing.suptitle(title, size=11, weight="bold", color=INK)
    axes = drawing.subplots()
    bare(axes)
    table = np.array(
        [
            [float(np.mean(m.arrays[f"to {n}"])) for n in data.subjects]
            + [float(np.mean(m.arrays["labels"]))]
            for m in found
        ]
    )
    drawn = axes.imshow(table, cmap="magma", vmin=0, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(table):
        color = "black" if value > 0.6 else "white"
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=color, size=9)
    axes.axvline(count - 0.5, color="white", linewidth=4)
    names = [short(n, 26) for n in data.subjects]
    columns = [stacked(n) for n in names]
    axes.set_xticks(range(count + 1), [*columns, "itself, for\nanother label"])
    axes.set_yticks(range(count), names)
    axes.xaxis.tick_top()
    bar = drawing.colorbar(drawn, ax=axes, shrink=0.9, aspect=14)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8, labelcolor=SOFT)
    bar.set_label("SSIM", size=8.5, color=SOFT)
    return drawing


def _rank(data: Diagnosis, _: Sequence[str]) -> Figure:
    found = _found(data, "rank")
    drawing = canvas(8.2, 3.3)
    title = "Rank of the adversarial class: runners-up are what attacks reach"
    drawing.suptitle(title, size=11, weight="bold", color=INK)
    grid = drawing.subplots(1, 2, sharey=True)
    wide = 0.8 / len(found)
    for axes, key, said in zip(
        grid,
        ("adversarial_shares", "original_shares"),
        ("adversarial class, in the clean predictions", "original class, in the attacked ones"),
        strict=True,
    ):
        bare(axes)
        axes.grid(axis="y", color=RULE, linewidth=0.7)
        axes.set_axisbelow(True)
        for i, (measured, name) in enumerate(zip(found, data.subjects, strict=True)):
            shares = 100 * np.nan_to_num(measured.arrays[key])
            place = np.arange(len(shares)) + (i - (len(found) - 1) / 2) * wide
            moved = measured.arrays["moved"].sum()
            label = f"{short(name)} ({moved} of {data.n} changed)"
            axes.bar(place, shares, wide, color=COLORS[i % len(COLORS)], label=label)
        ranks = [str(n + 1) for n in range(len(shares) - 1)]
        axes.set_xticks(range(len(shares)), [*ranks, "beyond"])
        axes.set_xlabel("rank", size=8.5, color=SOFT)
        axes.set_title(said, size=9, color=INK)
    grid[0].set_ylabel("images whose class changed, %", size=8.5, color=SOFT)
    drawing.legend(
        *grid[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
    )
    return drawing


FIGURES: dict[str, Callable[[Diagnosis, Sequence[str]], Figure]] = {
    "overlap": _overlap,
    "gradients": _gradients,
    "layers": _layers,
    "p_attack": _p_attack,
    "perturbation": _perturbation,
    "masked": _masked,
    "labels": _labels,
    "ssim": _ssim,
    "rank": _rank,
}
"""A figure for every measure."""


def figure(data: Diagnosis, measure: str, classes: Sequence[str] = ()) -> Figure:
    """The figure of a measure.

    Args:
        data: The diagnosis.
        measure: One that it has.
        classes: Names of the classes, if known.

    Raises:
        UnknownNameError: The diagnosis has no such measure.
    """
    if measure not in data.results:
        raise UnknownNameError("measure of this diagnosis", measure, data.results)
    return FIGURES[measure](data, classes)
