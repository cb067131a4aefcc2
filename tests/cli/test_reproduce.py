"""`feint reproduce`: list, JSON, own recipes, bad input, resume.

Oracles: exit codes of the design; counts by hand of a classifier that only looks at brightness.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from feint.cli.app import app
from feint.recipes.schema import SCALES, list_recipes

NET = """
import os
import torch
from torch import nn

class Bright(nn.Module):
    '''Class 1 if the image is brighter than a half on the mean.'''
    def __init__(self):
        super().__init__()
        self.asked = 0
    def forward(self, x):
        self.asked += 1
        if self.asked > 2 and os.path.exists("stop"):
            raise KeyboardInterrupt
        mean = x.flatten(1).mean(1)
        return torch.stack([0.5 - mean, mean - 0.5], 1)

def bright():
    return Bright()
"""

RECIPE = """
title: Brightness
place: our own, Table 1
axes:
  attack:
    none: {attack: none, scenario: none}
    FGSM: {attack: fgsm, eps: 10/255}
  number:
    accuracy: {metric: accuracy}
    seen: {metric: random views, defense: "noise(scale=0.01)", draws: 2, attack: none}
base: {model: "@net", scenario: white-box, norm: linf, defense: none}
targets: {none: [100, null], FGSM: [25, null]}
images: 4
needs: {net: a classifier of brightness, data: gray images}
claims:
  - {say: The attack works., falls: attack, where: {number: [accuracy]}}
drawing: {kind: curves}
scales:
  smoke: {about: four images, data: {spec: set.npz}, checks: none, models: {net: "net.py:bright"}}
  cpu: {about: four images, data: {spec: set.npz}, checks: none, models: {net: "?"}}
  paper: {about: all images, data: {spec: "?"}, checks: none, models: {net: "net.py:bright"}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "net.py").write_text(NET)
    levels = np.array([60, 120, 135, 200], np.uint8)
    x = np.broadcast_to(levels[:, None, None, None], (4, 3, 8, 8)).copy()
    np.savez(tmp_path / "set.npz", x=x, y=(levels > 127).astype(np.int64))
    (tmp_path / "ace").mkdir()
    (tmp_path / "ace" / "mine.yaml").write_text(RECIPE)
    (tmp_path / "taken").write_text("a file")
    return tmp_path


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, ["reproduce", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


OWN = ("ace/mine.yaml", "--scale", "smoke", "--out", "run")


def test_list() -> None:
    result = run("--list", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert list(found) == ["recipes"]
    assert [r["name"] for r in found["recipes"]] == list_recipes()
    for row in found["recipes"]:
        assert {"name", "title", "scales"} <= row.keys()
        assert row["scales"] == list(SCALES)
        assert row["title"]
    plain = run("--list")
    assert plain.exit_code == 0
    assert all(name in plain.stdout for name in list_recipes())


def test_a_recipe_of_ones_own(folder: Path) -> None:
    result = run(*OWN, "--json", "--results", "results")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["recipe"] == "ace/mine"
    values = [e["ours"]["value"] for e in found["entries"]]
    # Two of the four means lie within 10/255 of a half.
    assert values[0] == 1.0
    assert values[2] == 0.5
    assert [e["hit"] for e in found["entries"]] == [True, None, True, None]
    assert found["claims"][0]["answer"] in ("holds", "undecided")
    written = json.loads((folder / "results" / "ace" / "mine.json").read_text())
    assert written["entries"] == found["entries"]
    names = {p.name for p in (folder / "results" / "ace").iterdir()}
    assert names == {"mine.json", "mine.md", "mine.png", "mine.svg"}
    assert str(folder) not in (folder / "results" / "ace" / "mine.md").read_text()


def test_table_for_people(folder: Path) -> None:
    result = run(*OWN)
    assert result.exit_code == 0, result.stderr
    for text in ("Brightness", "published", "ours", "smoke test", "The attack works."):
        assert text in result.stdout


def test_missed_targets_end_in_exit_code_1_beyond_smoke(folder: Path) -> None:
    text = RECIPE.replace("none: [100, null]", "none: [10, null]").replace("images: 4", "")
    (folder / "ace" / "mine.yaml").write_text(text)
    assert run(*OWN).exit_code == 0
    at_cpu = ("ace/mine.yaml", "--scale", "cpu", "--out", "run", "--model", "net=net.py:bright")
    result = run(*at_cpu)
    assert result.exit_code == 1, result.stderr
    assert "miss" in result.stdout


def test_a_spec_alone_is_the_only_role(folder: Path) -> None:
    result = run("ace/mine.yaml", "--scale", "cpu", "--model", "net.py:bright", "--json")
    assert result.exit_code in (0, 1), result.stderr
    assert (folder / "runs" / "reproduce" / "ace-mine-cpu").is_dir()


def test_fewer_images(folder: Path) -> None:
    found = json.loads(run(*OWN, "--samples", "2", "--json").stdout)
    assert {e["ours"]["n"] for e in found["entries"]} == {2}


def test_the_command_is_written_down_without_folders(folder: Path) -> None:
    """Oracle: the same command once more gives the same numbers."""
    (folder / "deep").mkdir()
    (folder / "net.py").rename(folder / "deep" / "net.py")
    given = ("--model", "net=deep/net.py:bright", "--data", str(folder / "set.npz"))
    found = run("ace/mine.yaml", "--scale", "cpu", *given, "-n", "3", "--seed", "7", "--json")
    found = json.loads(found.stdout)
    command = found["provenance"]["command"]
    told = "feint reproduce ace/mine --scale cpu --model net=net.py:bright --data set.npz -n 3"
    assert command == told + " --seed 7"
    (folder / "deep" / "net.py").rename(folder / "net.py")
    words = command.replace("ace/mine", "ace/mine.yaml").split()[2:]
    again = json.loads(run(*words, "--out", "again", "--json").stdout)
    assert again["entries"] == found["entries"]


def test_interrupted_resumes_with_the_same_numbers(folder: Path) -> None:
    whole = json.loads(run(*OWN[:3], "--out", "other", "--json").stdout)
    (folder / "stop").touch()
    stopped = run(*OWN, "--json")
    assert stopped.exit_code == 130
    assert "the same command resumes from run" in stopped.stderr
    assert stopped.stdout == ""
    (folder / "stop").unlink()
    again = run(*OWN, "--json")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["entries"] == whole["entries"]


def test_an_edited_recipe_runs_beside_what_it_was(folder: Path) -> None:
    file = folder / "ace" / "mine.yaml"
    before = json.loads(run(*OWN, "--json").stdout)["entries"]
    file.write_text(RECIPE.replace("eps: 10/255", "eps: 100/255"))
    edited = run(*OWN, "--json")
    assert edited.exit_code == 0, edited.stderr
    # Every mean lies within 100/255 of a half.
    assert json.loads(edited.stdout)["entries"][2]["ours"]["value"] == 0.0
    file.write_text(RECIPE)
    assert json.loads(run(*OWN, "--json").stdout)["entries"] == before


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "text"])
def test_a_damaged_measure_is_measured_again(folder: Path, damage: str) -> None:
    first = json.loads(run(*OWN, "--json").stdout)
    (kept, *_) = sorted((folder / "run").glob("*/measures/*.npz"))
    raw = kept.read_bytes()
    if damage == "other":
        np.savez(kept, nothing=np.zeros(2))
    else:
        kept.write_bytes({"cut": raw[: len(raw) // 2], "empty": b"", "text": b"no archive"}[damage])
    again = run(*OWN, "--json")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["entries"] == first["entries"]
    with np.load(kept) as mended, np.load(io.BytesIO(raw)) as whole:
        measured = [name for name in whole.files if name != "__seconds__"]
        assert set(mended.files) == set(whole.files)
        assert all(np.array_equal(mended[name], whole[name]) for name in measured)


def test_nothing_is_measured_twice(folder: Path) -> None:
    run(*OWN)
    kept = {p: p.stat().st_mtime_ns for p in (folder / "run").glob("*/measures/*.npz")}
    assert kept
    run(*OWN)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ((), "ace/table3"),
        (("ace/table33",), "did you mean 'ace/table3"),
        (("acee",), "did you mean 'ace'"),
        (("lost/mine.yaml",), "lost/mine.yaml"),
        ((*OWN, "--scale", "smokee"), "did you mean 'smoke'"),
        ((*OWN, "--samples", "0"), "--samples is 0"),
        ((*OWN, "--samples", "99"), "4"),
        ((*OWN, "--batch-size", "0"), "--batch-size"),
        ((*OWN, "--threads", "0"), "--threads"),
        ((*OWN, "--workers", "-1"), "--workers"),
        ((*OWN, "--model", "other=net.py:bright"), "net"),
        ((*OWN, "--model", "net=net.py:brigth"), "did you mean 'bright'"),
        ((*OWN, "--model", "net=lost.py:bright"), "lost.py"),
        ((*OWN, "--data", "lost.npz"), "lost.npz"),
        ((*OWN, "--data", "set.npz", "--data", "set.npz"), "roles of this recipe are none"),
        ((*OWN, "--results", "taken/results"), "cannot write into taken/results"),
        ((*OWN[:3], "--out", "taken/run"), "cannot write into taken/run"),
        ((*OWN, "--device", "cdua"), "cdua"),
        (("ace/mine.yaml", "--scale", "cpu"), "needs net (a classifier of brightness)"),
        (("ace/mine.yaml", "--scale", "paper"), "needs data (gray images)"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    folder: Path, arguments: tuple[str, ...], hint: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert hint in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("old", "new", "hint"),
    [
        ("title: Brightness", "title: [", "mine.yaml"),
        (RECIPE, "just text", "mine.yaml"),
        ("base: {model", "bsae: {model", "bsae"),
        ("metric: accuracy", "metric: acuracy", "did you mean 'accuracy'"),
        ("kind: curves", "kind: curvse", "did you mean 'curves'"),
        ("attack: fgsm", "attack: fgsmm", "did you mean 'fgsm'"),
        ("eps: 10/255", "eps: ten", "8/255"),
        ("eps: 10/255", "eps: -1", "≥ 0"),
        ('"@net"', '"@nett"', "did you mean 'net'"),
        ('"@net"', '"{nett}"', "nett"),
        ("norm: linf", "norm: l3", "linf"),
        ("scenario: white-box, norm", "scenario: whitebox, norm", "did you mean 'white-box'"),
        ('"noise(scale=0.01)"', '"noise(scal=0.01)"', "did you mean 'scale'"),
        ("data: {spec: set.npz}", "data: {spec: set.npz, size: 3}", "size"),
        ("data: {spec: set.npz}", "data: {spec: set.npz, samples: 0}", "samples"),
        ("falls: attack", "falls: atack", "did you mean 'attack'"),
        ("targets: {none", "targets: {noen", "none"),
        ("place: our own, Table 1", "place: our own\nname: mine", "expected one of ace"),
        ("scenario: none}", "}", None),
    ],
)
def test_mistakes_in_a_recipe_of_ones_own(
    folder: Path, old: str, new: str, hint: str | None
) -> None:
    assert old in RECIPE
    (folder / "ace" / "mine.yaml").write_text(RECIPE.replace(old, new))
    result = run(*OWN)
    if hint is None:  # a scenario without an attack is no attack
        assert result.exit_code == 0, result.stderr
        return
    assert result.exit_code == 2, result.output
    assert hint in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
