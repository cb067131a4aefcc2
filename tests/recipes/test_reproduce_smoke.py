"""Every recipe at the scale `smoke`: all rows and columns of its table, and its figure.

Oracle: the axes that the recipe lists, and what the paper prints.
"""

import itertools
import json

import pytest

from feint.recipes.reproduce import reproduce
from feint.recipes.schema import list_recipes, load_recipe
from feint.reports.reproduction import write

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", list_recipes())
def test_every_row_and_column_is_there(tmp_path, name):
    recipe = load_recipe(name)
    found = reproduce(recipe, scale="smoke", folder=tmp_path / "run")
    labels = [e.point.labels for e in found.entries]
    assert labels == list(itertools.product(*recipe.axes.values()))
    unmeasured = [e.point.labels for e in found.entries if e.ours.value is None]
    allowed = [e.point.labels for e in found.entries if e.point.fields.get("may_be_none")]
    assert [p for p in unmeasured if p not in allowed] == []
    if recipe.targets is not None:
        assert any(e.point.published is not None for e in found.entries)
    files = write(found, tmp_path / "results")
    suffixes = {f.suffix for f in files}
    assert {".json", ".md"} <= suffixes
    assert (".png" in suffixes and ".svg" in suffixes) == (recipe.drawing is not None)
    told = json.loads(files[0].read_text())
    assert len(told["entries"]) == len(found.entries)
    assert "/tmp/" not in files[0].read_text()
