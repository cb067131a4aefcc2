"""Units on disk: what the evaluation loop asks before it computes anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from feint.core.errors import DataError
from feint.evaluation.attackers import Attacked
from feint.evaluation.shard import Rows
from feint.store.codec import (
    Label,
    decode_examples,
    decode_rows,
    encode_examples,
    encode_rows,
)
from feint.store.files import read_bytes, write_atomic

__all__ = ["DiskCache", "examples_path", "load_examples", "load_rows", "rows_path"]


def rows_path(directory: Path, key: str, shard: int) -> Path:
    """Where a unit's rows are."""
    return directory / "samples" / f"{key}-{shard:05d}.parquet"


def examples_path(directory: Path, key: str, shard: int) -> Path:
    """Where a unit's adversarial examples are."""
    return directory / "examples" / f"{key}-{shard:05d}.safetensors"


def load_rows(directory: Path, key: str, shard: int) -> tuple[Rows, Label]:
    """A unit's rows, checked.

    Raises:
        DataError: The file is missing, damaged, or another unit's; starts with its path.
    """
    return _load(rows_path(directory, key, shard), decode_rows, key, shard)


def load_examples(directory: Path, key: str, shard: int) -> tuple[Attacked, Label]:
    """A unit's adversarial examples, checked; errors as for `load_rows`."""
    return _load(examples_path(directory, key, shard), decode_examples, key, shard)


def _load(
    path: Path, decode: Callable[[bytes], tuple[Any, Label]], key: str, shard: int
) -> tuple[Any, Label]:
    raw = read_bytes(path)
    if raw is None:
        raise DataError(f"{path} is missing")
    try:
        value, label = decode(raw)
    except DataError as error:
        raise DataError(f"{path} is {error}") from None
    if (label.key, label.shard) != (key, shard):
        raise DataError(f"{path} is damaged: it holds unit {label.key}-{label.shard:05d}")
    return value, label


@dataclass
class DiskCache:
    """The `Cache` of a run directory. Only files that are whole are ever given back.

    Rows carry the checksum of the examples that they judge: if those are gone or others, the rows
    do not count.

    Args:
        directory: The run's.
        examples_of: Addresses of examples by the addresses of cells.
        samples: How many there are in all.
        shard_size: Samples per unit.
        device: Where examples are wanted.
        known: Units, as (cell, shard), that were finished once: if one is missing, it is reported.
        on_begin: Called before a unit is computed.
        on_kept: Called with (cell, shard, seconds) when a unit's rows are on disk.
        on_damage: Called with a sentence about a file that is there no more, or not whole.
    """

    directory: Path
    examples_of: Mapping[str, str]
    samples: int
    shard_size: int
    device: torch.device | str = "cpu"
    known: Collection[tuple[str, int]] = ()
    on_begin: Callable[[], None] | None = None
    on_kept: Callable[[str, int, float], None] | None = None
    on_damage: Callable[[str], None] | None = None
    _labels: dict[tuple[str, int], Label] = field(default_factory=dict)
    """Of the examples that were seen whole."""
    _reported: set[str] = field(default_factory=set)
    _begun: dict[tuple[str, int], float] = field(default_factory=dict)

    def rows(self, key: str, shard: int) -> Rows | None:
        """See `feint.evaluation.evaluate.Cache`."""
        try:
            if not rows_path(self.directory, key, shard).exists():
                if (key, shard) in self.known:
                    self._report(f"{rows_path(self.directory, key, shard)} is missing")
            else:
                rows, label = load_rows(self.directory, key, shard)
                self._check_range(rows_path(self.directory, key, shard), label)
                if self._examples_label(key, shard).sha256 == label.facts["examples"]:
                    return rows
                raise DataError(
                    f"{rows_path(self.directory, key, shard)} judges other examples than those "
                    "beside it"
                )
        except DataError as error:
            self._report(str(error))
        self._begun[key, shard] = time.perf_counter()
        if self.on_begin:
            self.on_begin()
        return None

    def examples(self, key: str, shard: int) -> Attacked | None:
        """See `feint.evaluation.evaluate.Cache`."""
        path = examples_path(self.directory, key, shard)
        if not path.exists():
            return None
        try:
            found, label = load_examples(self.directory, key, shard)
            self._check_range(path, label)
        except DataError as error:
            self._report(str(error))
            return None
        self._labels[key, shard] = label
        return replace(found, x_adv=found.x_adv.to(self.device))

    def keep_examples(self, key: str, shard: int, found: Attacked) -> None:
        """See `feint.evaluation.evaluate.Cache`."""
        data, label = encode_examples(found, self._label("examples", key, shard))
        write_atomic(examples_path(self.directory, key, shard), data)
        self._labels[key, shard] = label

    def keep_rows(self, key: str, shard: int, rows: Rows) -> None:
        """See `feint.evaluation.evaluate.Cache`."""
        judged = self._labels[self.examples_of[key], shard]
        took = {name: judged.facts[name] for name in ("forwards", "backwards")}
        label = self._label("rows", key, shard, examples=judged.sha256, **took)
        data, _ = encode_rows(rows, label)
        write_atomic(rows_path(self.directory, key, shard), data)
        seconds = time.perf_counter() - self._begun.pop((key, shard), time.perf_counter())
        if self.on_kept:
            self.on_kept(key, shard, seconds)

    def passes(self, key: str, shard: int) -> tuple[int, int]:
        """Images that passed forward and backward to make a cell's examples in a shard."""
        facts = self._examples_label(key, shard).facts
        return facts["forwards"], facts["backwards"]

    def _examples_label(self, key: str, shard: int) -> Label:
        address = self.examples_of[key]
        if (address, shard) not in self._labels:
            _, label = load_examples(self.directory, address, shard)
            self._check_range(examples_path(self.directory, address, shard), label)
            self._labels[address, shard] = label
        return self._labels[address, shard]

    def _label(self, kind: str, key: str, shard: int, **facts: Any) -> Label:
        start = shard * self.shard_size
        return Label(kind, key, shard, start, min(start + self.shard_size, self.samples), facts)

    def _check_range(self, path: Path, label: Label) -> None:
        expected = self._label(label.kind, label.key, label.shard)
        if (label.start, label.stop) != (expected.start, expected.stop):
            raise DataError(
                f"{path} holds samples {label.start} to {label.stop - 1}, not {expected.start} to "
                f"{expected.stop - 1}"
            )

    def _report(self, sentence: str) -> None:
        if sentence not in self._reported:
            self._reported.add(sentence)
            if self.on_damage:
                self.on_damage(sentence)
