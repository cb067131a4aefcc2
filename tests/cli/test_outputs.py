"""`feint evaluate` and `feint report` from outside: JSON, gate, SARIF, JUnit, diagnosis, figures.

Oracles: the published schema by a validator written from its specification, exit codes of the
design, and the standard library's XML parser.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from feint.cli.app import app
from feint.core import random
from feint.models import load
from feint.reports.schema import generate, text
from tests.reports.validator import errors

MODEL = """
from torch import nn
from feint.core import random

def net():
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    made = nn.Sequential(*layers, nn.Linear(24, 5))
    for name, p in made.named_parameters():
        p.data = random.normal(random.fold(random.keys(2, 1), name), p.shape)[0] * 0.4
    return made.eval()
"""
BASE = ("--model", "net.py:net", "--data", "ok.npz", "--attack", "pgd(steps=3)", "--eps", "1/255")


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("outputs")
    (made / "net.py").write_text(MODEL)
    pixels = random.integers(random.keys(0, 12), 0, 256, (3, 8, 8))
    labels = load(f"{made}/net.py:net")(pixels.float() / 255).argmax(1)
    np.savez(made / "ok.npz", x=pixels.numpy().astype("uint8"), y=labels.numpy())
    return made


@pytest.fixture(autouse=True)
def _here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")


def evaluated(*more: str) -> tuple[int, dict[str, Any]]:
    result = invoke("evaluate", *BASE, "--defense", "noise(scale=0.02)", "--json", *more)
    return result.exit_code, json.loads(result.stdout)


def test_real_output_fits_the_published_schema() -> None:
    code, told = evaluated("--out", "run", "--judge-draws", "4", "--fail-under", "0")
    assert errors(told, generate(), generate()) == []
    assert told["gate"]["fail_under"] == 0
    assert code == int(told["withheld"])
    shown = invoke("report", "run", "--json")
    assert errors(json.loads(shown.stdout), generate(), generate()) == []
    # The same numbers, read back.
    assert json.loads(shown.stdout)["cells"] == told["cells"]
    bare = told["cells"][0]
    assert (bare["votes"], bare["scenario"]) == (1, "none")
    assert shlex.split(told["command"])[0] == "feint"


def test_the_schema_is_printed() -> None:
    assert invoke("report", "--schema").stdout == text()
    assert invoke("report").exit_code == 2


def test_the_gate_and_its_files(folder: Path) -> None:
    evaluated("--out", "gated", "--judge-draws", "4")
    files = ("--sarif", "a.sarif", "--junit", "a.xml")
    low = invoke("report", "gated", "--fail-under", "99.9", *files)
    assert low.exit_code == 1
    assert "gate failed" in low.stdout
    log = json.loads((folder / "a.sarif").read_text())
    rules = [r["ruleId"] for r in log["runs"][0]["results"]]
    assert "fail-under" in rules
    assert log["runs"][0]["invocations"][0]["exitCode"] == 1
    root = ElementTree.parse(folder / "a.xml").getroot()
    assert int(root.attrib["failures"]) > 0
    assert len(list(root.iter("testcase"))) == int(root.attrib["tests"])
    assert invoke("report", "gated", "--fail-under", "99.9", "--json").exit_code == 1
    told = json.loads(invoke("report", "gated", "--fail-under", "0", "--json").stdout)
    assert told["gate"]["passed"] == (not told["withheld"])
    assert invoke("report", "gated").exit_code == 0


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--fail-under", "140", "from 0 to 100"),
        ("--fail-under-end", "middle", "low, value, high"),
        ("--min-grade", "F", "expected A, B or C"),
        ("--sarif", "nowhere/a.sarif", "there is no folder nowhere"),
    ],
)
def test_bad_conditions_are_refused_before_any_work(option: str, value: str, words: str) -> None:
    result = invoke("evaluate", *BASE, "--out", "never", option, value)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not Path("never").exists()


def test_the_ladder_as_a_file(folder: Path) -> None:
    evaluated("--out", "drawn", "--judge-draws", "4")
    for suffix in ("svg", "png", "pdf"):
        assert invoke("report", "drawn", "--out", f"ladder.{suffix}").exit_code == 0
    assert "lane-0-mark-0" in (folder / "ladder.svg").read_text()
    with Image.open(folder / "ladder.png") as image:
        assert image.width > 800
    assert (folder / "ladder.pdf").read_bytes().startswith(b"%PDF")
    assert invoke("report", "drawn", "--out", "ladder.gif").exit_code == 2


def test_a_diagnosis_is_in_the_page(folder: Path) -> None:
    evaluated("--out", "looked", "--judge-draws", "4", "--diagnose")
    page = (folder / "looked" / "report.html").read_text()
    assert '<section id="diagnosis">' in page
    assert "data:image/svg+xml;base64," in page
    assert "Gradient overlap" in page
    # It is kept: a later report shows it again, without computing anything.
    invoke("report", "looked", "--out", "again.html")
    assert '<section id="diagnosis">' in (folder / "again.html").read_text()
    (folder / "looked" / "diagnosis" / "numbers.json").write_text("{")
    broken = invoke("report", "looked")
    assert broken.exit_code == 2
    assert "numbers.json is damaged" in broken.stderr.replace("\n", "")


def test_a_report_runs_no_code_that_a_run_names_unless_trusted(folder: Path) -> None:
    """A run directory may be anybody's: its model's file leaves a mark when it is executed."""
    run = folder / "theirs"
    assert invoke("evaluate", *BASE, "--out", str(run), "--json").exit_code in (0, 1)
    mark = folder / "executed"
    (folder / "net.py").write_text(f"open({str(mark)!r}, 'w').close()\n{MODEL}")
    try:
        told = invoke("report", str(run), "--json")
        assert told.exit_code == 0
        assert not mark.exists()
        assert "give --trust" in told.stderr
        assert invoke("report", str(run), "--json", "--trust").exit_code == 0
        assert mark.exists()
    finally:
        (folder / "net.py").write_text(MODEL)
