"""Images in files: a folder per class, or a CSV list."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from feint.core.errors import DataError, UnknownNameError
from feint.data.dataset import Dataset
from feint.data.images import SUFFIXES
from feint.data.sources import FileSource

__all__ = ["image_folder", "image_list"]

_LIMIT = 1 << 31  # labels beyond this are surely no class indices


def image_folder(folder: str | Path, name: str) -> Dataset:
    """DIR/CLASS/IMAGE: one folder per class; deeper folders belong to their class.

    Convention:
        Classes are numbered in the order of their names, except where every name is a number:
        then the number is the label. Samples go by class folder and path; `index` is the place in
        this order. Names that begin with a dot and files that are no images by name are passed
        over. An empty class folder keeps its number.

    Raises:
        DataError: No such folder, no class folders, or no image in them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; expected one with a folder of images per class")
    found = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not found:
        raise DataError(
            f"{folder} has no class folders; expected DIR/CLASS/IMAGE; "
            "for a flat folder write a list with the columns file,label and give NAME.csv"
        )
    numbered = all(re.fullmatch(r"[0-9]{1,9}", p.name) for p in found)
    labels, paths = [], []
    for number, kind in enumerate(found):
        inside = sorted(
            (p for p in kind.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()),
            key=lambda p: p.relative_to(folder).as_posix(),
        )
        inside = [p for p in inside if not _hidden(p.relative_to(folder))]
        paths += inside
        labels += [int(kind.name) if numbered else number] * len(inside)
    if not paths:
        raise DataError(
            f"{folder} has {len(found)} class folders and no image in them; "
            f"expected files ending in {', '.join(SUFFIXES)}"
        )
    return Dataset(
        name=name,
        source=FileSource(paths, [str(p) for p in paths]),
        positions=tuple(range(len(paths))),
        index=torch.arange(len(paths)),
        labels=torch.tensor(labels),
        classes=None if numbered else tuple(p.name for p in found),
    )


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def image_list(path: str | Path, name: str) -> Dataset:
    """A CSV file with a header and the columns `file`, `label` and, if wanted, `target`.

    Convention:
        A relative `file` is looked for beside the CSV, then in the folder `images` beside it; the
        first that exists counts. Further columns are left alone. `index` is the place of the row,
        counted from 0. A file may be listed twice.

    Raises:
        DataError: The list cannot be read, is empty, lacks a column, or has a row whose file is
            missing or whose label is no class index; the message names the line.
    """
    path = Path(path)
    files: list[Path] = []
    names: list[str] = []
    labels: list[int] = []
    targets: list[int] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            rows = csv.DictReader(handle, strict=True)
            columns = _columns(path, rows.fieldnames or [])
            for row in rows:
                where = f"{path} line {rows.line_num}"
                files.append(_file(path.parent, row, where))
                names.append(f"{files[-1]} ({path.name} line {rows.line_num})")
                labels.append(_class(row, "label", where))
                if "target" in columns:
                    targets.append(_class(row, "target", where))
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text; expected a CSV with file,label") from None
    except csv.Error as error:
        raise DataError(f"{path} is no readable CSV ({error}); expected file,label") from None
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if not files:
        raise DataError(f"{path} has a header but no rows; expected one row per image")
    return Dataset(
        name=name,
        source=FileSource(files, names),
        positions=tuple(range(len(files))),
        index=torch.arange(len(files)),
        labels=torch.tensor(labels),
        targets=torch.tensor(targets) if targets else None,
    )


def _columns(path: Path, columns: object) -> list[str]:
    found = [str(c) for c in columns] if isinstance(columns, list | tuple) else []
    if not found:
        raise DataError(f"{path} is empty; expected a header with the columns file,label")
    for column in ("file", "label"):
        if column not in found:
            hint = str(UnknownNameError("column", column, found)).partition("; ")[2]
            raise DataError(
                f"{path} has no column {column!r} ({hint}); expected the header file,label[,target]"
            )
    return found


def _file(folder: Path, row: Mapping[str, str | None], where: str) -> Path:
    text = row.get("file") or ""
    if not text.strip():
        raise DataError(f"{where}: the column file is empty; expected the name of an image")
    tried = [folder / text, folder / "images" / text]
    try:
        for path in tried:
            if path.is_file():
                return path
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: {text!r} is no file name ({error})") from None
    raise DataError(
        f"{where}: there is no file {text!r} beside the list nor in its folder 'images'; "
        "put it there, or remove the row"
    )


def _class(row: Mapping[str, str | None], column: str, where: str) -> int:
    text = (row.get(column) or "").strip()
    if re.fullmatch(r"[0-9]{1,10}", text) and int(text) < _LIMIT:
        return int(text)
    raise DataError(
        f"{where}: {column} is {text!r}; expected a class index, an integer from 0"
        + ("; leave the column out if there are no targets" if column == "target" else "")
    )
