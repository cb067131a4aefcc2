"""What metrics work with beside cells: models, data and defenses by spec, and a memory on disk."""

from __future__ import annotations

import io
import json
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from pydantic import ValidationError
from torch import Tensor, nn

from feint import data, models
from feint.core.errors import ConfigError
from feint.data import Dataset
from feint.defenses import Defense, parse
from feint.diagnostics.numbers import Measured, Number
from feint.evaluation import Pipeline
from feint.evaluation.cell import digest
from feint.models import Loaded
from feint.store import DataSpec
from feint.store.files import read_bytes, write_atomic

__all__ = ["Lab", "data_spec", "short_spec"]

VERSION = 1
"""Raise when a measure changes what it gives: what the memory holds is then measured anew."""


@dataclass
class Lab:
    """Models and data of a reproduction, each loaded once.

    Attributes:
        folder: Where what was measured is kept.
        data: The samples, unless a point names others.
        device: Where models are.
        batch_size: Images per pass.
        trust: Open pickles.
        download: Fetch weights.
    """

    folder: Path
    data: DataSpec
    device: str = "cpu"
    batch_size: int = 64
    trust: bool = False
    download: bool = False
    seed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """What each measure took that was asked for, without those within it; from memory, too."""
    _models: dict[str, Loaded] = field(default_factory=dict)
    _data: dict[str, Dataset] = field(default_factory=dict)
    _within: float = 0.0

    def loaded(self, spec: str) -> Loaded:
        """A model with what is known of it."""
        if spec not in self._models:
            self._models[spec] = models.resolve(
                spec,
                device=self.device,
                trust=self.trust,
                download=self.download,
                channels_last=True,
            )
        return self._models[spec]

    def model(self, spec: str) -> nn.Module:
        """A model."""
        return self.loaded(spec).model

    def defense(self, expression: str) -> Defense | None:
        """A defense; None for `none`."""
        chain = parse(expression)
        return None if str(chain) == "none" else chain.to(self.device)

    def pipeline(self, fields: Mapping[str, Any]) -> Pipeline:
        """The deployed classifier of a point."""
        return Pipeline(self.model(str(fields["model"])), self.defense(_defense(fields)))

    def data_of(self, fields: Mapping[str, Any]) -> DataSpec:
        """Which samples a point is of: the lab's, with what its field `data` changes."""
        own = fields.get("data")
        return data_spec({**self.data.model_dump(), **own}) if own else self.data

    def dataset(self, fields: Mapping[str, Any] | None = None) -> Dataset:
        """The samples of a point."""
        wanted = self.data_of(fields or {})
        key = wanted.model_dump_json()
        if key not in self._data:
            given = wanted.model_dump()
            self._data[key] = data.load(given.pop("spec"), **given)
        return self._data[key]

    def images(self, fields: Mapping[str, Any] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """All samples of a point: images in [0, 1], labels, indices."""
        found = self.dataset(fields)
        batch = next(found.batches(len(found)))
        return batch.x.to(self.device), batch.y.to(self.device), batch.index.to(self.device)

    def keep(
        self,
        name: str,
        fields: Mapping[str, Any],
        used: tuple[str, ...],
        make: Callable[[], Measured],
    ) -> Measured:
        """What `make` gives, from the memory if it was made of the same things before.

        The memories of recipes beside this one count, too: a figure of hits and one of accuracies
        are drawn from the same rounds.

        Args:
            name: Of the measure.
            fields: Of the point.
            used: Which fields the measure depends on, beside its data; those that name models
                count by the models' fingerprints.
            make: Measures.
        """
        content: dict[str, Any] = {"version": VERSION, "measure": name, "seed": self.seed}
        content["data"] = self.dataset(fields).fingerprint
        for key in used:
            value = fields.get(key)
            if key == "model":
                value = self.loaded(str(value)).fingerprint
            elif key == "models":
                value = {k: self.loaded(str(v)).fingerprint for k, v in dict(value or {}).items()}
            content[key] = value
        key = digest(content)
        path = self.folder / "measures" / f"{key}.npz"
        for known in (path, *sorted(self.folder.parent.glob(f"*/measures/{path.name}"))):
            raw = read_bytes(known)
            if raw is None:
                continue
            try:
                found, seconds = _decode(raw)
            except (ValueError, KeyError, TypeError, OSError, EOFError, BadZipFile, zlib.error):
                continue  # a damaged file is measured again
            self.seconds.update(seconds)
            return found
        found, seconds = self._timed(key, make)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, _encode(found, seconds))
        return found

    def _timed(self, key: str, make: Callable[[], Measured]) -> tuple[Measured, dict[str, float]]:
        """What `make` gives, and the seconds of it and of every measure within it."""
        (outer, self.seconds), (before, self._within) = (self.seconds, {}), (self._within, 0.0)
        begun = time.perf_counter()
        try:
            found = make()
        finally:
            whole = time.perf_counter() - begun
            seconds = {**self.seconds, key: whole - self._within}
            self.seconds, self._within = {**outer, **seconds}, before + whole
        return found, seconds


def data_spec(wanted: Mapping[str, Any]) -> DataSpec:
    """Which samples, from fields as people write them.

    Raises:
        ConfigError: A field that is none, or that has no such value.
    """
    try:
        return DataSpec(**wanted)
    except ValidationError as error:
        told = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"data: {'; '.join(told)}") from None


def short_spec(spec: str) -> str:
    """A spec of a model or of data without the folders of this machine."""
    front, bar, last = spec.rpartition("|")
    if bar:  # a defense as part of the model
        return f"{front.strip()} | {short_spec(last.strip())}"
    if spec.startswith("bf16:"):
        return f"bf16:{short_spec(spec.removeprefix('bf16:'))}"
    return spec if spec.startswith(("bundled:", "trained:")) else spec.rpartition("/")[2]


def _defense(fields: Mapping[str, Any]) -> str:
    return str(fields.get("defense", "none"))


def _encode(found: Measured, seconds: Mapping[str, float]) -> bytes:
    numbers = {k: [v.value, v.n, v.low, v.high] for k, v in found.numbers.items()}
    arrays: dict[str, Any] = {f"a:{k}": v for k, v in found.arrays.items()}
    file = io.BytesIO()
    np.savez_compressed(file, __numbers__=_text(numbers), __seconds__=_text(seconds), **arrays)
    return file.getvalue()


def _text(value: object) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _decode(raw: bytes) -> tuple[Measured, dict[str, float]]:
    with np.load(io.BytesIO(raw), allow_pickle=False) as archive:
        numbers = json.loads(archive["__numbers__"].tobytes().decode())
        arrays = {k[2:]: archive[k] for k in archive.files if k.startswith("a:")}
        seconds = json.loads(archive["__seconds__"].tobytes().decode())
    return Measured(arrays, {k: Number(*v) for k, v in numbers.items()}), seconds
