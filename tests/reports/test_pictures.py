"""Pictures. Oracles: Pillow reading back what was encoded, and closed forms."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from feint.evaluation import Cell
from feint.reports.pictures import Picture, choose, galleries, heat, magnify, png
from tests.reports.fakes import (
    ACE,
    CLASSES,
    SHIFT,
    cell_result,
    gradients_of,
    images_of,
    small_data,
    story_data,
    waves,
)


def decoded(uri: str) -> np.ndarray:
    head, _, body = uri.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body))))


def test_png_is_lossless() -> None:
    pixels = (np.arange(3 * 32 * 32) % 251).astype("uint8").reshape(32, 32, 3)
    assert np.array_equal(decoded(png(pixels)), pixels)


def test_telling_samples_held_against_gray_and_fell_to_white() -> None:
    data = story_data()
    clean, gray, white = (
        next(
            r
            for r in data.results
            if (r.cell.model, r.cell.defense, r.cell.scenario) == (ACE, SHIFT, scenario)
        )
        for scenario in ("none", "gray-box", "white-box")
    )
    chosen = choose(clean, gray, white, 6)
    assert len(set(chosen)) == 6
    for i in chosen:
        assert clean.shares[i] == 1
        assert gray.shares[i] == 1
        assert white.shares[i] == 0
    assert len({int(white.rows["label"][i]) for i in chosen}) == 6


def test_choice_falls_back() -> None:
    unbroken = cell_result(Cell("white-box", "m", attack="pgd"), 1.0, n=5)
    assert sorted(choose(None, None, unbroken, 9)) == [0, 1, 2, 3, 4]
    broken = cell_result(Cell("white-box", "m", attack="pgd"), 0.0, n=5)
    assert choose(None, None, broken, 2) == [0, 1]


@pytest.mark.parametrize(
    ("largest", "factor"),
    [(8 / 255, 10), (16 / 255, 5), (1 / 255, 100), (0.5, 1), (1.0, 1), (0.25, 2), (0.0, 1)],
)
def test_magnify(largest: float, factor: float) -> None:
    # By hand: the largest of 1, 2, 5, 10, … with factor · largest ≤ 0.5, and at least 1.
    assert magnify(largest) == factor


def test_heat_is_brightest_where_the_gradient_is_largest() -> None:
    gradient = torch.zeros(3, 8, 8)
    gradient[1, 2, 5] = -3.0
    gradient[0, 4, 4] = 1.0
    image = heat(gradient).astype(int).sum(2)
    assert image.argmax() == 2 * 8 + 5
    assert image[0, 0] < image[4, 4] <= image[2, 5]
    assert heat(torch.zeros(3, 4, 4)).max() < 10
    assert heat(torch.full((1, 4, 4), torch.nan)).max() < 10


def test_a_strip_shows_clean_gray_white_delta_and_gradient() -> None:
    x = waves()
    data = story_data(images=images_of(x), gradients=gradients_of(x))
    first = galleries(data)[0]
    assert first.name == f"{ACE} + {SHIFT}"
    assert first.enlarged == 10
    strip = first.strips[0]
    pictures = {p.title: p for p in strip.pictures}
    assert list(pictures) == ["clean", "gray-box", "white-box", "perturbation", "input gradient"]
    assert [p.right for p in pictures.values()] == [True, True, False, None, None]
    assert pictures["white-box"].caption in CLASSES
    assert pictures["white-box"].caption != strip.label
    clean, white = (decoded(pictures[n].uri).astype(int) for n in ("clean", "white-box"))
    assert np.array_equal(clean, np.rint(x[strip.index].permute(1, 2, 0).numpy() * 255).astype(int))
    # The enlarged perturbation, from the images themselves: 127.5 + 10 · δ.
    delta = decoded(pictures["perturbation"].uri).astype(int)
    assert np.abs(delta - np.clip(127.5 + 10 * (white - clean), 0, 255)).max() <= 11


def test_large_images_are_reduced_and_said_to_be() -> None:
    x = waves(size=224)
    gallery = galleries(story_data(images=images_of(x)))[0]
    assert gallery.size == (224, 224)
    assert gallery.shown == (128, 128)
    shapes = {decoded(p.uri).shape for s in gallery.strips for p in s.pictures}
    # Sign noise of 8/255 enlarged ten times is 127.5 ± 80 wherever nothing was averaged or clipped.
    delta = decoded(gallery.strips[0].pictures[3].uri)
    assert np.isin(delta, [47, 48, 207, 208]).mean() > 0.9
    assert shapes == {(128, 128, 3)}


def test_no_images_no_gallery_and_gray_images_have_three_channels() -> None:
    assert galleries(story_data()) == []
    x = waves()[:, :1]
    cells = [cell_result(Cell("white-box", "m", attack="pgd"), 0.2, size=8 / 255)]
    (gallery,) = galleries(small_data(cells, images=images_of(x), gradients=lambda r, p: None))
    pictures: list[Picture] = [p for s in gallery.strips for p in s.pictures]
    assert {p.title for p in pictures} == {"clean", "white-box", "perturbation"}
    assert decoded(pictures[0].uri).shape == (32, 32, 3)
