"""Tables in a terminal. Oracle: every number of every table can be read, whole, in 80 columns."""

from __future__ import annotations

import io
from itertools import product
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from feint.diagnostics.numbers import Number
from feint.recipes.grid import Point
from feint.recipes.lab import short_spec
from feint.recipes.reproduce import Entry, Reproduction
from feint.recipes.schema import Recipe, list_recipes, load_recipe
from feint.reports.reproduction import Rendered, markdown
from feint.reports.reproduction_figures import draw


def shown(recipe: Recipe, width: int) -> list[str]:
    """The table's lines, with the widest numbers that shares can be."""
    number = Number(1.011, 100, 0.939, 1.064)
    entries = tuple(
        Entry(Point(labels, {}, published=0.983), "", True, number, number, hit=False)
        for labels in product(*map(tuple, recipe.axes.values()))
    )
    made = Reproduction(recipe, "cpu", entries, (), (), Path(), {}, 0.0)
    console = Console(file=io.StringIO(), width=width)
    console.print(Rendered(made))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("name", list_recipes())
def test_every_table_fits_into_80_columns(name: str) -> None:
    recipe = load_recipe(name)
    lines, count = shown(recipe, 80), 1
    for axis in recipe.axes.values():
        count *= len(axis)
    assert max(map(cell_len, lines)) <= 80
    assert sum("adaptive [95 %]" in line for line in lines) == 1
    numbers = "98.3   101.1 [93.9, 106.4]   miss   101.1 [93.9, 106.4]"
    assert sum(line.rstrip().endswith(numbers) for line in lines) == count


def test_axes_that_are_no_column_head_a_part_each() -> None:
    lines = [line.strip() for line in shown(load_recipe("ace/table3"), 80)]
    for heading in ("ResNet-18, survival", "ResNet-18, defense", "VGG-11, defense"):
        assert lines.count(heading) == 1
    wide = [line.strip() for line in shown(load_recipe("ace/table8"), 120)]
    assert "OnePixel" not in wide  # room for both axes: no heading
    assert sum(line.startswith("OnePixel") for line in wide) == 1


def test_a_page_names_models_and_images() -> None:
    about = {
        "models": {"bf16:net.py:load": "a" * 16, "bundled:cifar10-resnet20": "b" * 16},
        "data": {
            "images.csv": {"samples": 100, "shape": [3, 224, 224]},
            "images.csv @ 1a2b3c": {"samples": 25, "shape": [3, 224, 299]},
        },
        "cpu": "a processor",
        "cores": 2,
        "packages": {"torch": "2", "feint": "0"},
        "seed": 0,
        "command": "feint reproduce ace/table6 --scale cpu -n 100",
    }
    number = Number(0.5, 100, 0.4, 0.6)
    recipe = load_recipe("ace/table6")
    entries = tuple(
        Entry(Point(labels, {}), "", True, number, None, hit=None)
        for labels in product(*map(tuple, recipe.axes.values()))
    )
    page = markdown(Reproduction(recipe, "cpu", entries, (), (), Path(), about, 0.0))
    assert "\n`feint reproduce ace/table6 --scale cpu -n 100`\n" in page
    assert "Models: `bf16:net.py:load`, `bundled:cifar10-resnet20`." in page
    assert "Images: 100 of `images.csv` (224×224), 25 of `images.csv` (224×299)." in page


def test_models_are_named_without_folders() -> None:
    assert short_spec("bf16:some/where/net.py:load") == "bf16:net.py:load"
    assert short_spec("some/where/net.py:load") == "net.py:load"
    assert short_spec("bf16:trained:NAME@1/2") == "bf16:trained:NAME@1/2"
    assert short_spec("fd*2 | some/where/net.py:load") == "fd*2 | net.py:load"


def test_a_figure_leaves_out_what_could_not_be_measured() -> None:
    recipe = load_recipe("prm/image3")
    number = Number(0.5, 100, 0.4, 0.6)

    def panels(*lacking: str) -> list[str]:
        entries = tuple(
            Entry(
                Point(labels, {}, lacks="a classifier" if labels[0] in lacking else ""),
                "",
                True,
                Number(None) if labels[0] in lacking else number,
                None,
                hit=None,
            )
            for labels in product(*map(tuple, recipe.axes.values()))
        )
        figure = draw(Reproduction(recipe, "cpu", entries, (), (), Path(), {}, 0.0))
        assert figure is not None
        return [axes.get_title(loc="left") for axes in figure.axes]

    assert panels() == ["ImageNet", "CIFAR-10"]
    assert panels("ImageNet") == ["CIFAR-10"]
    assert panels("ImageNet", "CIFAR-10") == ["ImageNet", "CIFAR-10"]
