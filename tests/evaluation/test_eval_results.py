"""Results, bounds, verdicts, the papers' names and curves. Oracles: numbers counted by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from feint.core.errors import ConfigError, RangeError
from feint.evaluation import (
    Cell,
    CellResult,
    Finding,
    curve,
    curve_from_distances,
    paper_metrics,
    security_curve,
    summary,
)
from feint.evaluation.health.together import _larger_budgets
from feint.evaluation.metrics import rate
from feint.evaluation.results import by_deployment, by_pipeline, worst
from feint.evaluation.verdict import bounds, conclude, name_of
from tests.evaluation.planted import plant, stuck


def result(cell: Cell, correct: list[int], draws: int = 1, **columns: Any) -> CellResult:
    """A result with the given counts; even and odd draws agree as far as they can."""
    n, count = len(correct), np.array(correct)
    even = np.minimum(count, -(-draws // 2))
    rows = {
        "index": np.arange(n),
        "label": np.zeros(n, dtype=np.int64),
        "target": np.full(n, -1),
        "draws": np.full(n, draws),
        "correct": count,
        "correct_even": even / -(-draws // 2),
        "correct_odd": (count - even) / max(1, draws // 2) if draws > 1 else count / 1,
        "correct_8bit": count,
        "target_hits": draws - count,
        "prediction": np.where(count * 2 > draws, 0, 1),
        "size": np.full(n, cell.eps if cell.attack != "none" else 0.0),
        **{name: np.zeros(n) for name in ("rms", "abs_l2", "relative_l2", "linf")},
    }
    return CellResult(cell, "key", {**rows, **columns}, "examples")


def cell(scenario: str, defense: str = "d", attack: str = "pgd", **more: Any) -> Cell:
    attack = "none" if scenario == "none" else attack
    source = "s" if scenario == "transfer" else ""
    return Cell(scenario, "m", defense, attack, source, **more)


# --- a cell's numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("tries", [1, 2, 5, 6])
def test_accuracy_after_tries(tries: int) -> None:
    """Oracle: all subsets of the draws, enumerated: the share that are right every time."""
    correct, draws = [6, 5, 3, 0], 6
    expected = []
    for right in correct:
        facts = [True] * right + [False] * (draws - right)
        sets = list(combinations(facts, tries))
        expected.append(sum(map(all, sets)) / len(sets))
    found = result(cell("white-box"), correct, draws).accuracy_after(tries)
    assert found.value == pytest.approx(np.mean(expected))


def test_tries_do_not_matter_where_nothing_is_random() -> None:
    fixed = result(cell("white-box"), [1, 0, 1, 1])
    assert fixed.accuracy_after(1000) == fixed.accuracy
    with pytest.raises(RangeError, match="raise judge_draws"):
        result(cell("white-box"), [3, 2], 4).accuracy_after(5)
    with pytest.raises(RangeError, match="after 0 tries"):
        fixed.accuracy_after(0)


def test_plain_data_is_json() -> None:
    """Black images have no relative distance, and JSON no NaN."""
    black = result(cell("white-box"), [1, 0], relative_l2=np.full(2, np.nan))
    text = json.dumps(black.as_dict(), allow_nan=False)
    assert json.loads(text)["distance"]["relative_l2"] is None
    assert json.loads(text)["accuracy"]["n"] == 2
    some = result(cell("white-box"), [1, 0], relative_l2=np.array([np.nan, 0.5]))
    assert some.distance()["relative_l2"] == 0.5


def test_groups_keep_votes_apart() -> None:
    one, many = result(cell("none"), [1]), result(cell("none", votes=5), [1])
    assert len(by_pipeline([one, many])) == 1
    assert len(by_deployment([one, many])) == 2
    other = result(cell("none", combine="majority"), [1])  # with one vote there is nothing to count
    assert len(by_deployment([one, other])) == 1


def test_the_worst_case_of_one_cell_is_that_cell() -> None:
    alone = result(cell("white-box"), [7, 3, 5], 7)
    assert worst([alone]) == alone.accuracy
    two = [result(cell("white-box"), [1, 0, 1]), result(cell("gray-box"), [0, 1, 1])]
    assert worst(two).value == pytest.approx(1 / 3)


# --- bounds and verdicts ---


def test_a_bound_is_the_worst_case_per_sample() -> None:
    """Clean, gray-box and white-box each break another sample of four."""
    results = [
        result(cell("none"), [0, 1, 1, 1]),
        result(cell("gray-box"), [1, 0, 1, 1]),
        result(cell("white-box"), [1, 1, 0, 1]),
        result(cell("removal"), [0, 0, 0, 0]),  # the deployed pipeline is not what was judged
    ]
    (bound,) = bounds(results)
    assert bound.worst is not None
    assert (bound.worst.value, bound.worst.n, bound.attacks) == (0.25, 4, 2)
    assert bound.clean is not None
    assert bound.clean.value == 0.75
    assert bound.gray is not None
    assert bound.gray.value == 0.75


def test_smaller_budgets_count_larger_ones_do_not() -> None:
    """What an attacker may do with less, he may do with more; the curve of bounds is monotone."""
    results = [
        result(cell("none", eps=0.2), [1, 1, 1, 1]),
        result(cell("white-box", eps=0.1), [0, 1, 1, 1]),
        result(cell("white-box", eps=0.2), [1, 0, 1, 1]),
        result(cell("white-box", eps=0.2, norm="l2"), [1, 1, 0, 0]),
        result(cell("white-box", eps=0.2, targeted=True), [1, 1, 1, 1]),
    ]
    found = {(b.norm, b.eps, b.targeted): b.worst for b in bounds(results)}
    assert {k: v.value for k, v in found.items() if v} == {
        ("linf", 0.1, False): 0.75,
        ("linf", 0.2, False): 0.5,
        ("l2", 0.2, False): 0.5,
        ("linf", 0.2, True): 1.0,
    }


def test_votes_are_another_pipeline() -> None:
    results = [
        result(cell("white-box"), [0, 0]),
        result(cell("white-box", votes=9, combine="majority"), [1, 1]),
    ]
    found = {b.votes: b.worst for b in bounds(results)}
    assert found[1] is not None
    assert found[9] is not None
    assert (found[1].value, found[9].value) == (0, 1)
    assert "(9 votes, majority)" in conclude(results, []).text


def test_verdicts() -> None:
    """Oracle: the written rules."""
    clean, white = result(cell("none"), [1, 1]), result(cell("white-box"), [0, 1])
    warn, fail = (Finding("a-check", s, "m", "e") for s in ("warn", "fail"))
    assert [conclude([clean, white], f).grade for f in ([], [warn] * 2, [warn] * 3)] == [
        "A",
        "B",
        "C",
    ]
    good = conclude([clean, white], [])
    assert "upper bound on robust accuracy 50.0 %" in good.text
    assert "worst case of 1 attack per sample, n = 2" in good.text
    assert "robust." not in good.text
    bad = conclude([clean, white], [fail])
    assert (bad.grade, bad.withheld) == ("F", True)
    assert bad.text.startswith("Not trustworthy: a-check failed")
    gray = conclude([clean, result(cell("gray-box"), [1, 1])], [])
    assert (gray.grade, gray.withheld) == ("F", True)
    assert "no attacker who knows the defense was tried" in gray.text
    assert conclude([clean], []).withheld
    assert conclude([], []).withheld
    assert conclude([result(cell("removal"), [1])], []).withheld


def test_doubts_about_strength_are_idle_where_nothing_stands() -> None:
    """Oracle: rule 3. An attack that was too weak would have left something."""
    clean, broken, stands = (
        result(cell("none"), [1, 1]),
        result(cell("white-box"), [0, 0]),
        result(cell("white-box"), [0, 1]),
    )
    name = name_of(clean.cell.model, clean.cell.defense)
    for subject in (name, f"{name}, white-box, pgd, linf 8/255"):
        weak = Finding("gradient-foretells", "fail", subject, "it foretells nothing")
        said = conclude([clean, broken], [weak])
        assert (said.grade, said.withheld, said.failed) == ("B", False, ())
        assert "gradient-foretells failed" in said.text
        assert conclude([clean, stands], [weak]).failed == ("gradient-foretells",)
    other = Finding("gradient-foretells", "fail", f"{name} + d", "of another pipeline")
    assert conclude([clean, broken], [other]).withheld
    wrong = Finding("budget-and-box", "fail", name, "outside of the box: too strong")
    assert conclude([clean, broken], [wrong]).withheld
    smaller = replace(stands, cell=replace(stands.cell, eps=stands.cell.eps / 2))
    weak = Finding("gradient-foretells", "fail", name, "something stands at half the budget")
    assert conclude([clean, broken, smaller], [weak]).withheld


# --- the papers' names ---


def s0() -> list[CellResult]:
    """S0's table by hand, over ten samples: clean 8, attacked 1, defended 6, clean defended 7."""
    ones = [1] * 10
    return [
        result(cell("none", "none"), [*ones[:8], 0, 0]),
        result(cell("white-box", "none"), [1, *[0] * 9]),
        result(cell("none"), [*ones[:7], 0, 0, 0]),
        result(cell("gray-box"), [*ones[:6], 0, 0, 0, 0]),
    ]


def test_the_papers_quantities() -> None:
    results = s0()
    found = {name: r.value for name, r in paper_metrics(results[3], results).items()}
    assert found == pytest.approx(
        {
            "attack_survival": 1 / 8,
            "defense_success": 6 / 8,
            "defense_recovery": 1 - (8 - 6) / (8 - 1),
            "acc": 0.6,
            "newly_misclassified": 1 / 7,
        }
    )
    bare = paper_metrics(results[1], results)
    assert bare["newly_misclassified"].value == pytest.approx(7 / 8)
    assert "defense_recovery" not in bare
    assert paper_metrics(results[0], results) == {}
    alone = paper_metrics(results[3], results[3:])
    assert set(alone) == {"acc"}


def test_removal_is_measured_against_the_bare_model() -> None:
    """S3's gray box: attacked with the module, judged without it."""
    results = [*s0(), result(cell("removal"), [1, 1, 0, 0, 0, 0, 0, 0, 0, 0])]
    found = paper_metrics(results[4], results)
    assert found["newly_misclassified"].value == pytest.approx(6 / 8)


def test_targeted_success() -> None:
    aimed = result(cell("white-box", targeted=True), [4, 0, 2], 4)
    found = paper_metrics(aimed, [aimed])
    assert found["asr"].value == pytest.approx((0 + 4 + 2) / 12)
    with pytest.raises(RangeError, match="no target"):
        result(cell("white-box"), [1]).hits  # noqa: B018


def test_quantities_without_a_denominator_are_left_out() -> None:
    results = [result(cell("none", "none"), [0, 0]), result(cell("white-box", "none"), [0, 0])]
    assert set(paper_metrics(results[1], results)) == {"acc"}


def test_summaries() -> None:
    found = summary(s0())
    assert [len(entry["papers"]) for entry in found] == [0, 4, 0, 5]  # type: ignore[arg-type]
    json.dumps(found, allow_nan=False)


# --- curves ---------------------------------------------------------------------------------------


def test_curves() -> None:
    base = cell("white-box", attack="pgd(steps=10)")
    cells = curve(base, [0.3, 0.1, 0.1])
    assert [c.eps for c in cells] == [0.1, 0.3]
    assert {c.attack for c in cells} == {"pgd(steps=10)"}
    with pytest.raises(ConfigError, match=r"names its own eps 0\.1"):
        curve(cell("white-box", attack="pgd(eps=0.1)"), [0.2])
    with pytest.raises(ConfigError, match=r"names its own eps 0\.031"):
        curve(cell("white-box", attack="pgd(preset='ace')"), [0.2])
    with pytest.raises(ConfigError, match="no security curve"):
        curve(cell("none"), [0.2])


def test_security_curves() -> None:
    results = [
        result(cell("white-box", eps=0.2), [0, 0, 1]),
        result(cell("none", eps=0.2), [1, 1, 1]),
        result(cell("white-box", eps=0.1), [0, 1, 1]),
        result(cell("gray-box", eps=0.1), [1, 1, 1]),
    ]
    found = security_curve(results, results[0].cell)
    assert [(e, round(r.value, 3)) for e, r in found] == [(0, 1), (0.1, 0.667), (0.2, 0.333)]


def test_curves_from_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: at each budget, the samples whose nearest image lies within it have fallen."""
    plant(monkeypatch, "nearest", stuck, goal="minimal")
    clean = result(cell("none"), [1, 1, 1, 0])
    sizes = np.array([0.1, 0.2, 0.0, 0.0])  # the third was not broken within the budget
    found = result(cell("white-box", attack="nearest", eps=0.3), [0, 0, 1, 0], size=sizes)
    points = curve_from_distances(found, clean, [0.0, 0.1, 0.15, 0.3])
    assert [(e, r.value) for e, r in points] == [(0, 0.75), (0.1, 0.5), (0.15, 0.5), (0.3, 0.25)]
    with pytest.raises(RangeError, match="exceeds the cell's"):
        curve_from_distances(found, clean, [0.4])
    with pytest.raises(ConfigError, match=r"use curve\(cell, eps\)"):
        curve_from_distances(result(cell("white-box"), [0] * 4), clean, [0.1])
    with pytest.raises(ConfigError, match="other samples"):
        curve_from_distances(found, result(cell("none"), [1]), [0.1])


def test_a_curve_that_rises() -> None:
    """More budget that clearly leaves more: a warning; otherwise none."""
    low = result(cell("white-box", eps=0.1), [0] * 90 + [1] * 10)
    high = result(cell("white-box", eps=0.2), [1] * 90 + [0] * 10)
    assert [f.status for f in _larger_budgets([high, low], "m")] == ["warn"]
    falling = [
        result(cell("white-box", eps=e), [1] * k + [0] * (100 - k))
        for e, k in ((0.1, 90), (0.2, 9))
    ]
    assert [f.status for f in _larger_budgets(falling, "m")] == ["pass"]
    assert list(_larger_budgets([low], "m")) == []
    assert math.isclose(rate(low.shares).value, 0.1)
