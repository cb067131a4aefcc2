"""`feint list`: every kind, for people and as JSON. Oracle: the registries."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from feint.cli.app import app
from feint.core.registry import ATTACKS, DEFENSES
from feint.evaluation import SCENARIOS
from feint.models import bundled
from feint.recipes.reproduce import METRICS
from feint.reports.reproduction import DRAWINGS
from feint.training.recipe import list_recipes

KINDS = {
    "attacks": lambda: list(ATTACKS),
    "defenses": lambda: list(DEFENSES),
    "models": bundled,
    "scenarios": lambda: list(SCENARIOS),
    "recipes": list_recipes,
    "metrics": lambda: list(METRICS),
    "drawings": lambda: list(DRAWINGS),
}


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_everything_as_json() -> None:
    result = CliRunner().invoke(app, ["list", "--json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    names = {kind: [entry["name"] for entry in entries] for kind, entries in found.items()}
    assert names == {kind: list(known()) for kind, known in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_one_kind_for_people(kind: str) -> None:
    result = CliRunner().invoke(app, ["list", kind])
    assert result.exit_code == 0, result.stderr
    assert all(name in result.stdout for name in KINDS[kind]())


@pytest.mark.parametrize("kind", ["metrics", "drawings"])
def test_what_tables_are_made_of_is_told(kind: str) -> None:
    found = json.loads(CliRunner().invoke(app, ["list", kind, "--json"]).stdout)
    assert all(len(entry["summary"]) > 20 for entry in found[kind])


def test_an_unknown_kind() -> None:
    result = CliRunner().invoke(app, ["list", "attack"])
    assert result.exit_code == 2
    assert "attacks" in result.stderr
