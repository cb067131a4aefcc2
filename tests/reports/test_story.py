"""What the figures show. Oracles: the fakes' numbers by hand, and counting."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

import feint.defenses  # noqa: F401  (registers every defense)
from feint.core.errors import RangeError
from feint.core.registry import DEFENSES
from feint.evaluation import Cell
from feint.reports.claims import PUBLISHED, published
from feint.reports.curves import curves, telling
from feint.reports.data import Claim, threats
from feint.reports.story import story
from feint.reports.svg import ticks
from feint.reports.words import attack_words, budget, mean, passes, percent, significant
from tests.reports.fakes import (
    ACE,
    CLAIM,
    RANDOM,
    S0_PGD,
    SHIFT,
    SIGN,
    cell_result,
    small_data,
    story_data,
)


def test_a_lane_goes_from_clean_over_the_claim_to_the_attacker_who_knows() -> None:
    lane = next(x for x in story(story_data()) if x.name == f"{ACE} + {SHIFT}")
    assert lane.threat == "linf 8/255"
    got = [(m.kind, m.label, round(m.value, 3), m.note) for m in lane.marks]
    assert got == [
        ("none", "clean", 0.885, ""),
        ("bare", "undefended", 0.0, "worst of 2 attacks"),
        ("claim", "published", 0.87, "gray-box, 98.3 % of clean accuracy"),
        ("gray-box", "reproduced", 0.815, "gray-box, pgd(ace)"),
        ("gray-box", "gray-box", 0.565, "worst of 2 attacks"),
        ("white-box", "white-box", 0.0, "worst of 2 attacks"),
        ("worst", "worst case", 0.0, "per sample, 4 attacks"),
    ]
    assert lane.clean == pytest.approx(0.885)
    assert lane.marks[4].others == (0.815, 0.565)


def test_the_worst_case_is_the_verdicts_bound() -> None:
    data = story_data()
    bounds = {(b.model, b.defense): b.worst for b in data.verdict.bounds}
    lane = next(x for x in story(data) if x.name == f"{ACE} + {RANDOM}")
    bound = bounds[ACE, RANDOM]
    assert bound is not None
    worst = lane.marks[-1]
    assert (worst.kind, worst.value, worst.high) == ("worst", bound.value, bound.high)
    # Nobody who knows was tried: no bound, and the figure says so.
    cells = [
        cell_result(Cell("gray-box", "m", "d", "pgd"), 0.6, size=0.1),
        cell_result(Cell("transfer", "m", "d", "pgd", source="s"), 0.8, size=0.1),
    ]
    (alone,) = story(small_data(cells))
    assert alone.marks[-1].value == pytest.approx(0.6)
    assert "no bound" in alone.marks[-1].note


def test_the_bare_model_is_a_control_and_no_lane_of_its_own() -> None:
    names = [lane.name for lane in story(story_data())]
    assert ACE not in names  # a defended lane shows it
    assert "bundled:plain" in names  # nothing defends it


def test_published_numbers_about_other_models_are_context() -> None:
    cells = [
        cell_result(Cell("none", "m"), 0.9),
        cell_result(Cell("none", "m", "pixel_shift(dx=1)"), 0.8),
        cell_result(Cell("gray-box", "m", "pixel_shift(dx=1)", "pgd"), 0.5, size=0.1),
    ]
    (lane,) = [x for x in story(small_data(cells)) if "+" in x.name]
    (mark,) = [m for m in lane.marks if m.kind == "claim"]
    assert mark.value == pytest.approx(0.983 * 0.9)  # a share of the bare model's clean accuracy
    assert mark.context
    assert "ResNet-18 with ACE λ=100; 98.3 % of clean accuracy" in mark.note
    # With a claim of the run's own there is no other.
    own = small_data(cells, claims=(Claim(0.7, "x", defense="pixel_shift(dx=1)"),))
    (lane,) = [x for x in story(own) if "+" in x.name]
    assert [m.context for m in lane.marks if m.kind == "claim"] == [False]


def test_a_claim_may_be_a_share_of_the_defended_classifiers_clean_accuracy() -> None:
    cells = [
        cell_result(Cell("none", "m"), 0.9),
        cell_result(Cell("none", "m", "prm"), 0.5),
        cell_result(Cell("gray-box", "m", "prm", "pgd"), 0.4, size=0.1),
    ]
    (lane,) = [x for x in story(small_data(cells)) if "+" in x.name]
    (mark,) = [m for m in lane.marks if m.kind == "claim"]
    assert mark.value == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("text", "lows"),
    [
        ("fd + rdg(delta=0.15)", [0.71, 0.58, 0.38]),
        ("fd*3 + rdg", [0.65]),
        ("fd*2 + rdg", []),
        ("rdg + fd", []),
        ("pixel_deflection(k=100) + wavelet(sigma=0.04)", [0.81]),
        ("none", []),
        ("no (call", []),
        ("my_own", []),
    ],
)
def test_what_is_on_record(text: str, lows: list[float]) -> None:
    assert [claim.low for claim in published(text)] == lows


def test_every_published_number_is_in_its_defenses_docstring() -> None:
    # Oracle: the defenses' own words.
    for names, claims in PUBLISHED.items():
        doc = " ".join(inspect.getdoc(DEFENSES[n].component) or "" for n in names)
        for claim in claims:
            percent = f"{100 * claim.low:g}"
            assert any(w in doc for w in (f"{percent} %", f"{percent} to", f"{claim.low:g}")), names


def test_the_worst_case_is_taken_per_sample() -> None:
    # Two attacks break disjoint halves: each leaves half, together they leave nothing.
    first = cell_result(Cell("white-box", "m", attack="fgsm"), 0.5, size=0.1)
    second = cell_result(Cell("white-box", "m", attack="pgd"), 0.5, size=0.1)
    for name in ("correct", "correct_even", "correct_odd"):
        second.rows[name] = 1 - first.rows[name]
    (lane,) = story(small_data([first, second]))
    assert lane.marks[-1].value == 0
    assert lane.marks[-1].others == (0.5, 0.5)


def test_every_threat_and_every_deployment_has_its_lane() -> None:
    cells = [
        cell_result(Cell("none", "m", "d"), 0.9),
        cell_result(Cell("white-box", "m", "d", "pgd", eps=4 / 255), 0.5),
        cell_result(Cell("white-box", "m", "d", "pgd", norm="l2", eps=1.0), 0.4),
        cell_result(Cell("none", "m", "d", votes=3), 0.95, draws=4),
        cell_result(Cell("white-box", "m", "d", "pgd", votes=3), 0.6, draws=4),
    ]
    data = small_data(cells)
    assert [(x.name, x.threat) for x in story(data)] == [
        ("m + d", "linf 4/255"),
        ("m + d", "l2 1"),
        ("m + d (3 votes, mean_probability)", "linf 8/255"),
    ]
    assert threats(cells) == [
        ("linf", 4 / 255, False),
        ("l2", 1.0, False),
        ("linf", 8 / 255, False),
    ]


def test_claims() -> None:
    data = story_data()
    about = [r for r in data.results if CLAIM.about(r)]
    assert [(r.cell.defense, r.cell.attack) for r in about] == [(SHIFT, S0_PGD)]
    assert data.worth(CLAIM, about[0]) == pytest.approx(0.983 * 0.885)
    exact = Claim(0.5, "x", cell=data.results[3].cell)
    assert [exact.about(r) for r in data.results].count(True) == 1
    with pytest.raises(RangeError, match="divide a percentage by 100"):
        Claim(98.3, "x")
    # Nobody measured what the share is of: no mark, and the note says so.
    lonely = [cell_result(Cell("gray-box", ACE, SHIFT, S0_PGD), 0.8, size=0.1)]
    (lane,) = story(small_data(lonely, claims=(CLAIM,)))
    assert [m.kind for m in lane.marks] == ["gray-box"]


def test_shares_of_clean_accuracy_are_of_the_bare_model() -> None:
    # S0 divides by the undefended classifier's clean accuracy.
    cells = [
        cell_result(Cell("none", "m"), 0.9),
        cell_result(Cell("none", "m", "d"), 0.6),
        cell_result(Cell("gray-box", "m", "d", "pgd"), 0.5, size=0.1),
    ]
    data = small_data(cells, claims=(Claim(0.5, "x", of_clean=True),))
    assert data.worth(data.claims[0], cells[2]) == pytest.approx(0.45)


def test_curves_hold_every_budget_once() -> None:
    found = {c.name: c for c in curves(story_data())}
    shift = {s.scenario: s for s in found[f"{ACE} + {SHIFT}"].series}
    levels = [round(255 * eps) for eps, _ in shift["white-box"].points]
    assert levels == [0, 1, 2, 4, 8, 16]
    values = [r.value for _, r in shift["white-box"].points]
    # 8/255 is the worst of the table's two attacks, 0 clean accuracy, the others the extra cells.
    assert values == pytest.approx([0.885, 0.62, 0.21, 0.03, 0.0, 0.0])
    assert found[f"{ACE} + {SHIFT}"].reach == pytest.approx(16 / 255)
    assert [c.name for c in telling(list(found.values()))] == [
        f"{ACE} + {SHIFT}",
        "bundled:adversarial",
    ]
    alone = [c for c in found.values() if c.name == f"{ACE} + {RANDOM}"]
    assert telling(alone) == alone


def test_a_minimal_norm_attack_gives_a_curve_by_counting() -> None:
    clean = cell_result(Cell("none", "m"), 0.9)
    near = cell_result(Cell("white-box", "m", attack="deepfool", norm="l2", eps=1.0), 0.0)
    near.rows["size"] = np.linspace(0, 1, 200)
    (curve,) = curves(small_data([clean, near]))
    (line,) = curve.series
    assert line.derived
    right = clean.rows["correct"]
    for eps, rate in line.points:
        left = sum(1 for i in range(200) if right[i] and near.rows["size"][i] > eps)
        assert rate.value == pytest.approx(left / 200)


def test_removal_does_not_start_from_the_pipelines_clean_accuracy() -> None:
    cells = [
        cell_result(Cell("none", "m", "d"), 0.9),
        cell_result(Cell("removal", "m", "d", "pgd"), 0.1, size=0.1),
    ]
    (curve,) = curves(small_data(cells))
    assert [eps for eps, _ in curve.series[0].points] == [8 / 255]


def test_words() -> None:
    # By hand.
    assert budget("linf", 8 / 255) == "8/255"
    assert budget("l2", 1.0) == "1"
    assert budget("linf", 0.03) == "0.03"
    assert percent(float("nan")) == percent(None) == "–"
    assert significant(float("nan")) == "–"
    assert mean([1.0, float("nan"), 3.0]) == 2
    assert np.isnan(mean([float("nan")]))
    assert attack_words(Cell("white-box", "m", attack=SIGN)) == "pgd(steps=40, step_size=2/255)"
    assert (
        attack_words(Cell("white-box", "m", attack=S0_PGD, backward="bpda")) == "pgd(ace) via bpda"
    )
    assert attack_words(Cell("transfer", "m", attack="pgd", source="s")) == "pgd from s"
    assert attack_words(Cell("white-box", "m", attack="no (call")) == "no (call"
    result = cell_result(Cell("white-box", "m", attack="pgd"), 0.5)
    assert passes(result) == "41 / 40"
    result.forwards, result.backwards = 500, 200
    assert passes(result) == "2.5 / 1"


@pytest.mark.parametrize(
    ("reach", "norm", "labels"),
    [
        (8 / 255, "linf", ["0", "2/255", "4/255", "6/255", "8/255"]),
        (16 / 255, "linf", ["0", "4/255", "8/255", "12/255", "16/255"]),
        (10 / 255, "linf", ["0", "2/255", "4/255", "6/255", "8/255", "10/255"]),
        (1.0, "l2", ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (32 / 255, "linf", ["0", "8/255", "16/255", "24/255", "32/255"]),
        (3.0, "l2", ["0", "1", "2", "3"]),
    ],
)
def test_ticks(reach: float, norm: str, labels: list[str]) -> None:
    got = ticks(reach, norm)
    assert [text for _, text in got] == labels
    assert got[-1][0] <= reach * (1 + 1e-9)
