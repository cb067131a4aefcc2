"""Figures as files. Oracles: XML's own parser on what was saved, and the fakes' numbers."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from PIL import Image

from feint.core.errors import ConfigError
from feint.evaluation import Cell
from feint.reports.figures import curve_figure, image_figure, save, story_figure
from feint.reports.story import story
from tests.reports.fakes import (
    cell_result,
    gradients_of,
    images_of,
    small_data,
    story_data,
    waves,
)

SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}"


def elements(path: Path) -> dict[str, ElementTree.Element]:
    return {e.attrib["id"]: e for e in ElementTree.parse(path).iter() if "id" in e.attrib}


def test_the_story_has_every_mark_at_its_number(tmp_path: Path) -> None:
    named = elements(save(story_figure(story_data()), tmp_path / "story.svg"))
    at, value = [], []
    for i, lane in enumerate(story(story_data())):
        for k, mark in enumerate(lane.marks):
            (dot,) = named[f"lane-{i}-mark-{k}"].iter(f"{SVG}use")
            at.append(float(dot.attrib["x"]))
            value.append(mark.value)
            assert (f"lane-{i}-mark-{k}-whisker" in named) == mark.measured
    dots = [n for n in named if n.startswith("lane") and n.count("-") == 3]
    assert len(dots) == len(value)
    # Horizontal places are one straight line of the values: 0 % and 90.5 % fix it.
    slope, start = np.polyfit(value, at, 1)
    assert slope > 100
    assert np.asarray(at) == pytest.approx(start + slope * np.asarray(value), abs=0.01)


def test_curves_have_every_point_with_its_interval() -> None:
    figure = curve_figure(story_data())
    axes = next(a for a in figure.axes if "adversarial" in a.get_title())
    (container,) = axes.containers
    line, _, bars = container
    assert line.get_xdata() * 255 == pytest.approx([0, 1, 2, 4, 8, 16])
    # 79 clean, then 79 − 4.5 · eps, at 8/255 the worst of the table's two attacks.
    assert line.get_ydata() == pytest.approx([79, 74.5, 70, 61, 34, 7])
    low, high = bars[0].get_segments()[0][:, 1]
    rate = cell_result(Cell("none", "m"), 0.79).accuracy
    assert (low, high) == pytest.approx((100 * rate.low, 100 * rate.high))


def test_images(tmp_path: Path) -> None:
    x = waves()
    data = story_data(images=images_of(x), gradients=gradients_of(x))
    figure = image_figure(data)
    assert len(figure.axes) == 2 * 4 * 5
    assert figure.axes[0].get_images()[0].get_array().shape == (32, 32, 3)
    path = save(figure, tmp_path / "images.png")
    with Image.open(path) as image:
        assert image.width > 800


def test_equal_data_give_equal_files(tmp_path: Path) -> None:
    for suffix in ("svg", "png", "pdf"):
        one = save(story_figure(story_data()), tmp_path / f"a.{suffix}").read_bytes()
        assert one == save(story_figure(story_data()), tmp_path / f"b.{suffix}").read_bytes()


def test_nothing_global_is_touched(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    save(curve_figure(story_data()), tmp_path / "a.svg")
    assert dict(matplotlib.rcParams) == before


def test_small_runs_and_dollars(tmp_path: Path) -> None:
    name = r"$\bad_{$ <b>"
    cells = [
        cell_result(Cell("none", name), 0.5),
        cell_result(Cell("white-box", name, attack="pgd"), 0.2, size=0.1),
    ]
    for make in (story_figure, curve_figure, image_figure):
        save(make(small_data(cells)), tmp_path / "a.svg")
        save(make(small_data()), tmp_path / "b.png")
        save(make(small_data([])), tmp_path / "c.svg")
    save(story_figure(small_data(cells)), tmp_path / "a.svg")
    texts = [e.text for e in ElementTree.parse(tmp_path / "a.svg").iter(f"{SVG}text")]
    assert name in texts


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="\\.svg, \\.png, \\.pdf"):
        save(story_figure(small_data()), tmp_path / "a.jpg")
