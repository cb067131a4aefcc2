"""Figures of S4: the panda-type example, random views, and the PRM drawn from its object."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from feint.recipes.reproduce import Reproduction
from feint.recipes.schema import Drawing
from feint.reports.diagnostics_drawing import COLORS, bare, canvas, plain
from feint.reports.figures import INK, RULE, SOFT
from feint.reports.reproduction_figures import drawing
from feint.reports.reproduction_s2snet import clear, picture

__all__: list[str] = []

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@drawing("example sum")
def _sum(found: Reproduction, wanted: Drawing) -> Figure:
    """Image + perturbation = adversarial image, with classes and probabilities.

    Options: `classes`, `cifar10` to write CIFAR-10's names.
    """
    lines = list(found.entries)
    figure = canvas(6.6, 2.35 * len(lines))
    grid = figure.subplots(len(lines), 3, squeeze=False)
    names = CIFAR10 if wanted.options.get("classes") == "cifar10" else ()
    for row, entry in zip(grid, lines, strict=True):
        clean, attacked = (np.asarray(entry.arrays[k], float) for k in ("clean", "attacked"))
        delta = attacked - clean
        most = max(float(np.abs(delta).max()), 1e-9)
        images = (clean, 0.5 + 0.5 * delta / most, attacked)
        labels, sure = entry.arrays["classes"], entry.arrays["confidence"]

        def said(i: int, labels: Any = labels, sure: Any = sure) -> str:
            number = int(labels[i])
            name = names[number] if number < len(names) else f"class {number}"
            return f"“{name}”\n{100 * sure[i]:.1f} %"

        words = (said(0), f"perturbation\nat most {255 * most:.0f}/255", said(1))
        for axes, image, word in zip(row, images, words, strict=True):
            axes.imshow(picture(image), interpolation="nearest")
            clear(axes)
            axes.set_xlabel(plain(word), fontsize=9, color=INK)
        for axes, sign in zip(row[1:], ("+", "="), strict=True):
            axes.text(-0.14, 0.5, sign, transform=axes.transAxes, fontsize=18, ha="center",
                      va="center", color=INK)  # fmt: skip
        row[0].set_ylabel(plain(", ".join(entry.point.labels)), fontsize=8, color=SOFT)
    return figure


@drawing("random views")
def _views(found: Reproduction, wanted: Drawing) -> Figure:
    """A row per point: the image, then what draws of the defense make of it."""
    count = max(len(e.arrays["seen"]) for e in found.entries)
    figure = canvas(1.5 * (count + 1), 1.75 * len(found.entries) + 0.2)
    grid = figure.subplots(len(found.entries), count + 1, squeeze=False)
    for row, entry in zip(grid, found.entries, strict=True):
        row[0].imshow(picture(entry.arrays["clean"]), interpolation="nearest")
        shape = np.shape(entry.arrays["clean"])[1:]
        row[0].set_title(f"image, {shape[0]}×{shape[1]}", fontsize=8, color=INK)
        for number, image in enumerate(entry.arrays["seen"], 1):
            row[number].imshow(picture(image), interpolation="nearest")
            size = np.shape(image)[1:]
            row[number].set_title(f"draw {number}, {size[0]}×{size[1]}", fontsize=8, color=INK)
        for axes in row:
            clear(axes)
        value = entry.ours.value or 0.0
        text = f"{', '.join(entry.point.labels)}\n{100 * value:.1f} % right"
        row[0].set_ylabel(plain(text), fontsize=8, color=INK)
    return figure


@drawing("prm")
def _prm(found: Reproduction, wanted: Drawing) -> Figure:
    """The module as its object is: images between the steps, and the network's parts to scale."""
    arrays = found.entries[0].arrays
    lam, shifts = np.asarray(arrays["lam"]), np.asarray(arrays["shifts"])
    figure = canvas(10.5, 4.6)
    grid = figure.subplots(2, 1, height_ratios=(1.0, 1.15))
    top = grid[0]
    clear(top)
    top.set_xlim(0, 10.5)
    top.set_ylim(-0.35, 2.0)
    connected = np.asarray(arrays["connected"], float)
    read = np.asarray(arrays["shifted"], float) * connected + 0.96 * (1 - connected)
    steps = (
        ("x", arrays["image"]),
        (f"s(x): one of {len(shifts)} shifts", arrays["shifted"]),
        (f"what A reads: {100 * connected.mean():.0f} %", read),
        ("A(s(x))", arrays["made"]),
        ("PRM(x)", arrays["out"]),
    )
    for number, (name, image) in enumerate(steps):
        left = 0.15 + 2.15 * number
        top.imshow(picture(image), extent=(left, left + 1.5, 0.2, 1.7), interpolation="nearest")
        top.text(left + 0.75, 1.83, name, ha="center", fontsize=8.5, color=INK)
        if number:
            top.annotate("", (left - 0.06, 0.95), (left - 0.58, 0.95),
                         arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.2})  # fmt: skip
    mixed = ", ".join(f"{v:g}" for v in lam)
    top.plot([3.05, 3.05, 9.5], [0.17, 0.02, 0.02], color=COLORS[1], lw=1.2)
    top.annotate("", (9.5, 0.2), (9.5, 0.02),
                 arrowprops={"arrowstyle": "-|>", "color": COLORS[1], "lw": 1.2,
                             "shrinkA": 0, "shrinkB": 0})  # fmt: skip
    top.text(6.3, -0.25, f"(1 − λ)·s(x) + λ·A(s(x)), λ = {mixed}", ha="center", fontsize=8.5,
             color=COLORS[1])  # fmt: skip
    top.set_aspect("auto")
    below = grid[1]
    clear(below)
    shapes = [tuple(int(n) for n in row) for row in arrays["shapes"]]
    names = [str(name) for name in arrays["names"]]
    side, most = max(s[1] for s in shapes), max(s[0] for s in shapes)
    at = 0.0
    for name, (channels, height, width) in zip(names, shapes, strict=True):
        tall, wide = 0.35 + 1.65 * height / side, 0.18 + 0.62 * channels / most
        kind = name.partition(".")[0]
        color = {"first": COLORS[1], "down": COLORS[0], "up": COLORS[2]}.get(kind, COLORS[3])
        below.add_patch(Rectangle((at, -tall / 2), wide, tall, fc=color, alpha=0.22, lw=0))
        below.add_patch(Rectangle((at, -tall / 2), wide, tall, fill=False, ec=color, lw=1.2))
        below.text(at + wide / 2, tall / 2 + 0.08, plain(name), ha="center", fontsize=8, color=INK)
        below.text(at + wide / 2, -tall / 2 - 0.16, f"{channels}×{height}×{width}", ha="center",
                   va="top", fontsize=7, color=SOFT)  # fmt: skip
        at += wide + 0.55
    below.set_xlim(-0.3, at)
    below.set_ylim(-1.55, 1.45)
    below.text(-0.25, 1.32, "the network A, a UNet whose first layer skips pixels: channels ×"
               " height × width of every output", fontsize=8.5, color=INK)  # fmt: skip
    return figure


@drawing("accuracy and overlap")
def _two(found: Reproduction, wanted: Drawing) -> Figure:
    """A panel per classifier: every label of the second axis as a line along the last."""
    names = list(found.recipe.axes)
    panels, kinds, _ = (list(found.recipe.axes[n]) for n in names)
    figure = canvas(3.7 * len(panels) + 0.4, 3.3)
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    for axes, panel in zip(grid[0], panels, strict=True):
        for color, kind in zip(COLORS, kinds, strict=False):
            line = [e for e in found.entries if e.point.labels[:2] == (panel, kind)]
            if all(e.ours.value is None for e in line):
                continue
            at = np.array([float(e.point.labels[2]) for e in line])
            values = np.array([np.nan if e.ours.value is None else e.ours.value for e in line])
            axes.plot(at, 100 * values, color=color, marker="o", ms=3, lw=1.5, label=plain(kind))
            low = np.array([v if e.ours.low is None else e.ours.low
                            for e, v in zip(line, values, strict=True)], float)  # fmt: skip
            high = np.array([v if e.ours.high is None else e.ours.high
                             for e, v in zip(line, values, strict=True)], float)  # fmt: skip
            axes.fill_between(at, 100 * low, 100 * high, color=color, alpha=0.14, lw=0)
        axes.axhline(100 / 7, color=RULE, lw=1, ls="--")
        bare(axes)
        axes.set_title(plain(panel), fontsize=9, color=INK, loc="left")
        axes.set_xlabel(names[-1], fontsize=8.5, color=INK)
        axes.grid(axis="y", color=RULE, lw=0.6)
        axes.set_axisbelow(True)
        axes.set_ylim(-3, 103)
    grid[0, 0].set_ylabel("%", fontsize=8.5, color=INK)
    grid[0, 0].legend(fontsize=7.5, frameon=False)
    figure.suptitle("- - the overlap of two random quarters (1/7)", fontsize=7.5, color=SOFT,
                    x=0.01, ha="left")  # fmt: skip
    return figure
