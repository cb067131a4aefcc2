"""The most telling images of a run, as small PNG files inside the page."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass, replace

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from feint.core.quantise import to_uint8
from feint.evaluation import CellResult
from feint.evaluation.verdict import INFORMED
from feint.reports.data import Deployment, ReportData
from feint.reports.words import attack_words, deployment_words

__all__ = ["Gallery", "Picture", "Strip", "choose", "galleries", "heat", "magnify", "png"]

LARGEST = 128
"""Images with a longer side are shown reduced to this."""
BUDGET = 1_500_000
"""Bytes of pictures in a page."""
PIPELINES, STRIPS = 3, 4
"""Most pipelines shown, and most images of each."""
_NICE = (1, 2, 5)
_PHOTOS = ("clean", "gray-box", "white-box", "adaptive", "defended")


@dataclass(frozen=True)
class Picture:
    """One image of a strip."""

    title: str
    caption: str
    """What it was taken for, or what it shows."""
    right: bool | None
    """Whether the prediction is the true label; none where nothing was predicted."""
    alt: str
    uri: str
    probable: str = ""
    """The prediction's mean probability, where it is known."""


@dataclass(frozen=True)
class Strip:
    """One sample: clean, attacked, as the model sees it, the perturbation, the gradient."""

    index: int
    label: str
    pictures: tuple[Picture, ...]

    @property
    def bytes(self) -> int:
        """What it adds to a page."""
        return sum(len(p.uri) for p in self.pictures)


@dataclass(frozen=True)
class Gallery:
    """The telling samples of a pipeline."""

    name: str
    scenario: str
    """Of the attacker whose images are shown beside the gray-box ones."""
    attack: str
    enlarged: float
    """How many times the perturbation is enlarged."""
    shown: tuple[int, int]
    """(height, width) of the images as shown."""
    size: tuple[int, int]
    """(height, width) of the images as attacked."""
    strips: tuple[Strip, ...]


def choose(
    clean: CellResult | None, gray: CellResult | None, white: CellResult, count: int
) -> list[int]:
    """Row positions of the most telling samples, of different labels where there are enough.

    First those that are right without attack, right under the gray-box attack and broken by the
    white-box one; then those right without attack and broken; then any.
    """
    broken = white.shares < 0.5
    fine = np.ones_like(broken) if clean is None else clean.shares > 0.5
    held = np.ones_like(broken) if gray is None else gray.shares > 0.5
    labels = white.rows["label"]
    chosen: list[int] = []
    for pool in (fine & held & broken, fine & broken, np.ones_like(broken)):
        for fresh in (True, False):
            seen = {int(labels[i]) for i in chosen}
            for i in map(int, np.flatnonzero(pool)):
                if len(chosen) == count:
                    return chosen
                if i in chosen or (fresh and int(labels[i]) in seen):
                    continue
                chosen.append(i)
                seen.add(int(labels[i]))
    return chosen


def png(pixels: NDArray[np.uint8]) -> str:
    """A data URI of an (H, W, 3) image."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def magnify(largest: float) -> float:
    """The factor of 1, 2, 5, 10, … that brings a perturbation of that size nearest below 0.5."""
    if not largest > 0:
        return 1
    factor = 0.5 / largest
    power = 10 ** math.floor(math.log10(factor))
    return max(1, max(n for n in _NICE if n * power <= factor * (1 + 1e-9)) * power)


def heat(gradient: Tensor) -> NDArray[np.uint8]:
    """A gradient (C, H, W) as a heat map: largest |g| over channels, black 0, bright the 99th %.

    A gradient that is zero everywhere stays black; one that is not finite is shown as if zero.
    """
    size = np.nan_to_num(gradient.detach().abs().amax(0).double().cpu().numpy(), posinf=0.0)
    top = float(np.quantile(size, 0.99)) or float(size.max())
    scaled = np.clip(size / top, 0, 1) if top > 0 else np.zeros_like(size)
    return np.asarray(colormaps["magma"](scaled, bytes=True))[..., :3].copy()


def _pixels(image: Tensor) -> NDArray[np.uint8]:
    levels = to_uint8(image.detach().clamp(0, 1)).cpu().numpy()
    levels = levels.repeat(3, axis=0) if levels.shape[0] == 1 else levels[:3]
    return np.ascontiguousarray(levels.transpose(1, 2, 0))


def _small(pixels: NDArray[np.uint8], photo: bool) -> NDArray[np.uint8]:
    """A picture for the page; averaging would wash a perturbation out, so only photos are."""
    height, width = pixels.shape[:2]
    scale = LARGEST / max(height, width)
    if scale >= 1:
        return pixels
    how = Image.Resampling.LANCZOS if photo else Image.Resampling.NEAREST
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(pixels).resize(size, how))


def galleries(data: ReportData) -> list[Gallery]:
    """Galleries of the defended pipelines that an informed attacker met, or of the bare ones."""
    if data.images is None:
        return []
    pipelines = [
        key
        for key, group in data.pipelines().items()
        if any(r.cell.scenario in INFORMED for r in group)
    ]
    defended = [key for key in pipelines if key[1] != "none"]
    found = [_gallery(data, key, STRIPS) for key in (defended or pipelines)[:PIPELINES]]
    count = STRIPS
    while count > 1 and sum(s.bytes for g in found for s in g.strips[:count]) > BUDGET:
        count -= 1
    return [replace(g, strips=g.strips[:count]) for g in found]


def _gallery(data: ReportData, key: Deployment, count: int) -> Gallery:
    group = data.pipelines()[key]
    informed = [r for r in group if r.cell.scenario in INFORMED]
    clean = data.clean(group[0])
    white = min(informed, key=lambda r: r.accuracy.value) if informed else None
    grays = [r for r in group if r.cell.scenario == "gray-box"]
    # The gray-box attacker who did worst shows best what the published number rested on.
    gray = max(grays, key=lambda r: r.accuracy.value) if grays else None
    if white is None or data.images is None:
        return Gallery(deployment_words(key), "", "", 1, (0, 0), (0, 0), ())
    positions = choose(clean, gray, white, count)
    x, x_white = data.images(white, positions)
    x_gray = None if gray is None else data.images(gray, positions)[1]
    gradient = None if data.gradients is None else data.gradients(white, positions)
    seen = {
        id(r): data.views(r, positions)
        for r in (clean, gray, white)
        if r is not None and data.views
    }
    defended = seen[id(white)].defended if id(white) in seen else None
    factor = magnify(float((x_white - x).abs().max()) if len(positions) else 0.0)
    strips = []
    for k, i in enumerate(positions):
        label = int(white.rows["label"][i])

        def predicted(title: str, image: Tensor, of: CellResult | None) -> Picture:
            shares = seen[id(of)].probability[k] if id(of) in seen else None  # noqa: B023
            return _predicted(data, title, image, of, i, label, shares)  # noqa: B023

        made = [predicted("clean", x[k], clean)]
        if gray is not None and x_gray is not None:
            made.append(predicted("gray-box", x_gray[k], gray))
        made.append(predicted(white.cell.scenario, x_white[k], white))
        if defended is not None:
            made.append(
                _picture(
                    "defended", "as the model sees it", None, _pixels(defended[k]), data, label
                )
            )
        delta = 0.5 + factor * (x_white[k] - x[k])
        made.append(_picture("perturbation", f"×{factor:g}", None, _pixels(delta), data, label))
        if gradient is not None:
            made.append(
                _picture("input gradient", "|∂loss/∂x|", None, heat(gradient[k]), data, label)
            )
        strips.append(Strip(int(white.rows["index"][i]), data.class_name(label), tuple(made)))
    size = (int(x.shape[-2]), int(x.shape[-1]))
    scale = min(1.0, LARGEST / max(size))
    shown = (round(size[0] * scale), round(size[1] * scale))
    return Gallery(
        deployment_words(key),
        white.cell.scenario,
        attack_words(white.cell),
        factor,
        shown,
        size,
        tuple(strips),
    )


def _predicted(
    data: ReportData,
    title: str,
    image: Tensor,
    result: CellResult | None,
    row: int,
    label: int,
    shares: Tensor | None,
) -> Picture:
    if result is None:
        return _picture(title, "", None, _pixels(image), data, label)
    prediction = int(result.rows["prediction"][row])
    name = data.class_name(prediction)
    made = _picture(title, name, prediction == label, _pixels(image), data, label)
    known = shares is not None and prediction < len(shares)
    return replace(made, probable=f"{100 * float(shares[prediction]):.0f} %" if known else "")  # type: ignore[index]


def _picture(
    title: str,
    caption: str,
    right: bool | None,
    pixels: NDArray[np.uint8],
    data: ReportData,
    label: int,
) -> Picture:
    taken = "" if right is None else f", taken for {caption}"
    alt = f"{title} of a {data.class_name(label)}{taken}"
    return Picture(title, caption, right, alt, png(_small(pixels, photo=title in _PHOTOS)))
