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


def test_time_is_told_once_and_from_memory_too(tmp_path, monkeypatch):
    """Closed form: a clock that only moves inside of measures."""
    now = [0.0]
    monkeypatch.setattr("feint.recipes.lab.time.perf_counter", lambda: now[0])

    def total(folder):
        lab = Lab(tmp_path / folder, DataSpec(spec="bundled:cifar10", samples=2))

        def crafted():
            now[0] += 5
            return Measured({"a": np.arange(3)}, {})

        def judged(seconds):
            lab.keep("crafted", {}, (), crafted)
            now[0] += seconds
            return Measured({}, {"value": Number(0.5)})

        for seconds in (1, 2):  # both of the same crafted images
            lab.keep("judged", {"seconds": seconds}, ("seconds",), lambda s=seconds: judged(s))
        return sum(lab.seconds.values())

    assert total("figure3") == 5 + 1 + 2
    assert total("figure4") == 5 + 1 + 2
    assert now[0] == 5 + 1 + 2
