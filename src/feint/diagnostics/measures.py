"""The measures of a diagnosis by name: what each computes of a model, and where it comes from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from feint.core.losses import adversarial
from feint.core.similarity import ssim
from feint.diagnostics._common import logits_of
from feint.diagnostics.checkerboard import checkerboard_share, phase_shares
from feint.diagnostics.gradient_ssim import gradient_magnitude, other_labels
from feint.diagnostics.gradients import layer_heatmaps
from feint.diagnostics.label_map import (
    flip_distance,
    label_map,
    masked_directions,
    perturbation_directions,
    random_direction,
)
from feint.diagnostics.masked import blend_curve, masked_attack
from feint.diagnostics.masks import intersection_over_union, share_inside, top_pixels
from feint.diagnostics.numbers import SHARE, Measured, Number, array, exact, mean, rate
from feint.diagnostics.p_attack import pixel_attack_rate
from feint.diagnostics.perturbation import perturbation_map
from feint.diagnostics.rank import class_ranks, rank_shares
from feint.diagnostics.subject import PIXELS, Bench

__all__ = ["MEASURES", "PLANES", "Measure"]

PLANES = {
    "mask": "gradient off C → , gradient on C ↑",
    "shift": "perturbation → , the same moved by one pixel ↑",
    "random": "perturbation → , random direction ↑",
}
"""The planes of label maps."""


@dataclass(frozen=True)
class Measure:
    """A measure: its name, what it is, its source, its cost in passes per image, its function."""

    name: str
    title: str
    paper: str
    cost: str
    run: Callable[[Bench], Measured]


def _overlap(bench: Bench) -> Measured:
    omega, c = bench.overlap, bench.connected
    top = top_pixels(omega, bench.options.share)
    quarter = top_pixels(omega, float(c.double().mean()), ties="order")
    return Measured(
        {"omega": array(omega), "top": array(top), "connected": array(c)},
        {
            "connected_in_top": exact(share_inside(c, top)),
            "iou": exact(intersection_over_union(quarter, c)),
            "share_on_connected": exact(checkerboard_share(omega, c)),
        },
    )


def _gradients(bench: Bench) -> Measured:
    c, size = bench.connected, bench.gradients.double().abs().sum(1)
    r = bench.robustness
    top = top_pixels(r, bench.options.share)
    quarter = top_pixels(r, float(c.double().mean()), ties="order")
    return Measured(
        {
            "heatmap": array(size.sum(0)),
            "robustness": array(r),
            "top": array(top),
            "connected": array(c),
            "phases": array(phase_shares(size.sum(0), min(bench.options.stride, *bench.size))),
            "share_on_connected": array(checkerboard_share(size, c)),
        },
        {
            "share_on_connected": mean(checkerboard_share(size, c), SHARE),
            "connected_in_top": exact(share_inside(c, top)),
            "iou": exact(intersection_over_union(quarter, c)),
            "zero_gradients": rate(size.flatten(1).amax(1) == 0),
        },
    )


def _layers(bench: Bench) -> Measured:
    maps = layer_heatmaps(
        bench.subject.view, bench.x, bench.y, seed=bench.keys, batch_size=bench.options.batch_size
    )
    numbers = {}
    for name, heat in maps.items():
        if min(heat.shape) >= 2 and bool(heat.any()):
            numbers[name] = exact(phase_shares(heat).max())
    return Measured({name: array(heat) for name, heat in maps.items()}, numbers)


def _p_attack(bench: Bench) -> Measured:
    o = bench.options
    height, width = bench.size
    window = o.window
    if window is None and height * width > PIXELS:
        window = min(16, height, width)
    few = slice(0, o.pixel_images)
    found = pixel_attack_rate(
        bench.subject.model,
        bench.x[few],
        bench.y[few],
        window=window,
        seed=bench.keys[few],
        batch_size=o.batch_size,
    )
    known = ~found.rate.isnan()
    on, off = known & bench.connected, known & ~bench.connected
    per_image = found.broken[found.counted].double().mean((1, 2))
    return Measured(
        {"rate": array(found.rate), "broken": array(found.broken), "counted": array(found.counted)},
        {
            "rate": mean(per_image, SHARE),
            "on_connected": Number(_mean(found.rate[on])),
            "off_connected": Number(_mean(found.rate[off])),
        },
    )


def _mean(values: torch.Tensor) -> float | None:
    return float(values.mean()) if values.numel() else None


def _perturbation(bench: Bench) -> Measured:
    delta = (bench.x_adv.double() - bench.x.double()).abs().sum(1)
    hit = adversarial(
        logits_of(bench.subject.model, bench.x_adv, bench.judge_keys, bench.options.batch_size),
        bench.y,
    )
    return Measured(
        {
            "size": array(perturbation_map(bench.x, bench.x_adv)),
            "place": array(perturbation_map(bench.x, bench.x_adv, weigh="place")),
            "share_on_connected": array(checkerboard_share(delta, bench.connected)),
            "right": array(~hit),
        },
        {
            "share_on_connected": mean(checkerboard_share(delta, bench.connected), SHARE),
            "clean_accuracy": rate(bench.right),
            "accuracy": rate(~hit),
        },
    )


def _labels(bench: Bench) -> Measured:
    o, rows = bench.options, torch.tensor(bench.chosen, device=bench.x.device)
    x, x_adv, keys = bench.x[rows], bench.x_adv[rows], bench.keys[rows]
    first, moved = perturbation_directions(x, x_adv)
    planes = {
        "mask": masked_directions(bench.gradients[rows], bench.connected),
        "shift": (first, moved),
        "random": (first, random_direction(x, seed=keys, off=first)),
    }
    reach = o.reach or 0.058 * math.sqrt(math.prod(x.shape[1:]))
    arrays = {"image": array(x), "row": np.asarray(bench.chosen), "label": array(bench.y[rows])}
    numbers = {}
    for name, (right, up) in planes.items():
        found = label_map(
            bench.subject.model,
            x,
            right,
            up,
            reach=reach,
            points=o.points,
            seed=keys,
            batch_size=o.batch_size,
        )
        middle = found.labels[:, o.points // 2, o.points // 2, None, None]
        arrays[name], arrays["axis"] = array(found.labels), array(found.axis)
        along, across = flip_distance(found)
        numbers[f"{name}_same_label"] = mean((found.labels == middle).double().mean((1, 2)), SHARE)
        # The median stands an image whose label never changes.
        numbers[f"{name}_flip_right"] = Number(float(along.median()), len(along))
        numbers[f"{name}_flip_up"] = Number(float(across.median()), len(across))
    return Measured(arrays, numbers)


def _masked(bench: Bench) -> Measured:
    o, b = bench.options, bench.subject
    curve = blend_curve(
        b.model,
        bench.x,
        bench.y,
        bench.x_adv,
        bench.robustness,
        seed=bench.judge_keys,
        batch_size=o.batch_size,
    )
    confined = masked_attack(
        b.view,
        bench.x,
        bench.y,
        bench.overlap,
        shares=[o.share],
        attack=bench.attack,
        judge=b.model,
        seed=bench.keys,
        batch_size=o.batch_size,
    )
    gap = (curve.bottom.double() - curve.top.double()).mean(0)
    return Measured(
        {
            "shares": array(curve.shares),
            "top": array(curve.top),
            "bottom": array(curve.bottom),
            "confined_top": array(confined.top),
            "confined_bottom": array(confined.bottom),
        },
        {
            "gap": mean(gap),
            "accuracy_attack_on_top_overlap": rate(confined.top[0]),
            "accuracy_attack_on_bottom_overlap": rate(confined.bottom[0]),
        },
    )


def _ssim(bench: Bench) -> Measured:
    classes = int(bench.logits.shape[1])
    other = bench.gradients_for(other_labels(bench.y, classes, seed=bench.keys))
    own = gradient_magnitude(bench.gradients)
    labels = ssim(own, gradient_magnitude(other))
    arrays, numbers = {"labels": array(labels)}, {"between_labels": mean(labels)}
    for name, peer in bench.others.items():
        similar = ssim(own, gradient_magnitude(peer.gradients))
        arrays[f"to {name}"] = array(similar)
        if name != bench.subject.name:
            numbers[f"to {name}"] = mean(similar)
    return Measured(arrays, numbers)


def _rank(bench: Bench) -> Measured:
    found = class_ranks(
        bench.subject.model,
        bench.x,
        bench.x_adv,
        seed=bench.keys,
        batch_size=bench.options.batch_size,
    )
    top = min(5, int(bench.logits.shape[1]))
    return Measured(
        {
            "adversarial": array(found.adversarial),
            "original": array(found.original),
            "moved": array(found.moved),
            "adversarial_shares": array(rank_shares(found.adversarial, found.moved, top=top)),
            "original_shares": array(rank_shares(found.original, found.moved, top=top)),
        },
        {
            "moved": rate(found.moved),
            "second": rate(found.adversarial[found.moved] == 2),
            "original_in_top5": rate(found.original[found.moved] <= top),
        },
    )


MEASURES: dict[str, Measure] = {
    m.name: m
    for m in (
        Measure("overlap", "Gradient overlap Ω", "S0 App. C, Table 2", "1 in all", _overlap),
        Measure("gradients", "Input gradients", "S0 Fig. 3; S4 §2–3", "1 + 1 back", _gradients),
        Measure("layers", "Gradients by layer", "S0 App. B, Figs. 6–7", "1 + 1 back", _layers),
        Measure("p_attack", "One white pixel", "S0 Fig. 2", "1 + H·W, on a few", _p_attack),
        Measure("perturbation", "Perturbations", "S0 Fig. 10; S2 Fig. 3", "attack", _perturbation),
        Measure("masked", "Masked attacks", "S4 Fig. 1; S0 Table 1", "2 attacks + 22", _masked),
        Measure("labels", "Label maps", "S0 Figs. 4 and 8", "3·points², on a few", _labels),
        Measure("ssim", "Similarity of gradients", "S3 Table 1", "2 + 2 back", _ssim),
        Measure("rank", "Rank of the adversarial class", "S2 Fig. 6", "attack + 2", _rank),
    )
}
"""In the order in which reports show them."""
