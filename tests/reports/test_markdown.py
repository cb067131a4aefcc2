"""The Markdown table, read back. Oracle: GitHub's rules for tables, and the fakes' numbers."""

from __future__ import annotations

import re
from pathlib import Path

from feint.evaluation import Cell
from feint.reports.markdown import markdown, write
from tests.reports.fakes import cell_result, small_data, story_data


def parsed(text: str) -> list[list[str]]:
    """Cells of a table: split at bars that are not escaped, escapes taken away."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [[re.sub(r"\\(.)", r"\1", c) for c in row] for row in rows]


def test_round_trip() -> None:
    data = story_data()
    head, rule, *rows = parsed(markdown(data))
    assert len({len(r) for r in (head, rule, *rows)}) == 1
    assert all(re.fullmatch(r"---:?", c) for c in rule)
    ordered = [(k, r) for k, group in data.pipelines().items() for r in group]
    assert len(rows) == len(ordered)
    for row, ((model, defense, _, _), result) in zip(rows, ordered, strict=True):
        cells = dict(zip(head, row, strict=True))
        assert cells["model + defense"] == model + ("" if defense == "none" else f" + {defense}")
        assert cells["scenario"] == result.cell.scenario
        low, high = map(float, cells["95 %"].split("–"))
        rate = result.accuracy
        assert float(cells["accuracy %"]) == round(100 * rate.value, 1)
        assert (low, high) == (round(100 * rate.low, 1), round(100 * rate.high, 1))
        draws = " × 32" if result.draws > 1 else ""
        assert cells["n"] == f"200{draws}"
    assert [row[head.index("published")] for row in rows].count("87.0¹") == 1


def test_bars_and_marks_are_escaped() -> None:
    name = "a|b*c*`d`<e>\\f_g_"
    text = markdown(small_data([cell_result(Cell("none", model=name), 0.5)]))
    assert parsed(text)[2][0] == name
    assert "<e>" not in text.replace("\\<e\\>", "")


def test_notes_and_verdict_follow() -> None:
    text = markdown(story_data())
    assert "1. Published: 98.3 % of clean accuracy, ACE, Table 3" in text
    assert "**Grade B.**" in text
    assert text == markdown(story_data())


def test_write(tmp_path: Path) -> None:
    path = write(story_data(), tmp_path / "table.md")
    assert path.read_text(encoding="utf-8") == markdown(story_data())
