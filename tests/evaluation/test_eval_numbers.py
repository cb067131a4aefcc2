"""Effort, pairs, curves, votes, PNG and the matrix. Oracles: closed forms, and counts by hand."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from feint.core import random
from feint.core.errors import ConfigError, RangeError, ShapeError
from feint.core.quantise import quantise
from feint.evaluation import (
    Batch,
    Cell,
    Judgement,
    Subject,
    compare,
    curve_from_distances,
    effort_curve,
    effort_to,
    execute,
    fallen_by,
    matrix_cells,
    paired,
    transfer_matrix,
    worst_curve,
)
from feint.evaluation.evaluate import Memory, TensorSamples
from feint.evaluation.judge import VOTES
from feint.evaluation.metrics import wilson
from feint.evaluation.paired import difference
from feint.evaluation.png import png_round_trip
from tests.evaluation.planted import Jitter, Spy, Through
from tests.evaluation.test_eval_results import result
from tests.tiny import LinearModel, images, predicted

# --- effort --------------------------------------------------------------------------------------


def test_success_against_effort_by_hand() -> None:
    """Six patients of a textbook: fell at 1, 3, 3, 6, given up at 2 and 5.

    Oracle: the product-limit estimate on paper: 5/6, then of four left two fall, then the last.
    """
    found = fallen_by([1, 2, 3, 3, 5, 6], [True, False, True, True, False, True])
    assert [t for t, _ in found] == [1, 3, 6]
    expected = [1 / 6, 1 - 5 / 6 * 2 / 4, 1.0]
    assert [r.value for _, r in found] == pytest.approx(expected)
    assert all(r.low <= r.value <= r.high for _, r in found)


def test_without_early_censoring_it_is_the_plain_share() -> None:
    """Oracle: Wilson's interval of the share of those that fell."""
    time, fell = np.array([4, 9, 2, 9, 7, 9]), np.array([1, 0, 1, 0, 1, 0], dtype=bool)
    for moment, found in fallen_by(time, fell, at=[1, 2, 4, 8, 9, 100]):
        count = int((fell & (time <= moment)).sum())
        assert found.value == pytest.approx(count / 6)
        assert (found.low, found.high) == pytest.approx(wilson(count, 6))


def test_effort_that_means_nothing() -> None:
    with pytest.raises(ShapeError, match="one of each"):
        fallen_by([1, 2], [True])
    with pytest.raises(RangeError, match="at least one"):
        fallen_by([], [])
    with pytest.raises(RangeError, match="finite"):
        fallen_by([math.nan], [True])
    unknown = result(Cell("white-box", "m", "d", "pgd"), [1, 0], first_hit=np.array([-1, 2]))
    with pytest.raises(ConfigError, match="were not recorded"):
        effort_curve(unknown)
    with pytest.raises(ConfigError, match="unit is 'hours'"):
        effort_curve(unknown, "hours")  # type: ignore[arg-type]


def run(attack: str, defense=None, n: int = 20, **more):  # type: ignore[no-untyped-def]
    x = images(n)
    model = Spy(LinearModel())
    cell = Cell("white-box", "m", "none" if defense is None else "d", attack, **more)
    samples = TensorSamples(Batch(x, predicted(LinearModel(), x), torch.arange(n)))
    subject = Subject(model, defense)
    return model, execute([cell], lambda _: subject, samples, cache=Memory())[0]


@pytest.mark.parametrize("draws", [1, 3])
def test_effort_is_what_it_took(draws: int) -> None:
    """Oracle: of PGD every round is one forward and one backward pass per draw, but for the last
    round of those that never fell, which has no backward pass; their sum is what the spy saw."""
    defense = None if draws == 1 else Jitter(sigma=0.01)
    stop = "" if draws == 1 else f", gradient=eot({draws}), stop='success'"
    spy, found = run(f"pgd(steps=6, random_start=False{stop})", defense, eps=0.05)
    rows, fell = found.rows, found.rows["first_hit"] >= 0
    assert fell.any()
    assert not fell.all()
    assert (rows["rounds"][fell] == rows["first_hit"][fell]).all()
    assert (rows["rounds"][~fell] == 6).all()
    assert (rows["queries"] == draws * (rows["rounds"] + 1)).all()
    assert (rows["gradients"] == draws * (rows["rounds"] + fell)).all()
    if draws == 1:
        assert rows["queries"].sum() == found.forwards
        assert rows["gradients"].sum() == found.backwards == spy.differentiated


def test_the_effort_to_a_share() -> None:
    """Oracle: the sorted amounts of those that fell."""
    _, found = run("pgd(steps=6, random_start=False)", eps=0.1)
    spent = np.sort(found.rows["queries"][found.rows["first_hit"] >= 0])
    reached = len(spent) / 20
    goals = [0.1, reached, 1.0] if reached < 1 else [0.1, 0.5, 1.0]
    answer = effort_to(found, goals, "queries")
    assert answer[0.1] == spent[1]
    assert answer[1.0] is None or reached == 1
    curve = effort_curve(found, "queries")
    assert curve[-1][1].value == pytest.approx(reached)
    with pytest.raises(RangeError, match="share is 0"):
        effort_to(found, [0])


def test_a_lucky_hit_is_no_verified_one() -> None:
    """Two hits; on fresh draws one holds on 3 of 4, the other on 1 of 4, which is censored."""
    cell = Cell("white-box", "m", "d", "pgd")
    rows = {
        "first_hit": np.array([2, 3, -1, -1]),
        "rounds": np.array([2.0, 3.0, 9.0, 9.0]),
        "late_gain": np.zeros(4),
    }
    found = result(cell, [1, 3, 4, 4], 4, **rows)
    assert effort_curve(found, "rounds")[-1][1].value == 0.5
    assert effort_curve(found, "rounds", verified=True)[-1][1].value == 0.25
    assert found.luck == pytest.approx(0.5 - (3 + 1) / 16)


def test_effort_counts_rows_of_restarts_together() -> None:
    _, found = run("pgd(steps=3, restarts=2, stop='never')", eps=0.0)
    assert (found.rows["queries"] == 2 * 4).all()
    assert (found.rows["gradients"] == 2 * 3).all()


@pytest.mark.parametrize("attack", ["hopskipjump(steps=3, probes=20)", "deepfool(steps=20)"])
def test_only_successes_within_the_budget_count(attack: str) -> None:
    """Oracle: the distance to the boundary in closed form: what lies beyond cannot be broken, and
    what the attack gave back within the budget was."""
    _, found = run(attack, eps=0.06)
    x = images(20)
    far = LinearModel().distance(x, predicted(LinearModel(), x), "linf").numpy() > 0.06
    assert far.any()
    assert not found.fell[far].any()
    assert (found.fell == (found.rows["correct"] == 0)).all()
    assert found.luck == pytest.approx(0)
    most = effort_curve(found, "queries")
    assert (most[-1][1].value if most else 0.0) == pytest.approx(found.fell.mean())
    longest = found.rows["queries"][~found.fell]
    assert (found.rows["queries"][found.fell] < longest.max()).all()


# --- pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 1), (9, 3), (12, 2), (30, 31)])
def test_mcnemar_exactly(b: int, c: int) -> None:
    """Oracle: twice the binomial tail at one half, by math.comb alone."""
    first = [1] * b + [0] * c + [1, 0]
    second = [0] * b + [1] * c + [1, 0]
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    found = paired(first, second)
    assert (found.both, found.only_first, found.only_second, found.neither) == (1, b, c, 1)
    assert found.p_value == pytest.approx(min(1.0, 2 * tail))


@pytest.mark.parametrize(("b", "c", "rest"), [(12, 2, 36), (0, 0, 10), (7, 7, 6), (20, 0, 0)])
def test_the_interval_of_a_difference(b: int, c: int, rest: int) -> None:
    """Oracle: Bonett and Price's formula: p = (count + 1) / (n + 2) for the two discordant cells,
    (p₁ − p₂) ± z √((p₁ + p₂ − (p₁ − p₂)²) / (n + 2))."""
    n = b + c + rest
    p, q = (b + 1) / (n + 2), (c + 1) / (n + 2)
    half = 1.959963984540054 * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    found = difference([1] * b + [0] * c + [1] * rest, [0] * b + [1] * c + [1] * rest)
    assert found.value == pytest.approx((b - c) / n)
    assert found.low == pytest.approx(max(-1, p - q - half))
    assert found.high == pytest.approx(max(min(1, p - q + half), found.value))


def test_the_difference_covers_the_truth() -> None:
    """Pairs with known rates 0.7 and 0.6, half of them coupled: 95 % intervals of 400 experiments
    hold 0.1 at least 93 % of the time. Oracle: the rates that the samples were drawn with."""
    u = random.uniform(random.keys(4, 400), (60, 2), dtype=torch.float64).numpy()
    first = (u[..., 0] < 0.7).astype(float)
    other = np.where(np.arange(60) % 2 == 0, u[..., 0], u[..., 1])
    second = (other < 0.6).astype(float)
    held = 0
    for a, b in zip(first, second, strict=True):
        found = difference(a, b)
        held += found.low <= 0.1 <= found.high
    assert held / 400 >= 0.93


def test_pipelines_are_compared_by_their_worst_case() -> None:
    """Oracle: by hand; the other order turns the sign."""
    ours = [
        result(Cell("white-box", "m", "d", a), c)
        for a, c in (("pgd", [1, 1, 0, 1]), ("bim", [1, 0, 1, 1]))
    ]
    theirs = [result(Cell("white-box", "m", "e", "pgd"), [0, 0, 0, 1])]
    found = compare(ours, theirs)
    assert (found.both, found.only_first, found.only_second, found.neither) == (1, 1, 0, 2)
    assert found.difference.value == 0.25
    assert compare(theirs, ours).difference.value == -0.25
    assert compare(ours[0], theirs[0]).difference.value == 0.5
    assert "n = 4" in str(found)
    assert found.as_dict()["only_first"] == 1
    with pytest.raises(ConfigError, match="2 threat models"):
        compare(ours, [result(Cell("white-box", "m", "e", "pgd", eps=0.5), [1] * 4)])
    with pytest.raises(ConfigError, match="other samples"):
        compare(ours, [result(Cell("white-box", "m", "e", "pgd"), [1] * 3)])
    with pytest.raises(ConfigError, match="no cells"):
        compare([], theirs)


def test_pairs_that_are_none() -> None:
    with pytest.raises(ShapeError, match="the same samples"):
        paired([1], [1, 0])
    with pytest.raises(RangeError, match="values in"):
        paired([2], [1])


# --- curves --------------------------------------------------------------------------------------


def test_a_curve_of_many_cells_is_their_worst_case_at_each_budget() -> None:
    """Oracle: by hand. A perturbation counts wherever it fits, whatever budget the attack had."""
    clean = result(Cell("none", "m", "d"), [1, 1, 1, 0])
    near = result(
        Cell("white-box", "m", "d", "deepfool", eps=0.4),
        [0, 0, 1, 0],
        size=np.array([0.1, 0.3, 0.0, 0.0]),
    )
    wide = result(Cell("adaptive", "m", "d", "pgd", eps=0.2), [1, 1, 0, 0], size=np.full(4, 0.2))
    other = result(Cell("white-box", "m", "d", "pgd", norm="l2"), [0, 0, 0, 0])
    removal = result(Cell("removal", "m", "d", "pgd", eps=0.4), [0, 0, 0, 0])
    found = worst_curve([clean, near, wide, other, removal], [0, 0.1, 0.2, 0.3, 0.4])
    assert [r.value for _, r in found] == [0.75, 0.5, 0.25, 0.0, 0.0]
    one = worst_curve([clean, near], [0.05, 0.1, 0.4])
    assert one == curve_from_distances(near, clean, [0.05, 0.1, 0.4])
    with pytest.raises(RangeError, match=r"exceeds the cells' 0\.4"):
        worst_curve([clean, near], [0.5])
    with pytest.raises(ConfigError, match="the clean cell"):
        worst_curve([near], [0.1])


# --- the judge -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", VOTES)
def test_votes_of_successive_draws(n: int) -> None:
    """Oracle: every run of n draws counted one by one, the smallest class first among equals."""
    drawn = random.integers(random.keys(5, 7), 0, 3, (18,))
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    found = Judgement(drawn, y).vote(n)
    for row, label, share in zip(drawn.tolist(), y.tolist(), found.tolist(), strict=True):
        wins = 0
        for start in range(18):
            counts = Counter(row[(start + k) % 18] for k in range(n))
            wins += min(counts, key=lambda c: (-counts[c], c)) == label
        assert share == pytest.approx(wins / 18)
    assert Judgement(drawn[:, :2], y).vote(n).isnan().all()


def test_a_vote_of_coins_wins_as_binomials_say() -> None:
    """A coin of 0.6 between two classes: a vote of n is right as often as the binomial says."""
    drawn = (random.uniform(random.keys(6, 4000), (32,)) >= 0.6).long()
    judged = Judgement(drawn, torch.zeros(4000, dtype=torch.int64))
    for n in VOTES:
        p = sum(math.comb(n, k) * 0.6**k * 0.4 ** (n - k) for k in range(n // 2 + 1, n + 1))
        assert float(judged.vote(n).mean()) == pytest.approx(p, abs=0.015)


def test_majorities_of_a_cell() -> None:
    _, found = run("pgd(steps=1, gradient=eot(2))", Jitter(sigma=0.3), eps=0.02, judge_draws=12)
    assert found.majority_of(1) == found.accuracy
    assert found.majority_of(12) == found.majority
    assert found.majority_of(3).value == pytest.approx(float(found.rows["vote_3"].mean()))
    assert found.majority_of(3).n == 20
    assert set(found.as_dict()["majority_of"]) == {"3", "5", "9"}  # type: ignore[call-overload]
    assert found.as_dict()["votes"] == found.cell.votes  # those of the deployed pipeline
    assert set(found.as_dict()["tries"]) == {"1", "10", "12"}  # type: ignore[call-overload]
    for bad in (17, 4, 0):
        with pytest.raises(RangeError, match="expected one of 1, 3, 5, 9, 12"):
            found.majority_of(bad)
    _, fixed = run("pgd(steps=1)", Through(), eps=0.02)
    assert fixed.majority_of(9) == fixed.accuracy


def test_probabilities_of_samples() -> None:
    """Oracle: Clopper and Pearson's definition: at the ends the tail probability is 2.5 %."""
    found = result(Cell("white-box", "m", "d", "pgd"), [0, 3, 8, 10], 10)
    low, high = found.probabilities()

    def tail(p: float, counts: range) -> float:
        return sum(math.comb(10, k) * p**k * (1 - p) ** (10 - k) for k in counts)

    assert (low[0], high[3]) == (0.0, 1.0)
    for k, a, b in zip([3, 8], low[1:3], high[1:3], strict=True):
        assert tail(a, range(k, 11)) == pytest.approx(0.025)
        assert tail(b, range(k + 1)) == pytest.approx(0.025)
    assert high[0] == pytest.approx(1 - 0.025**0.1)  # none of ten
    ends = result(Cell("white-box", "m", "d", "pgd"), [0, 1]).probabilities()
    assert [e.tolist() for e in ends] == [[0, 1], [0, 1]]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_keeps_eight_bits(channels: int) -> None:
    """Oracle: the rounding to 8 bits."""
    x = images(3, (channels, 5, 7))
    assert torch.equal(png_round_trip(x), quantise(x))
    assert png_round_trip(x.double()).dtype == torch.float64
    assert png_round_trip(x[:0]).shape == x[:0].shape


def test_files_are_judged() -> None:
    _, found = run("pgd(steps=3)", eps=0.05)
    assert found.accuracy_png == found.accuracy_8bit
    assert found.as_dict()["accuracy_png"] == found.accuracy_8bit.as_dict()
    assert result(Cell("white-box", "m", "d", "pgd"), [1]).accuracy_png is None


# --- the matrix ----------------------------------------------------------------------------------


def test_the_transfer_matrix() -> None:
    """Oracle: the attack run by hand on each source, and each target's own answers.

    Examples of a source are made once, whatever the number of targets.
    """
    from feint.attacks import fgsm

    x = images(16)
    models = {name: Spy(LinearModel(seed=s)) for name, s in (("a", 1), ("b", 2))}
    y = predicted(models["a"].model, x)
    targets = {**models, "a + shift": (models["a"], Jitter(sigma=1e-6))}
    found = transfer_matrix(models, targets, x, y, attack="fgsm", eps=0.1, judge_draws=2)
    assert found.accuracy.shape == (2, 3)
    for i, source in enumerate(models):
        x_adv = fgsm(models[source].model, x, y, eps=0.1, stop="never")
        for j, model in enumerate((*models, "a")):
            right = float((models[model].model(x_adv).argmax(1) == y).double().mean())
            assert found.accuracy[i, j] == pytest.approx(right)
    assert models["a"].differentiated == len(x)
    clean = [found.clean[t].accuracy.value for t in found.targets]
    assert np.allclose(found.success, found.accuracy / clean)
    plain = found.as_dict()
    assert plain["targets"] == ["a", "b", "a + shift"]
    with pytest.raises(ConfigError, match="0 sources"):
        transfer_matrix({}, models, x, y)


def test_the_cells_of_a_matrix() -> None:
    cells = matrix_cells(Cell("none", "", eps=0.1), ["s", "t"], [("m", "none"), ("m", "d")], "pgd")
    assert [(c.scenario, c.model, c.defense, c.source) for c in cells] == [
        ("none", "m", "none", ""),
        ("none", "m", "d", ""),
        *((("transfer", "m", d, s)) for s, d in itertools.product("st", ["none", "d"])),
    ]
    assert {c.eps for c in cells} == {0.1}
