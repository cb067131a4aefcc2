"""Figures of S3: curves by distance, gradients, domains, sets, protocols and examples."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch
from numpy.typing import NDArray

from feint.evaluation.scenarios import get_scenario
from feint.recipes.reproduce import Entry, Reproduction
from feint.recipes.schema import Drawing
from feint.reports.diagnostics_drawing import COLORS, bare, canvas, plain
from feint.reports.figures import INK, RULE, SOFT
from feint.reports.reproduction_figures import drawing

__all__: list[str] = []

Map = NDArray[Any]


def clear(axes: Any) -> None:
    """No ticks and no frame."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def picture(image: Map) -> Map:
    """(C, H, W) as an RGB image in [0, 1]."""
    return np.clip(np.asarray(image, float).transpose(1, 2, 0), 0, 1)


@drawing("by distance")
def _by_distance(found: Reproduction, wanted: Drawing) -> Figure:
    """A panel per attack, a line per network: the number against the measured relative l2."""
    attacks, networks, _ = (list(labels) for labels in found.recipe.axes.values())
    figure = canvas(3.3 * len(attacks) + 2.2, 3.6)
    grid = figure.subplots(1, len(attacks), squeeze=False, sharey=True)
    for axes, attack in zip(grid[0], attacks, strict=True):
        for color, network in zip(COLORS, networks, strict=False):
            line = [e for e in found.entries if e.point.labels[:2] == (attack, network)]
            line = [e for e in line if e.ours.value is not None and "relative_l2" in e.others]
            at = np.array([e.others["relative_l2"].value for e in line], float)
            ours = np.array([[e.ours.value, e.ours.low, e.ours.high] for e in line], float).T
            axes.plot(at, 100 * ours[0], color=color, marker="o", ms=3, lw=1.4,
                      label=plain(network))  # fmt: skip
            axes.fill_between(at, 100 * ours[1], 100 * ours[2], color=color, alpha=0.13, lw=0)
            known = [None if e.adaptive is None else e.adaptive.value for e in line]
            if any(v is not None for v in known):
                values = np.array([np.nan if v is None else v for v in known], float)
                axes.plot(at, 100 * values, color=color, ls=":", marker="X", ms=4.5, lw=1)
        bare(axes)
        axes.set_xscale("log")
        axes.grid(axis="y", color=RULE, lw=0.6)
        axes.set_axisbelow(True)
        axes.set_ylim(-3, 103)
        axes.set_title(plain(attack), fontsize=9, color=INK, loc="left")
        axes.set_xlabel("|x − x̂|₂ / |x|₂, mean", fontsize=8, color=INK)
    grid[0, 0].set_ylabel("newly misclassified (%)", fontsize=8, color=INK)
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=7.5, frameon=False, loc="outside right center")
    figure.suptitle("● ours with 95 % interval   ··· ✕ adaptive attacker of the same budget",
                    fontsize=7.5, color=SOFT, x=0.01, ha="left")  # fmt: skip
    return figure


@drawing("gradient images")
def _gradients(found: Reproduction, wanted: Drawing) -> Figure:
    """A row per image: the image, then the gradient magnitudes of each source."""
    entries = found.entries
    images = np.asarray(entries[0].arrays["images"])
    figure = canvas(1.45 * (len(entries) + 1), 1.45 * len(images) + 0.35)
    grid = figure.subplots(len(images), len(entries) + 1, squeeze=False)
    for row, image in enumerate(images):
        grid[row, 0].imshow(picture(image), interpolation="nearest")
        for column, entry in enumerate(entries, 1):
            shown = np.asarray(entry.arrays["map"][row], float)
            grid[row, column].imshow(shown / max(shown.max(), 1e-12), cmap="inferno", vmin=0,
                                     vmax=1, interpolation="nearest")  # fmt: skip
        for axes in grid[row]:
            clear(axes)
    grid[0, 0].set_title("image", fontsize=8, color=INK)
    for column, entry in enumerate(entries, 1):
        text = f"{entry.point.labels[0]}\nSSIM with f: {entry.ours.value:.2f}"
        grid[0, column].set_title(plain(text), fontsize=8, color=INK)
    return figure


@drawing("domains")
def _domains(found: Reproduction, wanted: Drawing) -> Figure:
    """The plane of the two perturbations: where the judged classifier errs, and the arrows."""
    figure = canvas(3.4 * len(found.entries) + 1.6, 3.7)
    ratios = [0.55] + [1.0] * len(found.entries)
    grid = figure.subplots(1, len(found.entries) + 1, width_ratios=ratios)
    grid[0].imshow(picture(found.entries[0].arrays["image"]), interpolation="nearest")
    clear(grid[0])
    grid[0].set_title("the image x", fontsize=8.5, color=INK)
    for axes, entry in zip(grid[1:], found.entries, strict=True):
        axis = np.asarray(entry.arrays["axis"], float)
        wrong = np.asarray(entry.arrays["wrong"], float)
        axes.imshow(wrong, origin="lower", extent=(axis[0], axis[-1], axis[0], axis[-1]),
                    cmap=ListedColormap(["#eaf0e6", "#e3b7a9"]), vmin=0, vmax=1,
                    interpolation="nearest")  # fmt: skip
        names = ("δ from f", "δ from f∘S2S")
        for color, (right, up), name in zip(COLORS, entry.arrays["spots"], names, strict=False):
            axes.annotate("", (right, up), (0, 0),
                          arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.8})  # fmt: skip
            side, gap = ("right", -4) if right > 0.3 * axis[-1] else ("left", 4)
            axes.annotate(name, (right, up), xytext=(gap, 6), textcoords="offset points",
                          fontsize=8, color=color, weight="bold", ha=side)  # fmt: skip
        axes.plot([0], [0], "o", color=INK, ms=4)
        bare(axes)
        axes.set_title(plain(f"where {entry.point.labels[0]} errs (red)"), fontsize=8.5, color=INK)
        axes.set_xlabel("along δ from f (l2)", fontsize=8, color=SOFT)
    grid[1].set_ylabel("at a right angle, towards δ from f∘S2S (l2)", fontsize=8, color=SOFT)
    value = found.entries[0].ours
    figure.suptitle(f"mean cosine of the two perturbations over {value.n} images: "
                    f"{value.value:.2f}", fontsize=8, color=SOFT, x=0.01, ha="left")  # fmt: skip
    return figure


@drawing("memberships")
def _memberships(found: Reproduction, wanted: Drawing) -> Figure:
    """Perturbations of each domain as a point cloud in the sets of what they fool."""
    domains = list(next(iter(found.recipe.axes.values())))
    arrays = found.entries[0].arrays
    figure = canvas(3.9 * len(domains), 3.5)
    grid = figure.subplots(1, len(domains), squeeze=False)
    for axes, domain in zip(grid[0], domains, strict=True):
        bare_, behind = (np.asarray(arrays[f"{domain} | {n}"], bool) for n in ("f", "f∘S2S"))
        shares = {
            (-0.72, 0.0): (bare_ & ~behind).mean(),
            (0.0, 0.0): (bare_ & behind).mean(),
            (0.72, 0.0): (~bare_ & behind).mean(),
            (0.0, -1.12): (~bare_ & ~behind).mean(),
        }
        for at, color, name in ((-0.42, COLORS[0], "fools f"), (0.42, COLORS[1], "fools f∘S2S")):
            axes.add_patch(Circle((at, 0), 0.8, color=color, alpha=0.16, lw=0))
            axes.add_patch(Circle((at, 0), 0.8, fill=False, ec=color, lw=1.2))
            axes.text(at * 1.6, 0.92, name, ha="center", fontsize=8.5, color=color, weight="bold")
        for (x, y), share in shares.items():
            more = "fools neither: " if y else ""
            axes.text(x, y, f"{more}{100 * share:.1f} %", ha="center", va="center", fontsize=9,
                      color=INK)  # fmt: skip
        axes.set_xlim(-1.5, 1.5)
        axes.set_ylim(-1.3, 1.2)
        axes.set_aspect("equal")
        clear(axes)
        title = f"perturbations from the gradients of {domain} (n = {len(bare_)})"
        axes.set_title(plain(title), fontsize=8.5, color=INK)
    return figure


@drawing("protocols")
def _protocols(found: Reproduction, wanted: Drawing) -> Figure:
    """Each protocol as its scenario has it: what gives the gradient, and what is judged."""
    names = list(next(iter(found.recipe.axes.values())))
    figure = canvas(8.6, 1.75 * len(names))
    grid = figure.subplots(len(names), 1, squeeze=False)
    for axes, name in zip(grid[:, 0], names, strict=True):
        entry = next(e for e in found.entries if e.point.labels[0] == name)
        scenario = get_scenario(str(entry.point.fields["scenario"]))
        axes.set_xlim(0, 10)
        axes.set_ylim(0, 2)
        clear(axes)
        axes.text(0, 1.8, plain(f"{name}  (scenario {scenario.name})"), fontsize=9.5, color=INK,
                  weight="bold", va="center")  # fmt: skip
        through = scenario.attacked == "pipeline"
        kept = scenario.judged == "pipeline"
        _flow(axes, 0.2, "x", through, back="gradient")
        _flow(axes, 5.2, "x̂ = x + δ", kept, back="")
        axes.annotate("", (5.15, 0.9), (4.35, 0.9),
                      arrowprops={"arrowstyle": "-|>", "color": SOFT, "lw": 1.4})  # fmt: skip
        axes.text(4.75, 1.12, "attack", ha="center", fontsize=7.5, color=SOFT)
        ours, known = entry.ours, entry.adaptive
        text = f"{100 * (ours.value or 0):.1f} % of the clean accuracy"
        if entry.point.published is not None:
            text += f" (published {100 * entry.point.published:.1f})"
        if known is not None and known.value is not None:
            text += f"; adaptive {100 * known.value:.1f}"
        axes.text(9.9, 0.1, text, ha="right", fontsize=8, color=INK)
    return figure


def _flow(axes: Any, left: float, start: str, network: bool, *, back: str) -> None:
    """Image → [S2SNet] → classifier, with the way of the gradient underneath."""
    axes.text(left, 0.9, start, fontsize=9, color=INK, va="center")
    first = left + (0.45 if back else 1.15)
    for at, text, used in ((first, "S2SNet", network), (first + 1.75, "classifier", True)):
        box = FancyBboxPatch((at, 0.6), 1.35, 0.6, boxstyle="round,pad=0.02,rounding_size=0.08",
                             fc="#f1eee6" if used else "white", ec=INK if used else RULE,
                             ls="-" if used else "--", lw=1.0)  # fmt: skip
        axes.add_patch(box)
        axes.text(at + 0.67, 0.9, text, ha="center", va="center", fontsize=8.5,
                  color=INK if used else RULE)  # fmt: skip
    axes.annotate("", (first + 1.73, 0.9), (first + 1.4, 0.9),
                  arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1})  # fmt: skip
    if back:
        end = first if network else first + 1.75
        axes.annotate("", (end, 0.42), (first + 3.1, 0.42),
                      arrowprops={"arrowstyle": "-|>", "color": COLORS[1], "lw": 1.4})  # fmt: skip
        axes.text(first + 2.42, 0.12, back, ha="center", fontsize=7.5, color=COLORS[1])


def equalised(values: Map) -> Map:
    """Values by their rank in [0, 1]: a histogram equalisation that needs no bins."""
    flat = np.asarray(values, float).ravel()
    found, place, count = np.unique(flat, return_inverse=True, return_counts=True)
    if len(found) == 1:
        return np.full(np.shape(values), 0.5)
    middle = (np.cumsum(count) - (count + 1) / 2) / (len(flat) - 1)
    return np.asarray(middle[place].reshape(np.shape(values)))


@drawing("perturbed examples")
def _examples(found: Reproduction, wanted: Drawing) -> Figure:
    """S3's layout: the clean image, then attacks × sources; four rows."""
    entries: list[Entry] = list(found.entries)
    figure = canvas(1.42 * (len(entries) + 1), 6.1)
    grid = figure.subplots(4, len(entries) + 1, squeeze=False)
    clean = np.asarray(entries[0].arrays["clean"], float)
    grid[0, 0].imshow(picture(clean), interpolation="nearest")
    grid[0, 0].set_title(f"clean\nclass {int(entries[0].arrays['label'][0])}", fontsize=7.5)
    for axes in grid.flat:
        clear(axes)
    for axes in grid[1:, 0]:
        axes.set_visible(True)
    words = ("perturbed", "perturbation", "reconstruction", "left of it")
    for row, word in enumerate(words):
        grid[row, 0].set_ylabel(word, fontsize=8, color=INK)
    for column, entry in enumerate(entries, 1):
        arrays = {k: np.asarray(v, float) for k, v in entry.arrays.items()}
        rows = (
            arrays["attacked"],
            equalised(arrays["attacked"] - clean),
            arrays["reconstruction"],
            equalised(arrays["left"]),
        )
        for axes, image in zip(grid[:, column], rows, strict=True):
            axes.imshow(picture(image), interpolation="nearest")
        said = [int(v) for v in arrays["said"]]
        title = (
            f"{entry.point.labels[0]} of {entry.point.labels[1]}\n|δ|/|x| {entry.ours.value:.3f}"
        )
        grid[0, column].set_title(plain(title), fontsize=7.5, color=INK)
        grid[0, column].set_xlabel(f"f says {said[0]}", fontsize=7, color=SOFT, labelpad=2)
        grid[2, column].set_xlabel(f"f says {said[1]}", fontsize=7, color=SOFT, labelpad=2)
    return figure
