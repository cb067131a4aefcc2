"""Rows and examples as bytes. Oracle: bit-equality with what went in, and injected damage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load

from feint.core import random
from feint.core.errors import ConfigError, DataError
from feint.evaluation.attackers import Attacked
from feint.evaluation.shard import COLUMNS, Rows
from feint.store.codec import (
    TYPES,
    Label,
    decode_examples,
    decode_rows,
    encode_examples,
    encode_rows,
)

N = 4


def make_rows() -> Rows:
    words = random.uniform(random.keys(0, len(COLUMNS)), (N,), dtype=torch.float64).numpy()
    rows = {name: (9 * w).astype(TYPES[name]) for name, w in zip(COLUMNS, words, strict=True)}
    rows["relative_l2"][0] = np.nan
    return rows


def make_examples(dtype: torch.dtype = torch.float32) -> Attacked:
    x = random.uniform(random.keys(1, N), (3, 2, 2), dtype=dtype)
    gain = random.uniform(random.keys(2, N), (), dtype=torch.float64)
    return Attacked(x, 7, 5, torch.tensor([0, 3, -1, 2]), gain)


def label(kind: str, **facts: object) -> Label:
    return Label(kind, "key", 2, 2 * N, 3 * N, facts)


def test_types_name_every_column_and_no_other() -> None:
    assert list(TYPES) == list(COLUMNS)


def test_rows_come_back_bit_by_bit() -> None:
    rows = make_rows()
    data, sealed = encode_rows(rows, label("rows", examples="e"))
    back, found = decode_rows(data)
    assert found == sealed
    assert (found.key, found.shard, found.facts) == ("key", 2, {"examples": "e"})
    for name in COLUMNS:
        assert back[name].dtype == rows[name].dtype
        assert back[name].tobytes() == rows[name].tobytes()


def test_rows_are_plain_parquet(tmp_path) -> None:
    # Oracle: pyarrow's own reader, which knows nothing of this library.
    data, _ = encode_rows(make_rows(), label("rows"))
    (tmp_path / "rows.parquet").write_bytes(data)
    table = pq.read_table(tmp_path / "rows.parquet")
    assert table.column("first_hit").to_pylist() == make_rows()["first_hit"].tolist()


def test_effort_comes_back_where_it_is_known() -> None:
    known = make_examples()
    effort = torch.arange(4.0).double()
    known = replace(known, queries=effort, rounds=effort + 1)
    back, _ = decode_examples(encode_examples(known, label("examples"))[0])
    assert torch.equal(back.queries, known.queries)
    assert torch.equal(back.rounds, known.rounds)
    assert back.gradients is None


def test_rows_of_an_earlier_version_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written as it did, without the later columns: these are NaN, the others what they were."""
    first = list(TYPES)[: list(TYPES).index("correct_png")]
    rows = {name: value for name, value in make_rows().items() if name in first}
    with monkeypatch.context() as earlier:
        earlier.setattr("feint.store.codec.TYPES", {name: TYPES[name] for name in first})
        data, _ = encode_rows(rows, label("rows"))
    back, _ = decode_rows(data)
    assert list(back) == list(TYPES)
    for name in TYPES:
        if name in first:
            assert back[name].tobytes() == rows[name].tobytes()
        else:
            assert np.isnan(back[name]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_examples_come_back_bit_by_bit(dtype: torch.dtype) -> None:
    found = make_examples(dtype)
    data, sealed = encode_examples(found, label("examples"))
    back, read = decode_examples(data)
    assert read == sealed
    assert back.x_adv.dtype == dtype
    assert torch.equal(back.x_adv, found.x_adv)
    assert torch.equal(back.first_hit, found.first_hit)
    assert torch.equal(back.late_gain, found.late_gain)
    assert (back.forwards, back.backwards) == (7, 5)
    assert torch.equal(load(data)["x_adv"], found.x_adv)  # by safetensors' own reader


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_8_bit_images_are_kept_in_8_bits_and_come_back_bit_by_bit(dtype: torch.dtype) -> None:
    x = torch.arange(256).view(4, 1, 8, 8).to(dtype) / 255
    found = Attacked(x, 0, 0, torch.zeros(4, dtype=torch.int64), torch.zeros(4))
    data, _ = encode_examples(found, label("examples"))
    assert load(data)["x_adv"].dtype == torch.uint8
    assert torch.equal(decode_examples(data)[0].x_adv, x)


def test_the_same_content_gives_the_same_bytes() -> None:
    assert encode_rows(make_rows(), label("rows"))[0] == encode_rows(make_rows(), label("rows"))[0]
    first = encode_examples(make_examples(), label("examples"))[0]
    assert first == encode_examples(make_examples(), label("examples"))[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.pop("rms"),
        lambda rows: rows.update(more=rows["rms"]),
        lambda rows: rows.update(rms=rows["rms"].astype(np.float32)),
        lambda rows: rows.update(index=rows.pop("index")),
    ],
    ids=["missing", "more", "dtype", "order"],
)
def test_other_columns_are_refused(change: Callable[[Rows], object]) -> None:
    rows = make_rows()
    change(rows)
    with pytest.raises(ConfigError, match="rows have the columns"):
        encode_rows(rows, label("rows"))


def both() -> list[tuple[bytes, Callable[[bytes], object]]]:
    return [
        (encode_rows(make_rows(), label("rows"))[0], decode_rows),
        (encode_examples(make_examples(), label("examples"))[0], decode_examples),
    ]


@pytest.mark.parametrize("which", [0, 1], ids=["rows", "examples"])
def test_a_truncated_file_is_told(which: int) -> None:
    data, decode = both()[which]
    for size in [*range(0, len(data), max(1, len(data) // 40)), len(data) - 1]:
        with pytest.raises(DataError, match="damaged"):
            decode(data[:size])


@pytest.mark.parametrize("which", [0, 1], ids=["rows", "examples"])
def test_every_flipped_bit_is_told(which: int) -> None:
    data, decode = both()[which]
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        with pytest.raises(DataError, match="damaged"):
            decode(bytes(flipped))


@pytest.mark.parametrize("which", [0, 1], ids=["rows", "examples"])
def test_a_file_without_seal_is_told(which: int) -> None:
    data, decode = both()[which]
    for raw in (data.replace(b"sha256-of-this-file:", b"sha256-of-what-ever:"), data + b" ", b" "):
        with pytest.raises(DataError, match="does not match its checksum"):
            decode(raw)


def test_another_kind_or_version_is_told() -> None:
    rows, examples = both()
    with pytest.raises(DataError, match="damaged"):
        decode_rows(examples[0])
    with pytest.raises(DataError, match="damaged"):
        decode_examples(rows[0])
    mislabelled, _ = encode_rows(make_rows(), label("examples"))
    with pytest.raises(DataError, match="holds examples, not rows"):
        decode_rows(mislabelled)
    text = (
        "sha256-of-this-file:" + 64 * "0" + label("rows").text().replace('"schema":1', '"schema":9')
    )
    with pytest.raises(ValueError, match="another version"):
        Label.parse(text)
    short, _ = encode_rows(make_rows(), Label("rows", "key", 0, 0, N + 1, {}))
    with pytest.raises(DataError, match=f"holds {N} samples, not {N + 1}"):
        decode_rows(short)
