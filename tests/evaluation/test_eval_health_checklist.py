"""The checklist: every question is answered, every check exists, and the page says the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from feint.core.errors import UnknownNameError
from feint.evaluation import Finding
from feint.evaluation.asked import chosen
from feint.evaluation.checklist import (
    CHECKS,
    COSTLY,
    ELSEWHERE,
    QUESTIONS,
    SOURCES,
    coverage_table,
    table,
)
from feint.evaluation.health.controls import CONTROLS
from feint.evaluation.health.costly import EXPERIMENTS

ROOT = Path(__file__).parents[2]


def test_every_question_is_answered() -> None:
    """Oracle: the list of 39, by its numbers; at least one check or part of a run for each."""
    assert list(QUESTIONS) == list(range(1, 40))
    answered = {n for check in CHECKS.values() for n in check.numbers} | set(ELSEWHERE)
    assert answered == set(QUESTIONS)


def test_every_check_is_made_and_only_those() -> None:
    """Oracle: the names in the code that makes findings."""
    made: set[str] = set()
    for path in (ROOT / "src/feint").rglob("*.py"):
        if path.name != "checklist.py":
            text = path.read_text(encoding="utf-8")
            made |= set(
                re.findall(r'"([a-z0-9]+(?:-[a-z0-9]+)+|votes|invariance|binarisation)"', text)
            )
    assert set(CHECKS) <= made
    assert set(COSTLY) == set(EXPERIMENTS) | set(CONTROLS)


def test_every_check_has_evidence_threshold_and_source() -> None:
    for name, check in CHECKS.items():
        assert check.asks, name
        assert check.threshold.startswith(("fail", "warn", "correlation")), name
        assert set(check.source.split(", ")) <= set(SOURCES), name
        finding = Finding(name, "pass", "s", "e")
        assert (finding.threshold, finding.source) == (check.threshold, check.source)
        assert Finding(**finding.as_dict()) == finding
    assert Finding("something-else", "pass", "s", "e").threshold == ""


def test_the_page_is_not_stale() -> None:
    """Oracle: the tables that the checklist makes."""
    page = (ROOT / "docs/honest-evaluation.md").read_text(encoding="utf-8")
    for text in (table("quick"), table("costly"), coverage_table()):
        assert text in page, f"docs/honest-evaluation.md lacks this table:\n{text}"
    for letter, source in SOURCES.items():
        assert f"**{letter}** {source}" in page


def test_choosing_costly_checks() -> None:
    assert chosen("quick") == chosen("") == ()
    assert chosen("all") == COSTLY
    assert chosen("quick, binarisation,equal-budget") == ("equal-budget", "binarisation")
    with pytest.raises(UnknownNameError, match="binarisation"):
        chosen("binarization")
