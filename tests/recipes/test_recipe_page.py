"""The recipe in `docs/recipes.md` runs, and the page names every field. Oracle: the schema."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from feint.recipes.reproduce import reproduce
from feint.recipes.schema import SCALES, Claim, Recipe, Scale, load_recipe
from feint.reports.reproduction import write

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    file = tmp_path / "jpeg.yaml"
    file.write_text(text, encoding="utf-8")
    return load_recipe(str(file))


def test_it_runs(recipe: Recipe, tmp_path: Path) -> None:
    found = reproduce(recipe, scale="smoke", folder=tmp_path / "run")
    assert len(found.entries) == 6
    assert [e.adaptive is not None for e in found.entries] == [False] * 3 + [True, False, True]
    bare, defended = found.entry("PGD", "bare"), found.entry("PGD", "JPEG")
    assert (bare.ours.value, bare.hit) == (0.0, True)
    assert getattr(defended.adaptive, "value", None) == 0.0
    assert {c.answer for c in found.claims} <= {"holds", "undecided"}
    assert {f.suffix for f in write(found, tmp_path)} == {".json", ".md", ".png", ".svg"}


@pytest.mark.parametrize("part", [Recipe, Scale, Claim])
def test_every_field_is_told_of(part: type[Recipe] | type[Scale] | type[Claim]) -> None:
    untold = [name for name in part.model_fields if not re.search(rf"\b{name}\b", PAGE)]
    assert untold == []
    assert all(scale in PAGE for scale in SCALES)
