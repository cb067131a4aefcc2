"""Damaged files are told, never trusted, and repaired. Oracle: the digest of the whole run."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from feint.core.errors import DataError
from feint.evaluation.loop import Progress
from feint.store import RunSpec, StoredRun, open_run, run
from feint.store.cache import examples_path, rows_path

Make = Callable[..., RunSpec]


@pytest.fixture
def copy(whole: StoredRun, tmp_path: Path) -> Path:
    """A copy of the whole run, to be damaged."""
    return Path(shutil.copytree(whole.directory, tmp_path / "run"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) - 30] ^= 4
    path.write_bytes(raw)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def swap(path: Path) -> None:
    """Another unit's file under this one's name."""
    other = next(p for p in sorted(path.parent.iterdir()) if p != path)
    shutil.copy(other, path)


DAMAGE = [truncate, flip, empty, remove, swap]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", ["samples", "examples"])
def test_a_damaged_unit_is_told_by_readers_and_repaired_by_the_next_run(
    make: Make,
    whole: StoredRun,
    copy: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    damage: Callable[[Path], None],
) -> None:
    cell = whole.results[1]
    path = rows_path(copy, cell.key, 1)
    if kind == "examples":
        path = examples_path(copy, cell.examples, 1)
    damage(path)
    with pytest.raises(DataError, match=f"{path.name} is .*; to repair the run, resume it"):
        open_run(copy).verify()
    told: list[Progress] = []
    with caplog.at_level(logging.WARNING, "feint.store"):
        run(make(), copy, on_progress=told.append)
    assert path.name in caplog.text
    assert [p.done for p in told if not p.cached] == [17, 22]  # this unit alone, before and after
    repaired = open_run(copy)
    assert repaired.result_digest() == whole.result_digest()
    assert [path.name in note["text"] for note in repaired.info["notes"]] == [True]
    assert repaired.verify() == whole.verify()


def test_rows_of_other_examples_do_not_count(make: Make, whole: StoredRun, copy: Path) -> None:
    # Examples that are whole, but not those that the rows judge: of another seed.
    cell = whole.results[1]
    seeds = [{**c, "seed": 4} for c in make().full["cells"]]
    run(RunSpec(**{**make().full, "cells": seeds}), copy.parent / "other")
    other = open_run(copy.parent / "other")
    from feint.store.codec import Label, decode_examples, encode_examples

    raw = examples_path(other.directory, other.results[1].examples, 1).read_bytes()
    found, label = decode_examples(raw)
    forged = Label("examples", cell.examples, 1, label.start, label.stop, {})
    examples_path(copy, cell.examples, 1).write_bytes(encode_examples(found, forged)[0])
    with pytest.raises(DataError, match="judges other examples"):
        open_run(copy).verify()
    run(make(), copy)
    # The forged examples are whole by every sign, so they are judged anew, not made anew.
    again = open_run(copy)
    assert again.verify() == whole.verify()
    assert "judges other examples" in again.info["notes"][0]["text"]


@pytest.mark.parametrize("damage", [truncate, flip, empty])
def test_a_damaged_run_json_says_what_to_do(
    make: Make, whole: StoredRun, copy: Path, damage: Callable[[Path], None]
) -> None:
    damage(copy / "run.json")
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*.parquet")}
    for function in (lambda: run(make(), copy), lambda: open_run(copy)):
        with pytest.raises(DataError, match=r"run.json is damaged.*delete it and run the same"):
            function()
    (copy / "run.json").unlink()  # as told
    run(make(), copy)
    assert open_run(copy).result_digest() == whole.result_digest()
    assert before == {p: p.stat().st_mtime_ns for p in copy.rglob("*.parquet")}


def test_units_of_another_shard_size_do_not_count(make: Make, copy: Path) -> None:
    (copy / "run.json").unlink()
    run(make(shard_size=4), copy)
    stored = open_run(copy)
    assert [len(stored.examples(stored.results[1], n).x_adv) for n in range(3)] == [4, 4, 4]
    assert any("holds samples 0 to 4, not 0 to 3" in n["text"] for n in stored.info["notes"])


def test_a_run_of_another_format_is_told(make: Make, copy: Path) -> None:
    from feint.store.files import read_json, write_json

    info = read_json(copy / "run.json")
    assert info is not None
    write_json(copy / "run.json", {**info, "schema": 99})
    with pytest.raises(DataError, match="has format 99, this version of feint reads 1"):
        run(make(), copy)


@pytest.mark.parametrize("damage", [truncate, flip, remove])
def test_damaged_findings_are_made_again(
    make: Make, whole: StoredRun, copy: Path, damage: Callable[[Path], None]
) -> None:
    damage(copy / "findings.json")
    with pytest.raises(DataError, match=r"findings.json is .*to repair the run"):
        open_run(copy)
    run(make(), copy)
    assert open_run(copy).result_digest() == whole.result_digest()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_told_and_leaves_nothing_half_written(
    make: Make,
    whole: StoredRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
) -> None:
    real, calls = getattr(os, call), [0]

    def fails(*args: object) -> object:
        calls[0] += 1
        if calls[0] > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(DataError, match="the disk is full; free some space"):
        run(make(), tmp_path / "run")
    monkeypatch.undo()
    assert not list((tmp_path / "run").rglob("*.partial"))
    # Not even the status could be written: it reads like a killed run.
    assert open_run(tmp_path / "run", partial=True).status == "running"
    from feint.store import environment

    monkeypatch.setattr(environment, "git", lambda: None)
    run(make(), tmp_path / "run")
    stored = open_run(tmp_path / "run")
    assert stored.result_digest() == whole.result_digest()
    assert stored.info["notes"] == []


def test_an_output_folder_below_a_file_is_told(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="a part of this path is a file; give another folder"):
        run(make(), tmp_path / "file" / "run")
    with pytest.raises(DataError, match="a part of this path is a file"):
        open_run(tmp_path / "file" / "run")
