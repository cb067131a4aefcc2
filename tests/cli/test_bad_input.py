"""Every bad input ends in one message that names the fix, exit code 2, and no traceback.

Oracle: the list in the issue that asked for the command line; exit codes of the design.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from feint.cli.app import app
from feint.models import build

MODEL = """
import torch
def linear():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 4))
def nan():
    model = linear()
    model[1].bias.data[0] = float("nan")
    return model
def broken():
    raise ValueError("no weights today")
def number():
    return 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "net.py").write_text(MODEL)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 3, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "ok.npz", x=images, y=np.arange(12) % 4)
    for i in range(3):
        Image.fromarray(images[i].transpose(1, 2, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "ok.csv").write_text("file,label\n0.png,0\n1.png,1\n2.png,2\n")
    return tmp_path


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, ["evaluate", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


BASE = ("--model", "net.py:linear", "--data", "ok.npz", "--attack", "pgd(steps=2)", "--out", "run")


def replaced(**changes: str) -> list[str]:
    options = dict(zip(BASE[::2], BASE[1::2], strict=True))
    options |= {f"--{key.replace('_', '-')}": value for key, value in changes.items()}
    return [word for pair in options.items() for word in pair]


def truncated(folder: Path) -> None:
    png = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(png[: len(png) // 2])


def missing_row(folder: Path) -> None:
    (folder / "ok.csv").write_text("file,label\n0.png,0\nlost.png,1\n")


def floats(folder: Path) -> None:
    np.savez(folder / "float.npz", x=np.full((4, 3, 8, 8), 200.0), y=np.zeros(4, np.int64))


def flat(folder: Path) -> None:
    np.savez(folder / "flat.npz", x=np.zeros((4, 192), np.uint8), y=np.zeros(4, np.int64))


def objects(folder: Path) -> None:
    np.savez(folder / "objects.npz", x=np.array([{}], object), y=np.zeros(1, np.int64))


def labels(folder: Path) -> None:
    np.savez(folder / "labels.npz", x=np.zeros((4, 3, 8, 8), np.uint8), y=np.array([0, 1, 2, 9]))


def other(folder: Path) -> None:
    save_file(build("resnet20").state_dict(), folder / "weights.safetensors")


def pickled(folder: Path) -> None:
    (folder / "weights.pt").write_bytes(pickle.dumps({"evil": print}))


def file_in_the_way(folder: Path) -> None:
    (folder / "taken").write_text("a file")


CASES: list[tuple[str, Callable[[Path], None] | None, dict[str, str], str]] = [
    ("eps in 0…255 units", None, {"eps": "8"}, "8/255"),
    ("eps is no number", None, {"eps": "eight"}, "8/255"),
    ("negative eps", None, {"eps": "-0.1"}, "≥ 0"),
    ("unknown norm", None, {"norm": "l3"}, "linf"),
    ("unknown attack", None, {"attack": "pgdd"}, "did you mean 'pgd'"),
    ("unknown keyword", None, {"attack": "pgd(stepz=3)"}, "did you mean 'steps'"),
    ("bad value", None, {"attack": "pgd(steps=0)"}, "≥ 1"),
    ("unknown estimator", None, {"attack": "pgd(gradient=eott(3))"}, "did you mean 'eot'"),
    ("code instead of an attack", None, {"attack": "__import__('os').system('true')"}, "error"),
    ("unknown defense", None, {"defense": "pixel_shif"}, "did you mean 'pixel_shift'"),
    ("unknown defense keyword", None, {"defense": "jpeg(qualty=75)"}, "did you mean 'quality'"),
    ("unknown scenario", None, {"scenario": "white_box"}, "did you mean 'white-box'"),
    ("transfer without a source", None, {"scenario": "transfer"}, "--source"),
    ("unknown bundled model", None, {"model": "bundled:cifar10-resnet2"}, "unknown"),
    ("missing model file", None, {"model": "lost.py:linear"}, "lost.py"),
    ("missing function", None, {"model": "net.py:linea"}, "did you mean 'linear'"),
    ("function that raises", None, {"model": "net.py:broken"}, "no weights today"),
    ("function that gives no model", None, {"model": "net.py:number"}, "int"),
    ("NaN logits", None, {"model": "net.py:nan"}, "NaN"),
    ("missing data", None, {"data": "lost.npz"}, "lost.npz"),
    ("float arrays", floats, {"data": "float.npz"}, "uint8"),
    ("flat arrays", flat, {"data": "flat.npz"}, "(N, 3, H, W)"),
    ("pickled arrays", objects, {"data": "objects.npz"}, "error"),
    ("labels out of range", labels, {"data": "labels.npz"}, "9"),
    ("truncated PNG", truncated, {"data": "ok.csv"}, "1.png"),
    ("CSV row without its file", missing_row, {"data": "ok.csv"}, "lost.png"),
    (
        "checkpoint of another architecture",
        other,
        {"model": "weights.safetensors", "arch": "vgg11"},
        "vgg11",
    ),
    ("a pickle", pickled, {"model": "weights.pt", "arch": "resnet20"}, "--trust"),
    ("output below a file", file_in_the_way, {"out": "taken/run"}, "taken"),
    ("votes without randomness", None, {"votes": "3"}, "random"),
]


@pytest.mark.parametrize(("what", "prepare", "changes", "hint"), CASES, ids=[c[0] for c in CASES])
def test_one_message_and_exit_code_2(
    folder: Path,
    what: str,
    prepare: Callable[[Path], None] | None,
    changes: dict[str, str],
    hint: str,
) -> None:
    if prepare:
        prepare(folder)
    result = run(*replaced(**changes))
    assert result.exit_code == 2, (what, result.output, result.stderr)
    assert hint in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error") >= 1
    assert result.stdout == ""
    # Nothing is left that a resume would trust: a run with good input works in the same folder.
    if not changes.keys() & {"out"}:
        again = run(*BASE)
        assert again.exit_code in (0, 1), again.stderr


def test_json_is_one_object_and_nothing_else(folder: Path) -> None:
    result = run(*BASE, "--json")
    assert result.exit_code in (0, 1), result.stderr
    found = json.loads(result.stdout)
    assert {"verdict", "grade", "run", "html", "cells", "findings", "seconds"} <= found.keys()
    for cell in found["cells"]:
        rate = cell["accuracy"]
        assert 0 <= rate["low"] <= rate["value"] <= rate["high"] <= 1
        assert cell["n"] == 12
    assert {f["status"] for f in found["findings"]} <= {"pass", "warn", "fail"}
    assert Path(found["html"]).read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_damaged_shard_is_reported_and_computed_again(folder: Path) -> None:
    first = json.loads(run(*BASE, "--json").stdout)
    shard = sorted((folder / "run" / "samples").glob("*.parquet"))[0]
    shard.write_bytes(shard.read_bytes()[:-20])
    sorted((folder / "run" / "samples").glob("*.parquet"))[1].unlink()
    again = run(*BASE, "--json")
    assert again.exit_code in (0, 1)
    second = json.loads(again.stdout)
    assert second["cells"] == first["cells"]
    report = CliRunner().invoke(app, ["report", "run", "--json"])
    assert json.loads(report.stdout)["cells"] == first["cells"]


def test_report_of_a_damaged_run_says_how_to_repair_it(folder: Path) -> None:
    run(*BASE)
    shard = sorted((folder / "run" / "samples").glob("*.parquet"))[0]
    shard.write_bytes(b"nothing")
    result = CliRunner().invoke(app, ["report", "run"])
    assert result.exit_code == 2
    assert shard.name in result.stderr
    assert "feint evaluate" in result.stderr or "resume" in result.stderr


def test_another_run_in_the_folder_is_refused(folder: Path) -> None:
    run(*BASE)
    result = run(*replaced(eps="4/255"))
    assert result.exit_code == 2
    assert "eps" in result.stderr


def test_global_state_is_left_alone(folder: Path) -> None:
    state = torch.random.get_rng_state()
    run(*BASE)
    assert torch.equal(torch.random.get_rng_state(), state)
