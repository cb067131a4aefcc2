"""Rows as Parquet, examples as safetensors: bytes that know whether they are what was written."""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from feint.core.errors import ConfigError, DataError
from feint.core.quantise import from_uint8, to_uint8
from feint.evaluation.attackers import Attacked
from feint.evaluation.shard import COLUMNS, Rows
from feint.store.spec import SCHEMA

__all__ = ["TYPES", "Label", "decode_examples", "decode_rows", "encode_examples", "encode_rows"]

_WHOLE = ("index", "label", "target", "draws", "correct", "correct_8bit", "target_hits")
_INTEGERS = (*_WHOLE, "prediction", "first_hit")
_EFFORT = ("rounds", "queries", "gradients")
"""What examples hold since a later version, and may not know."""
_LATER = tuple(COLUMNS)[tuple(COLUMNS).index("correct_png") :]
"""Columns that rows hold since a later version: NaN in earlier ones."""

TYPES = {
    name: "bool" if name == "unchanged" else "int64" if name in _INTEGERS else "float64"
    for name in COLUMNS
}
"""The type of every column of a shard."""


_MARK = b"sha256-of-this-file:"
_BLANK = b"0" * 64
_BARE = (_MARK + _BLANK).decode()
"""What a label's text begins with: in one entry, since safetensors keeps no order of entries."""


def _seal(data: bytes) -> bytes:
    """Put the checksum of a whole file in the place that was left blank for it."""
    place = data.index(_MARK + _BLANK) + len(_MARK)
    checksum = hashlib.sha256(data).hexdigest().encode()
    return data[:place] + checksum + data[place + len(_BLANK) :]


def _check_seal(data: bytes) -> None:
    """Raise ValueError if a single bit differs from what `_seal` gave; nothing is parsed before."""
    place = data.find(_MARK) + len(_MARK)
    checksum = data[place : place + len(_BLANK)]
    sha = hashlib.sha256(data[:place])
    sha.update(_BLANK)
    sha.update(memoryview(data)[place + len(_BLANK) :])
    if place < len(_MARK) or sha.hexdigest().encode() != checksum:
        raise ValueError("it is truncated or altered: it does not match its checksum")


@dataclass(frozen=True)
class Label:
    """What a file says of itself."""

    kind: str
    key: str
    shard: int
    start: int
    stop: int
    facts: Mapping[str, Any]
    """`forwards` and `backwards`: images that passed through the model to make the examples. For
    rows also the checksum of the `examples` that were judged; for examples the `dtype`."""
    sha256: str = ""
    """Over everything above and the content: equal for equal results, whatever wrote the file."""

    def text(self) -> str:
        """Canonical JSON."""
        whole = {"schema": SCHEMA, **vars(self), "facts": dict(self.facts)}
        return json.dumps(whole, sort_keys=True, separators=(",", ":"))

    def sealed(self, arrays: Mapping[str, np.ndarray]) -> Label:
        """This label with the checksum of itself and the arrays."""
        bare = Label(**{**vars(self), "sha256": ""})
        sha = hashlib.sha256(bare.text().encode())
        for name, value in arrays.items():
            sha.update(f"{name} {value.dtype} {value.shape}".encode())
            sha.update(np.ascontiguousarray(value).tobytes())
        return Label(**{**vars(bare), "sha256": sha.hexdigest()})

    @staticmethod
    def parse(text: str) -> Label:
        """What `text` gave, behind the checksum of the file."""
        fields = json.loads(text[len(_BARE) :])
        if fields.pop("schema") != SCHEMA:
            raise ValueError("it was written by another version of the format")
        return Label(**fields)

    def check(self, kind: str, arrays: Mapping[str, np.ndarray], rows: int) -> None:
        """Raise ValueError unless this is the label of these arrays."""
        if self.kind != kind:
            raise ValueError(f"it holds {self.kind}, not {kind}")
        if self.sealed(arrays).sha256 != self.sha256:
            raise ValueError("its content does not match its checksum")
        if rows != self.stop - self.start:
            raise ValueError(f"it holds {rows} samples, not {self.stop - self.start}")


def encode_rows(rows: Rows, label: Label) -> tuple[bytes, Label]:
    """A shard's rows as a Parquet file, and the sealed label.

    Raises:
        ConfigError: The rows are not those of `feint.evaluation.shard.COLUMNS`.
    """
    found = {name: str(value.dtype) for name, value in rows.items()}
    if found != TYPES or list(found) != list(TYPES):
        raise ConfigError(f"rows have the columns {found}; expected {TYPES}")
    sealed = label.sealed(rows)
    schema = pa.schema(
        [(name, pa.type_for_alias(kind)) for name, kind in TYPES.items()],
        metadata={"feint": _BARE + sealed.text()},
    )
    table = pa.table({name: pa.array(value) for name, value in rows.items()}, schema=schema)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return _seal(buffer.getvalue()), sealed


def decode_rows(data: bytes) -> tuple[Rows, Label]:
    """Rows and label of a Parquet file.

    Raises:
        DataError: The file is truncated, altered, or of another kind or version.
    """
    try:
        _check_seal(data)
        table = pq.read_table(pa.BufferReader(data), use_threads=False)
        label = Label.parse(table.schema.metadata[b"feint"].decode())
        rows = {
            name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names
        }
        earlier = not any(name in rows for name in _LATER)
        wanted = {n: t for n, t in TYPES.items() if not (earlier and n in _LATER)}
        if {name: str(value.dtype) for name, value in rows.items()} != wanted:
            raise ValueError("it has other columns than this version writes")
        label.check("rows", rows, table.num_rows)
        if earlier:
            rows |= {name: np.full(table.num_rows, np.nan) for name in _LATER}
    except Exception as error:  # a damaged file can make its reader raise anything
        raise DataError(f"damaged: {_reason(error)}") from None
    return rows, label


def encode_examples(found: Attacked, label: Label) -> tuple[bytes, Label]:
    """A shard's adversarial examples as a safetensors file, bit by bit, and the sealed label.

    Convention:
        `x_adv` keeps its dtype; images that are exactly n/255 (clean ones) are kept as uint8.
    """
    x = found.x_adv.detach().cpu().contiguous()
    narrow = to_uint8(x)
    exact = torch.equal(from_uint8(narrow, x.dtype), x)
    tensors = {
        "first_hit": found.first_hit.cpu().contiguous(),
        "late_gain": found.late_gain.cpu().contiguous(),
        "x_adv": narrow if exact else x,
    }
    known = {name: getattr(found, name) for name in _EFFORT}
    tensors |= {n: value.cpu().contiguous() for n, value in known.items() if value is not None}
    facts = {
        "forwards": found.forwards,
        "backwards": found.backwards,
        "dtype": str(x.dtype).removeprefix("torch."),
    }
    sealed = Label(**{**vars(label), "facts": facts}).sealed(_arrays(tensors))
    return _seal(save_tensors(tensors, {"feint": _BARE + sealed.text()})), sealed


def decode_examples(data: bytes) -> tuple[Attacked, Label]:
    """Examples and label of a safetensors file, on the CPU.

    Raises:
        DataError: The file is truncated, altered, or of another kind or version.
    """
    try:
        _check_seal(data)
        (size,) = struct.unpack_from("<Q", data)
        label = Label.parse(json.loads(data[8 : 8 + size])["__metadata__"]["feint"])
        tensors = load_tensors(data)
        label.check("examples", _arrays(tensors), len(tensors["x_adv"]))
        x = tensors["x_adv"]
        if x.dtype == torch.uint8:
            x = from_uint8(x, getattr(torch, label.facts["dtype"]))
        found = Attacked(
            x,
            label.facts["forwards"],
            label.facts["backwards"],
            tensors["first_hit"],
            tensors["late_gain"],
            *(tensors.get(name) for name in _EFFORT),
        )
    except Exception as error:  # a damaged file can make its reader raise anything
        raise DataError(f"damaged: {_reason(error)}") from None
    return found, label


def _arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensors[name].numpy() for name in sorted(tensors)}


def _reason(error: Exception) -> str:
    text = str(error).partition("\n")[0]
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"
