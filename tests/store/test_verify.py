"""Verification of runs. Oracles: what was done to the files by hand, and closed forms."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from feint.cli.app import app
from feint.core.errors import ConfigError, DataError
from feint.evaluation import Batch, Cell
from feint.evaluation.attackers import Attacked
from feint.evaluation.rejudge import compare_fresh, rejudge
from feint.evaluation.shard import Rows, Subject, judge_shard
from feint.store import RunSpec, StoredRun, open_run, run, verify
from feint.store.cache import examples_path, load_examples, load_rows, rows_path
from feint.store.codec import encode_examples, encode_rows
from feint.store.files import read_json, write_json

Make = Callable[..., RunSpec]


@pytest.fixture
def copy(whole: StoredRun, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole.directory, tmp_path / "run"))


def attacked(folder: Path) -> Any:
    return next(r for r in open_run(folder).results if r.cell.attack != "none")


def change_rows(folder: Path, change: Callable[[Rows], None]) -> None:
    """Alter a unit's rows and seal the file again: no checksum can tell."""
    rows, label = load_rows(folder, attacked(folder).key, 0)
    rows = {name: value.copy() for name, value in rows.items()}
    change(rows)
    data, _ = encode_rows(rows, label)
    rows_path(folder, label.key, 0).write_bytes(data)


def change_examples(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Alter a unit's images, seal the file again, and let the rows say that they judge these."""
    result = attacked(folder)
    found, label = load_examples(folder, result.examples, 0)
    data, sealed = encode_examples(replace(found, x_adv=change(found.x_adv)), label)
    examples_path(folder, result.examples, 0).write_bytes(data)
    rows, mine = load_rows(folder, result.key, 0)
    again, _ = encode_rows(rows, replace(mine, facts={**mine.facts, "examples": sealed.sha256}))
    rows_path(folder, result.key, 0).write_bytes(again)


def test_a_run_agrees_with_itself(whole: StoredRun) -> None:
    seen: list[tuple[int, int]] = []
    found = verify(
        whole.directory, trust=True, fresh=True, on_cell=lambda i, n, _: seen.append((i, n))
    )
    assert found.agrees
    assert seen == [(0, 2), (1, 2)]
    # 12 samples in shards of 5 are 3 units; each cell has rows and examples of its own.
    assert found.files == 12
    for checked in found.cells:
        assert (checked.flipped, checked.unexplained, checked.problems) == (0, 0, ())
        assert checked.accuracy == checked.result.accuracy
        assert checked.fresh is not None
        assert checked.fresh.agrees
    assert found.notes == found.problems == ()


def test_another_batch_size_changes_nothing(whole: StoredRun) -> None:
    found = verify(whole.directory, trust=True, batch_size=3)
    assert found.agrees
    assert all(c.unexplained == 0 for c in found.cells)


def test_a_run_with_code_needs_trust(whole: StoredRun) -> None:
    with pytest.raises(ConfigError, match=r"models\.py:conv, which is code.*--trust"):
        verify(whole.directory)


def test_an_outcome_that_was_changed(copy: Path) -> None:
    def flatter(rows: Rows) -> None:
        rows["correct"][:] = rows["draws"]

    change_rows(copy, flatter)
    found = verify(copy, trust=True)
    assert not found.agrees
    clean, white = found.cells
    assert clean.agrees
    assert white.unexplained > 0
    assert white.accuracy.value < white.result.accuracy.value
    assert "accuracy of cell 1" in " ".join(found.problems)  # result.json tells the old number


def test_a_label_that_was_changed(copy: Path) -> None:
    change_rows(copy, lambda rows: rows["label"].__setitem__(2, (rows["label"][2] + 1) % 5))
    (white,) = [c for c in verify(copy, trust=True).cells if not c.agrees]
    index = white.result.rows["index"][2]
    assert any(f"sample {index}: label is" in p for p in white.problems)


def test_an_image_beyond_its_budget(copy: Path) -> None:
    change_examples(copy, lambda x: x + torch.where(x < 0.5, 0.2, -0.2))
    (white,) = [c for c in verify(copy, trust=True).cells if not c.agrees]
    assert any("more than eps 0.062745098" in p for p in white.problems)  # 16/255


def test_an_image_that_leaves_the_box(copy: Path) -> None:
    change_examples(copy, lambda x: x.clone().index_fill_(3, torch.tensor([0]), 1.01))
    (white,) = [c for c in verify(copy, trust=True).cells if not c.agrees]
    assert any("leaves [0, 1] by 0.01" in p for p in white.problems)


def test_an_image_that_was_put_back(copy: Path) -> None:
    # Within the budget, but not what the rows were judged on.
    clean = open_run(copy).clean_images(range(5))
    assert clean is not None
    change_examples(copy, lambda x: clean.to(x))
    (white,) = [c for c in verify(copy, trust=True).cells if not c.agrees]
    assert any("linf is" in p and "not those of these examples" in p for p in white.problems)


def test_a_clean_image_that_is_none(copy: Path, whole: StoredRun) -> None:
    clean = next(r for r in whole.results if r.cell.attack == "none")
    found, label = load_examples(copy, clean.examples, 0)
    data, sealed = encode_examples(replace(found, x_adv=found.x_adv.flip(3)), label)
    examples_path(copy, clean.examples, 0).write_bytes(data)
    rows, mine = load_rows(copy, clean.key, 0)
    again, _ = encode_rows(rows, replace(mine, facts={**mine.facts, "examples": sealed.sha256}))
    rows_path(copy, clean.key, 0).write_bytes(again)
    checked = verify(copy, trust=True).cells[0]
    assert any("not the clean image" in p for p in checked.problems)


def test_a_result_that_was_changed(copy: Path) -> None:
    path = copy / "result.json"
    said = read_json(path)
    assert said is not None
    said["cells"][1]["accuracy"]["value"] = 0.99
    said["grade"] = "A+"
    write_json(path, said)
    found = verify(copy, trust=True)
    assert not found.agrees
    assert [("accuracy of cell 1 is 0.99" in p, "grade is 'A+'" in p) for p in found.problems] == [
        (True, False),
        (False, True),
    ]
    path.unlink()
    assert verify(copy, trust=True).problems == (f"{path} is missing",)


@pytest.mark.parametrize("part", ["samples", "examples"])
def test_a_truncated_file_is_named(copy: Path, part: str) -> None:
    path = sorted((copy / part).iterdir())[0]
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DataError, match=f"{path.name} is damaged"):
        verify(copy, trust=True)


def test_other_examples_than_those_that_were_judged(copy: Path) -> None:
    result = attacked(copy)
    found, label = load_examples(copy, result.examples, 0)
    data, _ = encode_examples(replace(found, x_adv=found.x_adv * 0.5), label)
    examples_path(copy, result.examples, 0).write_bytes(data)
    with pytest.raises(DataError, match="judges other examples than those beside it"):
        verify(copy, trust=True)


def test_other_data_and_other_weights(bench: Path, make: Make, tmp_path: Path) -> None:
    here = Path(shutil.copytree(bench, tmp_path / "bench"))
    cells = [replace(c, model=f"{here}/models.py:conv") for c in make().cells]
    run(RunSpec(cells=cells, data={"spec": f"{here}/data.npz"}), tmp_path / "run")
    text = (here / "models.py").read_text()
    (here / "models.py").write_text(text.replace("* 0.4", "* -0.4"))
    found = verify(tmp_path / "run", trust=True)
    assert not found.agrees
    assert any("is not byte for byte what the run had" in n for n in found.notes)
    (here / "models.py").write_text(text)
    held = dict(np.load(here / "data.npz"))
    held["x"][0] ^= 1
    np.savez(here / "data.npz", **held)
    with pytest.raises(DataError, match="are not those of"):
        verify(tmp_path / "run", trust=True)


class Tie(nn.Module):
    """Two logits of size 100, whose order hangs on a millionth."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = 100 + 0 * x.flatten(1).sum(1)
        return torch.stack([first, first - 1e-4, first - 50], 1)


def tie() -> tuple[Cell, Subject, Batch, Attacked, Rows]:
    cell, subject = Cell("none", "tie"), Subject(Tie())
    x, y = torch.full((3, 3, 4, 4), 0.5), torch.tensor([0, 0, 2])
    batch = Batch(x, y, torch.arange(3))
    found = Attacked(x, 0, 0, torch.full((3,), -1), torch.zeros(3, dtype=torch.float64))
    return cell, subject, batch, found, judge_shard(cell, subject, batch, found, 8)


def test_a_flip_at_a_near_tie_is_counted_and_explained() -> None:
    cell, subject, batch, found, rows = tie()
    stored = {name: v.copy() for name, v in rows.items()}
    for name in ("correct", "correct_even", "correct_odd", "correct_8bit", "correct_png"):
        stored[name][0] = 0
    stored["prediction"][0] = 1
    again = rejudge(cell, subject, batch, found, stored)
    assert again.flipped.tolist() == [True, False, False]
    assert again.explained.tolist() == [True, False, False]
    # Closed form: 1e-4 of 100 is a gap of 1e-6; float32 has seven digits.
    assert again.gaps[0] == pytest.approx(1e-6, rel=0.2)
    assert np.isnan(again.gaps[1:]).all()
    strict = rejudge(cell, subject, batch, found, stored, tolerance=1e-8)
    assert strict.explained.tolist() == [False, False, False]


def test_more_flips_than_near_ties_are_not_explained() -> None:
    cell, subject, batch, found, rows = tie()
    stored = {name: v.copy() for name, v in rows.items()}
    stored["correct"][2] = 5  # one draw was taken, one near tie cannot explain five outcomes
    again = rejudge(cell, subject, batch, found, stored)
    assert (again.flipped[2], again.explained[2]) == (True, False)


def test_fresh_draws_within_chance() -> None:
    # Closed form: n samples with d draws each of probability 1/2 have a mean whose difference from
    # the stored one has the standard error sqrt(n · 2 · 1/4 / d) / n.
    n, d = 100, 32
    stored = {"draws": np.full(n, d), "correct": np.full(n, d // 2)}
    same = compare_fresh(stored, np.full(n, 0.5))
    assert same.z == 0
    shifted = compare_fresh(stored, np.full(n, 0.6))
    p = (16 + 19.2 + 2) / 68
    assert shifted.z == pytest.approx(0.1 * n / np.sqrt(n * 2 * p * (1 - p) / d))
    assert not shifted.agrees
    fixed = {"draws": np.ones(3), "correct": np.array([1, 0, 1])}
    assert compare_fresh(fixed, np.array([1.0, 0.0, 1.0])).z == 0
    assert not compare_fresh(fixed, np.array([1.0, 0.0, 0.0])).agrees


def invoke(*arguments: object) -> tuple[int, str, str]:
    found = CliRunner().invoke(app, ["verify", *map(str, arguments)])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.exit_code, found.stdout, found.stderr


def test_the_command(copy: Path) -> None:
    code, out, _ = invoke(copy, "--trust", "--fresh")
    assert code == 0
    assert "The run agrees" in out
    assert out.count("agrees\n") == 2
    code, out, _ = invoke(copy, "--trust", "--json")
    told = json.loads(out)
    assert (code, told["agrees"], told["files"], len(told["cells"])) == (0, True, 12, 2)
    change_rows(copy, lambda rows: rows["correct"].__setitem__(slice(None), rows["draws"]))
    code, out, _ = invoke(copy, "--trust")
    assert code == 1
    assert "DISAGREES" in out
    assert "wrong" in out
    code, out, _ = invoke(copy, "--trust", "--json")
    assert (code, json.loads(out)["agrees"]) == (1, False)
    path = sorted((copy / "examples").iterdir())[-1]
    path.write_bytes(path.read_bytes()[:100])
    code, out, said = invoke(copy, "--trust", "--json")
    assert (code, out) == (2, "")
    assert path.name in said.replace("\n", "")
    assert "Traceback" not in said


def test_no_run_is_bad_input(tmp_path: Path) -> None:
    code, _, said = invoke(tmp_path / "nothing")
    assert code == 2
    assert "holds no run" in said
