"""The terminal. Oracles: the widths of terminals, the shell's splitting, the fakes' numbers."""

from __future__ import annotations

import io
import shlex

import pytest
from rich.cells import cell_len
from rich.console import Console

from feint.evaluation import Cell, Finding
from feint.evaluation.verdict import conclude
from feint.reports.data import ReportData
from feint.reports.terminal import _shell, render, table
from feint.reports.words import columns_apart, percent
from tests.reports.fakes import ACE, cell_result, small_data, story_data


def printed(data: ReportData, width: int, **options: object) -> str:
    file = io.StringIO()
    render(Console(file=file, width=width, **options), data)  # type: ignore[arg-type]
    return file.getvalue()


@pytest.mark.parametrize("width", [72, 80, 100, 120, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    lines = printed(story_data(command="feint evaluate --seed 0"), width).splitlines()
    assert max(map(cell_len, lines)) <= width


@pytest.mark.parametrize("width", [80, 120])
def test_every_cell_is_one_line_with_its_interval(width: int) -> None:
    data = story_data()
    lines = printed(data, width).splitlines()
    rows = [line for line in lines if line.startswith(("  none", "  gray-box", "  white-box"))]
    assert len(rows) == len(data.results)
    ordered = [r for group in data.pipelines().values() for r in group]
    for line, result in zip(rows, ordered, strict=True):
        rate = result.accuracy
        assert f"{percent(rate.value)} [{percent(rate.low)}, {percent(rate.high)}]" in line
    # The claim stands in the line that reproduces it, as an accuracy: 0.983 × 88.5 = 87.0.
    assert ["87.0¹" in line for line in rows].count(True) == 1
    assert next(line for line in rows if "87.0¹" in line).split()[:2] == ["gray-box", "pgd(ace)"]


def test_distances_and_budget_where_there_is_room() -> None:
    assert "max |δ|" not in printed(story_data(), 80)
    wide = printed(story_data(), 120)
    assert "linf 8/255" in wide
    assert "0.0314" in wide  # 8/255
    assert "0.0289" in wide  # the fake's rms, 0.92 · 8/255


def test_only_warnings_and_failures_are_listed() -> None:
    text = printed(story_data(), 80)
    assert "4 of 6 checks passed" in text
    assert "warn  loss-has-settled" in text
    assert "outputs-are-logits" not in text


def test_a_withheld_verdict_says_so() -> None:
    bad = [Finding("zero-gradient", "fail", "p", "all of them")]
    cells = story_data().results
    text = printed(story_data(findings=bad, verdict=conclude(cells, bad)), 80)
    assert "Grade F – verdict withheld" in text
    assert "fail  zero-gradient" in text
    assert "Not trustworthy: zero-gradient failed" in text


def test_markup_in_names_is_text() -> None:
    name = "[bold red]m[/] [link=x]"
    cells = [cell_result(Cell("white-box", model=name, attack="pgd"), 0.5, size=0.1)]
    found = [Finding("[red]c", "warn", "[/]s", "[blink]e[/blink]")]
    text = printed(ReportData(cells, found, conclude(cells, found), html="[b]/x.html"), 80)
    for part in (name, "[red]c", "[/]s", "[blink]e[/blink]", "[b]/x.html"):
        assert part in text


def test_a_pipe_and_no_color_get_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = printed(story_data(), 80)
    assert "\x1b" not in plain
    assert "\x1b[" in printed(story_data(), 80, force_terminal=True, color_system="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    text = printed(story_data(), 80, force_terminal=True)
    assert not any(f"\x1b[{n}m" in text for n in range(30, 38))


def test_a_terminal_without_unicode_gets_ascii() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    render(Console(file=file, width=80), story_data(html="é.html"))
    file.flush()
    lines = raw.getvalue().decode("ascii").splitlines()
    assert max(map(len, lines[:40])) <= 80
    assert any("87.0(1)" in line for line in lines)


def test_one_cell_no_findings_nan() -> None:
    cell = cell_result(Cell("white-box", "m", attack="pgd"), 0.5, size=0.1)
    cell.rows["rms"][:] = float("nan")
    text = printed(small_data([cell]), 120)
    assert "no check was run" in text
    assert "nan" not in text
    assert "Nothing was evaluated." in printed(small_data([]), 80)


def test_a_table_alone_can_be_given_a_width() -> None:
    console = Console(file=io.StringIO(), width=200, record=True)
    console.print(table(story_data(), width=80))
    assert max(map(cell_len, console.export_text().splitlines())) <= 200
    assert ACE in console.file.getvalue()  # type: ignore[attr-defined]
    narrow = Console(file=io.StringIO(), width=80)
    narrow.print(table(story_data()))
    assert "max |δ|" not in narrow.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "command",
    [
        "feint evaluate",
        story_data().command,
        "feint evaluate --model 'a b' --attack \"pgd(preset='ace')\" --x 'it'\"'\"'s $HOME'",
    ],
)
def test_the_command_survives_its_line_breaks(command: str) -> None:
    # Oracle: the shell's own splitting.
    lines = _shell(command, 60)
    assert shlex.split("\n".join(lines).replace("\\\n", "")) == shlex.split(command)


def test_cut_names_stay_apart() -> None:
    # By hand.
    assert columns_apart(["abcdefgh1", "abcdefgh2", "abc"], 6) == ["abcd…1", "abcd…2", "abc"]
    assert columns_apart(["abcdefgh", "abcdefgh"], 6) == ["abcde…", "abcde…"]
