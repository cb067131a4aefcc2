"""`feint diagnose`: files, JSON, defaults, bad input. Oracles: exit codes of the design; the arrays
on disk against the numbers printed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from feint.cli.app import app
from feint.diagnostics import MEASURES

MODEL = """
import torch
from torch import nn
def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4)
        ).eval()
def dead():
    made = net()
    made.insert(0, Cut())
    return made
class Cut(nn.Module):
    def forward(self, x):
        return x.detach()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "net.py").write_text(MODEL)
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "ok.npz", x=images, y=np.arange(6) % 4)
    (tmp_path / "taken").write_text("a file")
    return tmp_path


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, ["diagnose", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


BASE = ("--model", "net.py:net", "--data", "ok.npz", "--points", "5", "--pixel-images", "2")


def test_everything_is_written_and_json_is_one_object(folder: Path) -> None:
    result = run(*BASE, "--defense", "pixel_shift", "--out", "found", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["models"] == ["net.py:net", "net.py:net + pixel_shift"]
    assert found["n"] == 6
    assert list(found["numbers"]) == list(MEASURES)
    for path in [*found["arrays"], *found["figures"], found["html"]]:
        assert Path(path).stat().st_size > 200, path
    for path in found["figures"]:
        if path.endswith(".png"):
            with Image.open(path) as picture:
                assert min(picture.size) > 500
        else:
            assert Path(path).read_text(encoding="utf-8").startswith("<?xml")
    assert len(found["figures"]) == 2 * len(MEASURES)
    page = Path(found["html"]).read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert page.count("data:image/svg+xml;base64,") == len(MEASURES)
    assert "http://" not in page
    assert "<script" not in page
    # The numbers printed are those of the arrays.
    with np.load(folder / "found" / "gradients.npz") as arrays:
        shares = arrays["net-py-net.share_on_connected"]
        assert arrays["net-py-net.robustness"].shape == (8, 8)
    told = found["numbers"]["gradients"]["net.py:net"]["share_on_connected"]
    assert told["value"] == pytest.approx(float(shares.mean()))
    assert told["n"] == 6
    assert (
        json.loads((folder / "found" / "numbers.json").read_text())["numbers"] == found["numbers"]
    )


def test_same_command_same_files(folder: Path) -> None:
    chosen = (*BASE, "--measure", "overlap,perturbation,rank")
    assert run(*chosen, "--out", "one").exit_code == 0
    assert run(*chosen, "--out", "two").exit_code == 0
    names = sorted(p.name for p in (folder / "one").iterdir())
    assert "rank.npz" in names
    assert "labels.npz" not in names
    for name in ("overlap.svg", "perturbation.png", "numbers.json", "diagnosis.html"):
        assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes(), name


def test_table_for_people(folder: Path) -> None:
    result = run(*BASE, "--measure", "overlap,gradients")
    assert result.exit_code == 0, result.stderr
    assert "C inside G(0.3) of Ω" in result.stdout
    assert "%" in result.stdout
    assert "diagnosis.html" in result.stdout
    assert (folder / "diagnosis" / "diagnosis.html").exists()


def test_a_random_defense_and_another_attack(folder: Path) -> None:
    result = run(
        *BASE, "--defense", "rand", "--measure", "perturbation", "--attack", "fgsm", "--json"
    )
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["numbers"]["perturbation"]
    assert len(found) == 2


def test_global_state_is_left_alone(folder: Path) -> None:
    state = torch.random.get_rng_state()
    run(*BASE, "--measure", "overlap,layers")
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        (("--measure", "overlab"), "did you mean 'overlap'"),
        (("--attack", "pgdd"), "did you mean 'pgd'"),
        (("--defense", "pixel_shif"), "did you mean 'pixel_shift'"),
        (("--eps", "8"), "8/255"),
        (("--eps", "eight"), "8/255"),
        (("--share", "1.5"), "fraction"),
        (("--points", "4"), "odd"),
        (("--overlap", "rep"), "did you mean 'repo'"),
        (("--stride", "0"), "--stride"),
        (("--window", "9"), "short side"),
        (("--samples", "99"), "1 to 6"),
        (("--model", "net.py:nett"), "did you mean 'net'"),
        (("--model", "net.py:dead", "--measure", "gradients"), "'model.0'"),
        (("--data", "lost.npz"), "lost.npz"),
        (("--out", "taken/x"), "taken"),
        (("--threads", "0"), "--threads"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    folder: Path, changes: tuple[str, ...], hint: str
) -> None:
    result = run(*BASE, *changes)
    assert result.exit_code == 2, result.output
    assert hint in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
