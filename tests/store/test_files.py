"""Files are whole or not there. Oracle: the file system after an injected failure."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from feint.core.errors import DataError
from feint.store.files import claim, read_json, sweep, write_atomic, write_json


def raiser(number: int):
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "disk is full; free some space"),
        (errno.EDQUOT, "disk is full"),
        (errno.EROFS, "read-only; give a folder that can be written"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, message: str
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    monkeypatch.setattr(os, call, raiser(number))
    with pytest.raises(DataError, match=message):
        write_atomic(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_sweep_removes_what_dead_processes_left_and_nothing_else(tmp_path: Path) -> None:
    dead = os.spawnlp(os.P_NOWAIT, "true", "true")
    os.waitpid(dead, 0)
    host = "".join(c if c.isalnum() else "-" for c in os.uname().nodename)
    for name in (f".a.{host}.{dead}.00.partial", f".a.{host}.{os.getpid()}.00.partial"):
        (tmp_path / name).touch()
    (tmp_path / f".a.elsewhere.{dead}.00.partial").touch()
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / f".a.{host}.{dead}.00.partial").touch()
    sweep(tmp_path)
    left = sorted(p.name for p in tmp_path.rglob("*.partial"))
    assert left == [f".a.elsewhere.{dead}.00.partial", f".a.{host}.{os.getpid()}.00.partial"]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b'{"a": 2, "sha256": "0"}', b"\xff"])
def test_damaged_json_is_told(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    assert read_json(path) == {"a": 1}
    path.write_bytes(damage)
    with pytest.raises(DataError, match=r"x\.json is damaged"):
        read_json(path)


def test_every_changed_byte_of_a_json_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": [1, "two", None]})
    raw = path.read_bytes()
    for place in range(len(raw)):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        try:
            assert read_json(path) == {"a": [1, "two", None]}  # white space
        except DataError:
            continue


def test_one_process_at_a_time(tmp_path: Path) -> None:
    # Two open files are two owners to flock, in one process as in two.
    with (
        claim(tmp_path / "run"),
        pytest.raises(DataError, match="in use by another process"),
        claim(tmp_path / "run"),
    ):
        pass
    with claim(tmp_path / "run"):
        pass


def test_a_directory_of_which_nothing_came_is_removed(tmp_path: Path) -> None:
    with pytest.raises(KeyError), claim(tmp_path / "a" / "b"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with claim(tmp_path / "a" / "b"):
        write_atomic(tmp_path / "a" / "b" / "file", b"")
    assert (tmp_path / "a" / "b" / "file").exists()


def test_a_path_below_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(DataError, match="a part of this path is a file"), claim(directory):
            pass


def test_a_read_only_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", raiser(errno.EACCES))
    with pytest.raises(DataError, match="read-only; give a folder"), claim(tmp_path):
        pass
