"""Recipes as data. Oracles: what was written into the YAML, and small cases counted by hand."""

import textwrap

import pytest
import yaml

from feint.core.errors import ConfigError, DataError, UnknownNameError
from feint.diagnostics.numbers import Number
from feint.recipes.claims import decide
from feint.recipes.grid import adaptive_fields, points, resolve_model
from feint.recipes.metrics import METRICS, attacked_cells, cell_of, metric_of
from feint.recipes.reproduce import _hit, reproduce
from feint.recipes.schema import PAPERS, SCALES, Claim, Recipe, list_recipes, load_recipe

SCALE = {"about": "nothing is smaller"}
PLAIN = {
    "name": "ace/mine",
    "title": "mine",
    "place": "nowhere",
    "axes": {
        "network": {"A": {"model": "@a"}, "B": {"model": "cifar10-resnet20-ace{λ}"}},
        "λ": [0, 10],
    },
    "base": {"metric": "accuracy", "attack": "{kind}", "kind": "pgd", "scenario": "white-box"},
    "adaptive": {"scenario": "adaptive"},
    "targets": {"A": [50, None], "B": {"0": 12.5}},
    "scales": {s: {**SCALE, "models": {"a": "bundled:cifar10-resnet20"}} for s in SCALES},
}


def made(**changes):
    return Recipe.model_validate({**PLAIN, **changes})


def test_points_are_all_combinations_with_their_targets():
    recipe = made()
    grid = points(recipe, recipe.scales["cpu"], {})
    assert [p.labels for p in grid] == [("A", "0"), ("A", "10"), ("B", "0"), ("B", "10")]
    assert [p.published for p in grid] == [0.5, None, 0.125, None]
    assert grid[0].fields["attack"] == "pgd"
    assert [p.fields["model"] for p in grid] == [
        "bundled:cifar10-resnet20",
        "bundled:cifar10-resnet20",
        "bundled:cifar10-resnet20",
        "bundled:cifar10-resnet20-ace10",
    ]


def test_fields_name_fields_that_name_others():
    chain = {**PLAIN["base"], "kind": "{first}", "first": "{second}", "second": "{λ}/{@a}"}
    recipe = made(base=chain)
    grid = points(recipe, recipe.scales["cpu"], {"a": "x.py:f"})
    assert [p.fields["attack"] for p in grid[:2]] == ["0/x.py:f", "10/x.py:f"]
    circle = made(base={**PLAIN["base"], "kind": "{first}", "first": "{kind}"})
    with pytest.raises(ConfigError, match="in a circle"):
        points(circle, circle.scales["cpu"], {})


def test_scales_replace_fields_and_users_replace_models():
    scales = {
        **PLAIN["scales"],
        "cpu": {
            **PLAIN["scales"]["cpu"],
            "axes": {"λ": {"10": {"eps": 0.1}}},
            "base": {"kind": "fgsm"},
        },
    }
    recipe = made(scales=scales)
    grid = points(recipe, recipe.scales["cpu"], {"a": "x.py:f"})
    assert grid[0].fields["attack"] == "fgsm"
    assert grid[0].fields["model"] == "x.py:f"
    assert [p.fields.get("eps") for p in grid] == [None, 0.1, None, 0.1]
    with pytest.raises(UnknownNameError, match="did you mean 'a'"):
        points(recipe, recipe.scales["cpu"], {"aa": "x.py:f"})


def test_what_must_be_given_is_asked_for():
    recipe = made(
        needs={"a": "Inception-v3"},
        scales={s: {**SCALE, "models": {"a": "?"}} for s in SCALES},
    )
    with pytest.raises(
        ConfigError, match=r"needs a \(Inception-v3\); give it with --model 'a=SPEC'"
    ):
        points(recipe, recipe.scales["paper"], {})


def test_models_by_name():
    recipe = made()
    scale = recipe.scales["cpu"]
    assert resolve_model("cifar10-resnet20", recipe, scale, {}) == "bundled:cifar10-resnet20"
    assert resolve_model("cifar10-toy", recipe, scale, {}).startswith("trained:cifar10-toy@")
    assert resolve_model("torchvision:resnet50", recipe, scale, {}) == "torchvision:resnet50"
    with pytest.raises(UnknownNameError, match="did you mean 'cifar10-resnet20"):
        resolve_model("cifar10-resnet2", recipe, scale, {})


def test_the_adaptive_attacker_has_the_points_fields_but_for_his_own():
    axes = {"λ": {"0": {"adaptive": None}, "10": {"adaptive": {"steps": 3}}}}
    recipe = made(axes={"network": PLAIN["axes"]["network"], **axes}, targets=None)
    grid = points(recipe, recipe.scales["cpu"], {})
    assert adaptive_fields(recipe, recipe.scales["cpu"], grid[0]) is None
    fields = adaptive_fields(recipe, recipe.scales["cpu"], grid[1])
    assert (fields["scenario"], fields["steps"], fields["metric"]) == ("adaptive", 3, "accuracy")
    assert adaptive_fields(made(adaptive=None), recipe.scales["cpu"], grid[1]) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": {"cpu": SCALE}}, "there is no scale 'smoke'"),
        ({"name": "mine/mine"}, "expected one of ace"),
        ({"targets": {"C": [1, 2]}}, "targets names 'C'"),
        ({"targets": {"A": [1, 2, 3]}}, "list of 3; expected 2"),
        ({"targets": {"A": ["x", 1]}}, "expected a number or null"),
        ({"claims": [{"say": "x", "rises": "mu"}]}, "unknown axis of a claim 'mu'"),
        ({"claims": [{"say": "x", "rises": "λ", "least": 1}]}, "a claim is one of"),
        ({"claims": [{"say": "x", "least": 1, "where": {"λ": ["5"]}}]}, "unknown label of λ '5'"),
        ({"colour": 1}, "Extra inputs"),
    ],
)
def test_bad_recipes_say_what_is_wrong(tmp_path, changes, message):
    folder = tmp_path / "ace"
    folder.mkdir()
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**PLAIN, **changes}, allow_unicode=True))
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(path))


def test_recipe_files(tmp_path):
    with pytest.raises(DataError, match="cannot read recipe"):
        load_recipe(str(tmp_path / "none.yaml"))
    with pytest.raises(UnknownNameError, match="did you mean 'ace/table3'"):
        load_recipe("ace/tabel3")
    bad = tmp_path / "a.yaml"
    bad.write_text(textwrap.dedent("a: ["))
    with pytest.raises(ConfigError, match=r"recipe .*a\.yaml"):
        load_recipe(str(bad))


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_in_the_package_is_whole(name):
    """All scales make their points; every metric is known; every cell can be described."""
    recipe = load_recipe(name)
    assert recipe.paper in PAPERS
    for scale in recipe.scales.values():
        small = recipe.scales["smoke"]  # what stands in there can be had for every role
        given = {r: small.models.get(r, "bundled:cifar10-resnet20") for r in scale.models}
        sets = {r: small.sets.get(r, "bundled:cifar10") for r in scale.sets}
        for point in points(recipe, scale, given, sets):
            assert not point.lacks
            for fields in (point.fields, adaptive_fields(recipe, scale, point)):
                if fields is not None:
                    metric_of(fields).ask(fields, (3, 32, 32))


def test_cells_come_from_fields():
    fields = {"model": "m", "attack": "pgd", "scenario": "white-box", "eps": "8/255", "network": 1}
    assert cell_of(fields, ()).eps == 8 / 255
    assert cell_of(fields, (), attack="none").scenario == "none"
    rms = cell_of({**fields, "norm": "rms", "eps": 0.05}, (3, 299, 299))
    assert (rms.norm, round(rms.eps, 2)) == ("l2", 25.89)  # FACTS: 25.89 of 299·299·3 values
    several = attacked_cells({**fields, "attacks": ["pgd", {"attack": "fgsm"}, "pgd"]}, ())
    assert [c.attack for c in several] == ["pgd", "fgsm"]
    search = attacked_cells({**fields, "scenario": "adaptive", "defense": "pixel_shift"}, ())
    assert len(search) > 3
    assert {c.scenario for c in search} == {"adaptive"}
    assert len(attacked_cells({**fields, "scenario": "adaptive", "most": 2}, ())) == 2


def test_unknown_metrics_are_named():
    with pytest.raises(UnknownNameError, match="did you mean 'accuracy'"):
        metric_of({"metric": "acuracy"})
    with pytest.raises(ConfigError, match="no field 'metric'"):
        metric_of({})
    assert all(m.summary.endswith(".") for m in METRICS.values())


N = Number
AXES = {"a": ["x", "y"], "λ": ["0", "1", "2"]}


def line(*values, half=0.01):
    return {("x", str(i)): N(v, 100, v - half, v + half) for i, v in enumerate(values)}


@pytest.mark.parametrize(
    ("claim", "numbers", "answer"),
    [
        ({"rises": "λ"}, line(0.1, 0.2, 0.3), "holds"),
        ({"rises": "λ"}, line(0.1, 0.095, 0.3), "holds"),  # a step down within the intervals
        ({"rises": "λ"}, line(0.1, 0.05, 0.3), "fails"),
        ({"rises": "λ"}, line(0.1, 0.1, 0.1), "undecided"),
        ({"rises": "λ"}, line(0.1, 0.105, 0.095), "undecided"),  # the last below, within them
        ({"rises": "λ"}, line(0.13, 0.115, 0.1), "fails"),  # each step within them, not their sum
        ({"falls": "λ"}, line(0.3, 0.2, 0.1), "holds"),
        ({"falls": "λ"}, line(0.1, 0.2, 0.3), "fails"),
        ({"least": 0.1}, line(0.2, 0.3), "holds"),
        ({"least": 0.2}, line(0.2, 0.3), "undecided"),
        ({"least": 0.3}, line(0.2, 0.3), "fails"),
        ({"most": 0.5}, line(0.2, 0.3), "holds"),
        ({"most": 0.1}, line(0.2, 0.3), "fails"),
        ({"above": {"λ": ["2"]}, "below": {"λ": ["0", "1"]}}, line(0.1, 0.2, 0.3), "holds"),
        ({"above": {"λ": ["0"]}, "below": {"λ": ["1"]}}, line(0.1, 0.2), "fails"),
        ({"above": {"λ": ["1"]}, "below": {"λ": ["0"]}}, line(0.1, 0.11), "undecided"),
        ({"above": {"λ": ["1"]}, "below": {"λ": ["0"]}, "margin": -0.2}, line(0.3, 0.2), "holds"),
        ({"above": {"λ": ["1"]}, "below": {"λ": ["0"]}, "margin": -0.2}, line(0.5, 0.2), "fails"),
        ({"above": {"λ": ["1"]}, "below": {"λ": ["0"]}, "margin": 0.2}, line(0.1, 0.2), "fails"),
        ({"rises": "λ", "where": {"a": ["y"]}}, line(0.1, 0.2), "undecided"),
    ],
)
def test_claims(claim, numbers, answer):
    found = decide(Claim(say="it is so", **claim), AXES, numbers)
    assert found.answer == answer
    assert found.evidence


def test_evidence_is_in_the_order_of_the_table():
    rows = [f"row {i}" for i in range(20)]
    numbers = {(row, λ): N(0.5, 10, 0.4, 0.6) for row in rows for λ in ("0", "1")}
    claim = Claim(say="it is so", above={"λ": ["1"]}, below={"λ": ["0"]})
    found = decide(claim, {"row": rows, "λ": ["0", "1"]}, numbers, "{:g}".format)
    told = [f"{row}, 1: 0.5; {row}, 0: 0.5" for row in rows[:3]]
    assert found.evidence == f"20 of 20: {'; '.join(told)}; and 17 more"


def test_hits_need_an_overlap_of_both_sampling_errors():
    """By hand: Wilson's interval of 50 % of 100 is ±9.6 points, of 10 000 ±1.0 points."""
    recipe = made(images=10_000)
    half = N(0.5, 100, 0.404, 0.596)
    assert _hit(half, 0.59, recipe) is True
    assert _hit(half, 0.605, recipe) is False
    assert _hit(half, None, recipe) is None
    assert _hit(N(0.5), 0.5, recipe) is True
    assert _hit(N(0.5), 0.52, made()) is False
    assert _hit(N(0.5), 0.52, made(published_interval=2)) is True


def test_weights_that_are_not_there_are_told_of_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("FEINT_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("feint.core.trained._checkout", list)
    with pytest.raises(DataError, match="make them: feint train cifar10-resnet20-short-ace0"):
        reproduce("ace/table2", scale="cpu", folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()
