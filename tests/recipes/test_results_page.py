"""The pages of results are what `tools/make_results_page.py` writes from the committed results.

Oracles: the results themselves; a result by hand whose numbers must appear as they are.
"""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest

from feint.diagnostics.numbers import Number
from feint.recipes.claims import decide
from feint.recipes.schema import list_recipes, load_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    path = ROOT / "tools" / "make_results_page.py"
    spec = importlib.util.spec_from_file_location("make_results_page", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_in_step_with_the_results(tool):
    """If this fails: python tools/make_results_page.py, and commit the pages."""
    for name, text in tool.pages().items():
        assert (ROOT / name).read_text(encoding="utf-8") == text, name


def test_every_recipe_has_its_line(tool):
    pages = tool.pages()
    for name in list_recipes():
        assert f"`{name}`" in pages[f"docs/results/{name.partition('/')[0]}.md"], name


def test_every_link_leads_to_a_file(tool):
    found = 0
    for name, text in tool.pages().items():
        for target in re.findall(r"\]\(([^)]+)\)", text):
            assert ((ROOT / name).parent / target).is_file(), (name, target)
            found += 1
    assert found > 50


def test_results_are_of_recipes_that_exist_and_none_is_a_smoke_test():
    for file in (ROOT / "results").glob("*/*.json"):
        found = json.loads(file.read_text(encoding="utf-8"))
        recipe = load_recipe(f"{file.parent.name}/{file.stem}")
        assert found["scale"] in ("cpu", "paper"), file
        assert found["axes"] == {k: list(v) for k, v in recipe.axes.items()}, file


def test_results_say_of_their_scale_what_todays_recipes_say():
    """If this fails, the recipe changed since: measure it anew."""
    for name in list_recipes():
        result = json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))
        about = load_recipe(name).scales[result["scale"]].about
        assert " ".join(result["differs"].split()) == " ".join(about.split()), name


def test_a_scale_takes_as_many_images_as_it_says():
    told = 0
    for name in list_recipes():
        for scale in load_recipe(name).scales.values():
            if "unless -n says otherwise" in scale.about:
                count = re.search(
                    r"(\d+)(?: CIFAR-10)?(?: test images)? unless -n", " ".join(scale.about.split())
                )
                assert count, name
                assert int(count[1]) == scale.data["samples"], name
                told += 1
    assert told > 20


def test_claims_are_what_todays_recipes_decide_from_the_committed_numbers():
    decided = 0
    for file in (ROOT / "results").glob("*/*.json"):
        found = json.loads(file.read_text(encoding="utf-8"))
        recipe = load_recipe(found["recipe"])
        percent = all(e["unit"] == "share" for e in found["entries"])
        show = (lambda v: f"{100 * v:.1f} %") if percent else "{:.3g}".format
        told = []
        for claim in recipe.claims:
            numbers = {
                tuple(e["labels"].values()): e[claim.of] and Number(**e[claim.of])
                for e in found["entries"]
            }
            told.append(decide(claim, found["axes"], numbers, show).as_dict())
        assert found["claims"] == told, file
        decided += len(told)
    assert decided > 80


def _copy(folder):
    """The page's sources without any result."""
    shutil.copytree(ROOT / "src" / "feint" / "recipes" / "papers",
                    folder / "src" / "feint" / "recipes" / "papers")  # fmt: skip
    (folder / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "results_page.yaml", folder / "tools")
    return folder


def _result(**changes):
    found = {
        "scale": "cpu", "place": "S4, image 4", "targets": {"hit": 1, "missed": 2},
        "checks": {"failed": ["loss-is-alive"], "grades": []},
        "claims": [{"say": "It rains.", "by": "paper", "answer": "fails", "evidence": "3 of 4"},
                   {"say": "It snows.", "by": "us", "answer": "holds", "evidence": "all"}],
        "entries": [],
    }  # fmt: skip
    return {**found, **changes}


def test_numbers_come_from_the_result(tool, tmp_path):
    root = _copy(tmp_path)
    front, own = "docs/results.md", "docs/results/prm.md"
    empty = tool.pages(root)
    assert "hold / undecided / fail" in empty[front]
    assert "| [prm](results/prm.md) | 0 of 7 | – | 0 / 0 / 0 |" in empty[front]
    (root / "results" / "prm").mkdir(parents=True)
    entry = {
        "labels": {"images": "CIFAR-10", "pixels": "bottom", "share": "0.5"}, "unit": "share",
        "published": 0.75, "ours": {"value": 0.8125, "n": 16, "low": 0.5699, "high": 0.9341},
        "adaptive": {"value": 0.0, "n": 16, "low": 0.0, "high": 0.1936},
    }  # fmt: skip
    file = root / "results" / "prm" / "image3.json"
    file.write_text(json.dumps(_result(entries=[entry])))
    pages = tool.pages(root)
    for page in (pages[front], pages[own]):
        assert "| 75 % | 81.2 % [57, 93] | 0.0 % [0, 19] | [`prm/image3`]" in page
    assert "| [prm](results/prm.md) | 1 of 7 | 1 of 3 | 0 / 0 / 1 |" in pages[front]
    assert "- *fails*: It rains. ([S4, image 4](../results/prm/image3.md))" in pages[front]
    assert "What does not hold" in pages[own]
    assert "- It rains. [S4, image 4](../../results/prm/image3.md): 3 of 4." in pages[own]
    assert "- *holds*: It snows." in pages[own]
    assert "loss-is-alive" in pages[own]
    left = [p[own].count("no result committed yet") for p in (empty, pages)]
    assert left[1] == left[0] - 1
    text = (
        "Half: [[prm/image3; CIFAR-10; bottom; 0.5; ours]]; [[prm/image3; CIFAR-10; top; 0; ours]]."
    )
    told = tool.filled(text, tool.Shelf(root))
    assert told == "Half: 81.2 % [57, 93]; (awaits `prm/image3`)."


def test_a_cell_that_no_recipe_has_is_an_error(tool, tmp_path):
    shelf = tool.Shelf(_copy(tmp_path))
    with pytest.raises(SystemExit, match="no cell"):
        shelf.entry("prm/image3", ["CIFAR-10", "middle", "0.5"])
    with pytest.raises(SystemExit, match="no recipe"):
        shelf.entry("prm/image33", [])


def test_a_smoke_test_is_no_result(tool, tmp_path):
    root = _copy(tmp_path)
    (root / "results" / "prm").mkdir(parents=True)
    (root / "results" / "prm" / "image3.json").write_text(json.dumps(_result(scale="smoke")))
    with pytest.raises(SystemExit, match="smoke"):
        tool.pages(root)
