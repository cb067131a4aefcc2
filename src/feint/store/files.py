"""Files that are whole or not there: atomic writes, checked JSON, one process per directory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from feint.core.errors import DataError
from feint.evaluation.cell import digest

__all__ = ["claim", "read_bytes", "read_json", "sweep", "write_atomic", "write_json"]

LOCK = ".lock"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def _failed(path: Path, error: OSError) -> DataError:
    """What the operating system refused, and what to do about it."""
    if error.errno in _FULL:
        fix = "free some space and run the same command again: finished units are kept"
        return DataError(f"cannot write {path}: the disk is full; {fix}")
    if error.errno in _FORBIDDEN:
        return DataError(f"cannot write {path}: it is read-only; give a folder that can be written")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return DataError(f"cannot write {path}: a part of this path is a file; give another folder")
    return DataError(f"cannot write {path}: {error.strerror or error}; give another folder")


def _host() -> str:
    return "".join(c if c.isalnum() else "-" for c in socket.gethostname())


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees all of it or what was there before, even after a crash.

    Raises:
        DataError: It cannot be written; then nothing of it is left.
    """
    partial = path.with_name(f".{path.name}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    try:
        try:
            path.parent.mkdir(exist_ok=True)
            with partial.open("wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(partial, path)  # noqa: PTH105  (Path.replace does the same, one name less)
            _sync(path.parent)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
    except OSError as error:
        raise _failed(path, error) from None


def _sync(folder: Path) -> None:
    """Bring a rename to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove what processes of this machine that are no more left unfinished, here and below."""
    for partial in folder.rglob(".*.partial"):
        host, number = partial.name.split(".")[-4:-2]
        if host != _host():
            continue
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            with suppress(OSError):
                partial.unlink()
        except (OSError, ValueError):
            continue


def read_bytes(path: Path) -> bytes | None:
    """A file's bytes, or None if there is no such file.

    Raises:
        DataError: It is there and cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise DataError(f"{path}: a part of this path is a file") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Plain data with a checksum of itself, atomically."""
    whole = {**value, "sha256": digest(value)}
    write_atomic(path, (json.dumps(whole, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` wrote, or None if there is no such file.

    Raises:
        DataError: The file is damaged: no JSON, or not what its checksum says.
    """
    raw = read_bytes(path)
    if raw is None:
        return None
    try:
        value = json.loads(raw)
        found = value.pop("sha256")
        whole = found == digest(value)
    except (ValueError, KeyError, AttributeError, TypeError):
        raise DataError(f"{path} is damaged: it is no JSON object with a checksum") from None
    if not whole:
        raise DataError(f"{path} is damaged or was edited: its content does not match its checksum")
    return dict(value)


@contextmanager
def claim(directory: Path) -> Iterator[None]:
    """Make a directory and hold it for this process alone; leave no empty one behind.

    Raises:
        DataError: It cannot be written, or another process holds it.
    """
    missing = [p for p in (directory, *directory.parents) if not p.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _failed(directory, error) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(
                f"{directory} is in use by another process; wait for it, or give another folder"
            ) from None
        sweep(directory)
        try:
            yield
        finally:
            if missing and [p.name for p in directory.iterdir()] == [LOCK]:  # nothing came of it
                with suppress(OSError):
                    (directory / LOCK).unlink()
                    for made in missing:
                        made.rmdir()
    finally:
        os.close(handle)
