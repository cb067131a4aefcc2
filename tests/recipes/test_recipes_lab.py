"""What recipes remember. Property: equal contents are measured once, also by recipes beside."""

import numpy as np
import pytest

from feint.diagnostics.numbers import Measured, Number
from feint.recipes.lab import Lab
from feint.store import DataSpec

USED = ("model", "steps")


@pytest.fixture
def measure(tmp_path):
    made = []

    def run(folder, fields, name="m"):
        lab = Lab(tmp_path / folder, DataSpec(spec="bundled:cifar10", samples=2))

        def make():
            made.append(folder)
            return Measured({"a": np.arange(3)}, {"value": Number(0.5, 4, 0.1, 0.9)})

        found = lab.keep(name, {"model": "bundled:cifar10-resnet20", **fields}, USED, make)
        assert found.arrays["a"].tolist() == [0, 1, 2]
        assert found.numbers["value"] == Number(0.5, 4, 0.1, 0.9)
        return list(made)

    return run


def test_a_recipe_beside_is_not_measured_again(measure):
    assert measure("figure3a", {"steps": 1}) == ["figure3a"]
    assert measure("figure3b", {"steps": 1, "what": "ASR"}) == ["figure3a"]


@pytest.mark.parametrize(
    ("fields", "name"), [({"steps": 2}, "m"), ({"steps": 1}, "other"), ({}, "m")]
)
def test_other_contents_are(measure, fields, name):
    measure("figure3a", {"steps": 1})
    assert measure("figure3b", fields, name) == ["figure3a", "figure3b"]


def test_a_damaged_memory_is_measured_again(measure, tmp_path):
    measure("figure3a", {"steps": 1})
    (file,) = (tmp_path / "figure3a" / "measures").iterdir()
    file.write_bytes(file.read_bytes()[:40])
    assert measure("figure3b", {"steps": 1}) == ["figure3a", "figure3b"]
    assert measure("figure3a", {"steps": 1}) == ["figure3a", "figure3b"]
