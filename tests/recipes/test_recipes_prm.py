"""Metrics of S4 and what its recipes need of the grid: roles of data, points that are left out.

Oracles: closed forms on a classifier by hand; the shapes that a UNet's arithmetic gives.
"""

import numpy as np
import pytest
import torch

from feint.core.errors import ConfigError, RangeError, UnknownNameError
from feint.defenses import PRM
from feint.recipes.grid import points
from feint.recipes.measures_prm import stages
from feint.recipes.reproduce import reproduce
from feint.recipes.schema import Recipe

NET = """
import torch
from torch import nn

class First(nn.Module):
    '''Class 1 if the first column is brighter than a half on the mean, whatever the rest.'''
    def forward(self, x):
        mean = x[..., 0].flatten(1).mean(1)
        return 20 * torch.stack([0.5 - mean, mean - 0.5], 1)

def first():
    return First()
"""
SHARES = [0.0, 0.125, 0.5, 1.0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    levels = np.array([100, 110, 120, 150], np.uint8)
    x = np.broadcast_to(levels[:, None, None, None], (4, 3, 8, 8)).copy()
    np.savez(tmp_path / "set.npz", x=x, y=(levels > 127).astype(np.int64))
    return tmp_path


def _recipe(axes, base, **scale):
    scale = {"about": "a test", "data": {"spec": "set.npz"}, "checks": "none", **scale}
    content = {
        "name": "prm/test", "title": "t", "place": "p", "axes": axes, "base": base,
        "scales": dict.fromkeys(("smoke", "cpu", "paper"), scale),
    }  # fmt: skip
    return Recipe.model_validate(content)


def test_masked_attack_keeps_what_the_classifier_reads(folder):
    # Only the first column (1/8 of the pixels) has a gradient: the top eighth keeps the whole
    # attack, the bottom half none of it. A step of 20/255 turns the means 110 and 120.
    axes = {
        "end": {"bottom": {"end": "bottom"}, "top": {"end": "top"}},
        "share": {str(s): {"share": s} for s in SHARES},
    }
    base = {"metric": "masked attack", "model": "net.py:first", "defense": "none",
            "attack": "fgsm(eps=20/255)", "shares": SHARES}  # fmt: skip
    found = reproduce(_recipe(axes, base), folder=folder / "run")
    values = [e.ours.value for e in found.entries]
    assert values == [1.0, 1.0, 1.0, 0.5, 1.0, 0.5, 0.5, 0.5]
    assert found.entry("top", "0.5").others["gap"].value == pytest.approx(0.25)
    axes["share"] = {"0.3": {"share": 0.3}}
    with pytest.raises(ConfigError, match=r"there is no 'bottom 0\.3'"):
        reproduce(_recipe(axes, base), folder=folder / "run")


def test_one_example_is_an_image_that_the_attack_turns(folder):
    axes = {"image": {"0": {"picture": 0}, "1": {"picture": 1}}}
    base = {"metric": "one example", "model": "net.py:first", "defense": "none",
            "scenario": "white-box", "attack": "fgsm(eps=20/255)"}  # fmt: skip
    found = reproduce(_recipe(axes, base), folder=folder / "run")
    # Logits ±20·(mean − 1/2): the new class has the probability σ(40·(mean − 1/2)).
    for entry, mean in zip(found.entries, (130, 140), strict=True):
        wanted = 1 / (1 + np.exp(-40 * (mean / 255 - 0.5)))
        assert entry.ours.value == pytest.approx(wanted, rel=1e-4)
        assert entry.arrays["classes"].tolist() == [0, 1]
        delta = entry.arrays["attacked"] - entry.arrays["clean"]
        assert np.abs(delta).max() == pytest.approx(20 / 255, abs=1e-6)
    axes["image"] = {"2": {"picture": 2}}
    with pytest.raises(RangeError, match="turns 2 images"):
        reproduce(_recipe(axes, base), folder=folder / "run")


def test_random_views_are_those_of_the_defense(folder):
    axes = {"defense": {"noise": {"defense": "noise(kind='sign', scale=0.1)"}}}
    base = {"metric": "random views", "model": "net.py:first", "draws": 3, "picture": 3}
    found = reproduce(_recipe(axes, base), folder=folder / "run")
    entry = found.entries[0]
    delta = np.abs(entry.arrays["seen"] - entry.arrays["clean"])
    assert entry.arrays["seen"].shape == (3, 3, 8, 8)
    assert np.allclose(delta, 0.1, atol=1e-6)
    assert entry.ours.n == 4
    axes["defense"] = {"none": {"defense": "none"}}
    with pytest.raises(ConfigError, match="expected a random one"):
        reproduce(_recipe(axes, base), folder=folder / "run")


def test_stages_follow_the_arithmetic_of_a_unet():
    prm = PRM(weights="untrained", width=4, depth=3)
    found = stages(prm.network, torch.rand(1, 3, 32, 32))
    assert found == [
        ("first", (3, 16, 16)), ("down.0", (4, 16, 16)), ("down.1", (8, 8, 8)),
        ("down.2", (16, 4, 4)), ("up.0", (8, 8, 8)), ("up.1", (4, 16, 16)), ("last", (3, 32, 32)),
    ]  # fmt: skip
    assert stages(prm.network, torch.rand(1, 3, 32, 32)) == found  # no hook stays behind


def test_prm_stages_mix_by_lambda(folder):
    axes = {"module": ["PRM"]}
    base = {"metric": "prm stages", "model": "net.py:first", "choice": 0,
            "defense": "prm(weights='untrained', width=2, depth=2, lam=0.25)"}  # fmt: skip
    entry = reproduce(_recipe(axes, base), folder=folder / "run").entries[0]
    mixed = 0.75 * entry.arrays["shifted"] + 0.25 * entry.arrays["made"]
    assert np.allclose(entry.arrays["out"], mixed, atol=1e-6)
    assert entry.ours.value == 0.25
    base["defense"] = "pixel_shift"
    with pytest.raises(ConfigError, match="expected prm"):
        reproduce(_recipe(axes, base), folder=folder / "run")


def _two_sets(**more):
    axes = {"images": {"mine": {}, "theirs": {"data": {"spec": "@Theirs"}, **more}}}
    base = {"metric": "accuracy", "model": "net.py:first", "scenario": "none", "attack": "none"}
    return _recipe(axes, base, sets={"Theirs": "?"})


def test_a_role_of_data_must_be_given(folder):
    with pytest.raises(ConfigError, match="--data 'Theirs=SPEC'"):
        reproduce(_two_sets(), folder=folder / "run")
    with pytest.raises(UnknownNameError, match="data role"):
        reproduce(_two_sets(), folder=folder / "run", sets={"Thiers": "set.npz"})
    found = reproduce(_two_sets(), folder=folder / "run", sets={"Theirs": "set.npz"})
    assert [e.ours.value for e in found.entries] == [1.0, 1.0]


def test_an_optional_point_is_left_out_and_said_so(folder):
    found = reproduce(_two_sets(optional=True), folder=folder / "run")
    assert [e.ours.value for e in found.entries] == [1.0, None]
    told = found.as_dict()["entries"]
    assert "Theirs=SPEC" in told[1]["lacks"]
    assert "lacks" not in told[0]
    assert len(found.provenance["data"]) == 1


def test_a_role_in_braces(folder):
    axes = {"noise": ["weak"]}
    base = {"metric": "accuracy", "model": "net.py:first", "scenario": "none", "attack": "none",
            "defense": "bit_depth(bits={@Bits})"}  # fmt: skip
    recipe = _recipe(axes, base, models={"Bits": "?"})
    scale = recipe.scales["smoke"]
    assert points(recipe, scale, {"Bits": "3"})[0].fields["defense"] == "bit_depth(bits=3)"
    with pytest.raises(ConfigError, match="--model 'Bits=SPEC'"):
        points(recipe, scale, {})
    base["defense"] = "bit_depth(bits={@Bit})"
    recipe = _recipe(axes, base, models={"Bits": "?"})
    with pytest.raises(UnknownNameError, match="did you mean 'Bits'"):
        points(recipe, scale, {})
