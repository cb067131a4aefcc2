"""Rates and intervals. Oracles: scipy, closed forms, and simulation with known truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from feint.core import random
from feint.core.errors import RangeError, ShapeError
from feint.evaluation.metrics import (
    attack_survival,
    clearly_more,
    defense_recovery,
    defense_success,
    distances,
    mcnemar,
    newly_misclassified,
    rate,
    ratio,
    wilson,
    worst_case,
    worst_case_both,
)


def uniforms(seed: int, *shape: int) -> np.ndarray:
    keys = random.keys(seed, shape[0])
    return random.uniform(keys, shape[1:], dtype=torch.float64).numpy()


def draws_of(p: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """(N,) shares of keyed Bernoulli draws with the given probabilities."""
    return (uniforms(seed, len(p), draws) < p[:, None]).mean(1)


# --- Wilson ----------------------------------------------------------------------------------


@given(n=st.integers(1, 3000), share=st.floats(0, 1))
def test_wilson_is_scipys(n: int, share: float) -> None:
    """Oracle: scipy's binomtest."""
    k = round(share * n)
    expected = stats.binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(n=st.floats(0.5, 1e4), p=st.floats(0, 1))
def test_wilson_solves_the_score_equation(n: float, p: float) -> None:
    """Oracle: the interval's ends q solve |p − q| = z·√(q(1−q)/n), for fractional n, too."""
    z = stats.norm.ppf(0.975)
    for q in wilson(p * n, n):
        assert abs(p - q) == pytest.approx(z * math.sqrt(q * (1 - q) / n), abs=1e-7)


@pytest.mark.parametrize(("k", "n"), [(-1, 5), (6, 5), (0, 0), (1, -2)])
def test_wilson_refuses(k: float, n: float) -> None:
    with pytest.raises(RangeError, match="expected 0 ≤ successes ≤ n"):
        wilson(k, n)


# --- rates -----------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_the_rate_of_facts_is_wilsons(facts: list[bool]) -> None:
    """Oracle: scipy's binomtest."""
    found = rate(np.array(facts, float))
    expected = stats.binomtest(sum(facts), len(facts)).proportion_ci(method="wilson")
    assert (found.value, found.n) == (np.mean(facts), len(facts))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(st.lists(st.integers(0, 32), min_size=1, max_size=60))
def test_a_rate_lies_between_one_draw_a_sample_and_all_draws(counts: list[int]) -> None:
    """Oracle: Wilson's interval for N trials and for N·draws trials."""
    shares = np.array(counts) / 32
    found, mean, n = rate(shares, 32), float(shares.mean()), len(counts)
    widest, narrowest = wilson(mean * n, n), wilson(mean * n * 32, n * 32)
    assert widest[0] - 1e-12 <= found.low <= narrowest[0] + 1e-12
    assert narrowest[1] - 1e-12 <= found.high <= widest[1] + 1e-12
    assert found.low <= found.value <= found.high


def test_more_failures_never_narrow_the_interval() -> None:
    """31 of 32 right draws on one sample must not look more certain than none wrong at all."""
    clean, one = np.ones(50), np.ones(50)
    one[0] = 31 / 32
    assert rate(one, 32).low <= rate(clean, 32).low


BETA = stats.beta(2, 1).ppf((np.arange(1000) + 0.5) / 1000)
DESIGNS = {
    "a coin of 0.95": np.full(1000, 0.95),
    "a coin of 0.5": np.full(1000, 0.5),
    "facts 0 and 1": np.repeat([0.0, 1.0], [300, 700]),
    "rarely broken samples": np.repeat([0.0, 1.0], [40, 960]),
    "rarely broken, else nearly right": np.repeat([0.0, 0.999], [40, 960]),
    "spread": BETA,
    "two kinds": np.repeat([0.05, 0.9], [500, 500]),
    "nearly always wrong": np.full(1000, 0.01),
}


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize(("n", "draws"), [(50, 32), (200, 8), (200, 2)])
def test_rates_cover_the_truth(design: str, n: int, draws: int) -> None:
    """Oracle: simulation. Samples are drawn from a population, draws from the samples.

    400 repetitions: a coverage of 95 % is measured with a standard error of 1.1 points. (Wilson's
    own coverage for facts dips: to 92.2 % for one in fifty of fifty, as for any such interval.)
    """
    population = DESIGNS[design]
    truth, inside, reps = population.mean(), 0, 400
    u = uniforms(n * draws, reps, n)
    tosses = uniforms(n * draws + 1, reps, n * draws).reshape(reps, n, draws)
    for i in range(reps):
        p = population[(u[i] * len(population)).astype(int)]
        found = rate((tosses[i] < p[:, None]).mean(1), draws)
        inside += found.low <= truth <= found.high
    assert inside / reps >= 0.93


def test_a_rate_of_many_draws_is_narrower() -> None:
    """The guard against unseen samples must not make the draws worthless."""
    shares = draws_of(np.full(1000, 0.9), 32, 5)
    many, one = rate(shares, 32), rate(shares, 1)
    assert many.high - many.low < 0.4 * (one.high - one.low)


@pytest.mark.parametrize("bad", [[], [[0.1]], [1.1], [-0.1], [math.nan]])
def test_rates_refuse(bad: list[float]) -> None:
    with pytest.raises(RangeError):
        rate(bad)


# --- ratios ----------------------------------------------------------------------------------


def test_a_ratio_is_near_the_delta_method() -> None:
    """Oracle: r ± 1.96·√(Σ(t − r·b)²)/(n·b̄), the first-order variance of a ratio of means."""
    bottom = (uniforms(1, 400) < 0.9).astype(float)
    top = bottom * (uniforms(2, 400) < 0.4)
    found = ratio(top, bottom)
    r = top.mean() / bottom.mean()
    error = 1.96 * math.sqrt(((top - r * bottom) ** 2).sum()) / (400 * bottom.mean())
    assert found.value == pytest.approx(r)
    assert (found.low, found.high) == pytest.approx((r - error, r + error), abs=0.01)


def test_a_ratio_of_zeros_is_not_certain() -> None:
    """Oracle: the rule of three; 0 of n allows up to about 3/n."""
    found = ratio(np.zeros(200), np.ones(200))
    assert (found.value, found.low) == (0, 0)
    assert 2 / 200 <= found.high <= 5 / 200
    whole = ratio(np.ones(200), np.ones(200))
    assert (whole.value, whole.high) == (1, 1)
    assert 1 - 5 / 200 <= whole.low <= 1 - 2 / 200


@pytest.mark.parametrize("share", [0.02, 0.3, 0.98])
def test_ratios_cover_the_truth(share: float) -> None:
    """Oracle: simulation with a known ratio."""
    inside, reps, n = 0, 150, 150
    a, b = uniforms(3, reps, n) < 0.85, uniforms(4, reps, n) < share
    for i in range(reps):
        found = ratio(a[i] & b[i], a[i], resamples=400)
        inside += found.low <= share <= found.high
    assert inside / reps >= 0.92


def test_ratios_repeat_and_refuse() -> None:
    top, bottom = np.array([0.0, 1, 1]), np.array([1.0, 1, 1])
    assert ratio(top, bottom) == ratio(top, bottom)
    with pytest.raises(RangeError, match="denominator is 0"):
        ratio(top, np.zeros(3))
    with pytest.raises(RangeError, match="denominator"):
        ratio([], [])
    with pytest.raises(ShapeError, match="same samples"):
        ratio(top, bottom[:2])


# --- the papers' ------------------------------------------------------------------------------


def test_s0s_quantities() -> None:
    """Oracle: S0 §5 and FACTS §3.6 by hand: clean 0.8, attacked 0.2, defended 0.6."""
    clean = np.repeat([1.0, 0.0], [8, 2])
    attacked, defended = np.repeat([1.0, 0.0], [2, 8]), np.repeat([1.0, 0.0], [6, 4])
    assert attack_survival(attacked, clean).value == pytest.approx(0.25)
    assert defense_success(defended, clean).value == pytest.approx(0.75)
    by_code = 1 - (0.8 - 0.6) / (0.8 - 0.2)
    assert defense_recovery(defended, attacked, clean).value == pytest.approx(by_code)
    with pytest.raises(RangeError, match="did no harm"):
        defense_recovery(defended, clean, clean)


def test_s3s_quantity() -> None:
    """Oracle: |{x ∈ TP: f(x̂) ≠ y}| / |TP| by hand, with Wilson's interval over TP."""
    clean = np.array([1.0, 1, 1, 1, 0, 0])
    attacked = np.array([1.0, 0, 0, 0, 0, 1])
    found = newly_misclassified(attacked, clean)
    assert (found.value, found.n) == (0.75, 4)
    assert (found.low, found.high) == wilson(3, 4)
    soft = newly_misclassified(np.array([0.5, 0.0]), np.array([1.0, 0.5]))
    assert soft.value == pytest.approx((0.5 + 0.5) / 1.5)
    with pytest.raises(RangeError, match="newly misclassified"):
        newly_misclassified(attacked, np.zeros(6))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcnemar_is_the_exact_sign_test(pairs: list[tuple[bool, bool]]) -> None:
    """Oracle: twice the smaller binomial tail over the discordant pairs, at most one."""
    a, b = (np.array(v, float) for v in zip(*pairs, strict=True))
    one, two = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    n = one + two
    tail = sum(math.comb(n, k) for k in range(min(one, two) + 1)) / 2**n
    assert mcnemar(a, b) == pytest.approx(min(1.0, 2 * tail))


# --- the worst case ---------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.95, 0.5])
def test_the_worst_of_equal_coins_is_a_coin(p: float) -> None:
    """Oracle: six attacks that do nothing leave p; the least of the same draws is far below."""
    attacks, n, draws = 6, 200, 32
    hits = uniforms(7, attacks * n, draws).reshape(attacks, n, draws) < p
    even, odd = hits[..., ::2].mean(-1), hits[..., 1::2].mean(-1)
    honest = rate(worst_case_both(even, odd, draws), draws)
    half = rate(worst_case(even, odd), draws // 2)
    lucky = hits.mean(-1).min(0).mean()
    assert lucky < p - 0.02
    for found in (honest, half):
        assert found.low <= p <= found.high
    assert honest.value == pytest.approx(p, abs=0.02)


def test_the_worst_case_of_facts_is_the_minimum() -> None:
    """Oracle: the per-sample minimum, which is no luck where nothing is random."""
    facts = (uniforms(8, 4, 30) < 0.6).astype(float)
    assert np.array_equal(worst_case_both(facts, facts, 1), facts.min(0))


@pytest.mark.parametrize("draws", [2, 5, 32])
def test_the_worst_case_of_one_attack_is_its_own_share(draws: int) -> None:
    """Oracle: the mean over all draws, also where the halves are unequal."""
    hits = uniforms(9, 20, draws) < 0.7
    even, odd = hits[:, ::2].mean(1)[None], hits[:, 1::2].mean(1)[None]
    assert worst_case_both(even, odd, draws) == pytest.approx(hits.mean(1))


def test_the_worst_case_finds_the_worse_attack() -> None:
    """Oracle: known shares far apart."""
    even = odd = np.array([[1.0, 0.1], [0.2, 0.9]])
    assert worst_case_both(even, odd, 8).tolist() == pytest.approx([0.2, 0.1])
    with pytest.raises(ShapeError, match="attacks, samples"):
        worst_case(even, odd[:1])


def test_clearly_more() -> None:
    """Oracle: facts as they are; equal coins nearly never; coins of 0.9 and 0.2 nearly always."""
    assert clearly_more([1, 1, 0, 0], 1, [0, 1, 0, 1], 1).tolist() == [True, False, False, False]
    for p in (0.5, 0.8, 0.97):
        a, b = (draws_of(np.full(4000, p), 32, s) * 32 for s in (1, 2))
        assert clearly_more(a, 32, b, 32).mean() < 0.004
    high, low = draws_of(np.full(500, 0.9), 32, 1), draws_of(np.full(500, 0.2), 32, 2)
    assert clearly_more(high * 32, 32, low * 32, 32).mean() > 0.99


# --- distances --------------------------------------------------------------------------------


@given(seed=st.integers(0, 1000))
def test_the_four_distances(seed: int) -> None:
    """Oracle: numpy's formulas, image by image."""
    x = random.uniform(random.keys(seed, 3), (3, 4, 5))
    x_adv = random.uniform(random.keys(seed + 1, 3), (3, 4, 5))
    found = distances(x_adv, x)
    for i in range(3):
        a, b = (t[i].double().numpy() for t in (x_adv, x))
        d = (a - b).ravel()
        assert found["rms"][i] == pytest.approx(np.sqrt(np.mean(d**2)))
        assert found["abs_l2"][i] == pytest.approx(np.sqrt(np.sum(d**2)))
        assert found["relative_l2"][i] == pytest.approx(np.linalg.norm(d) / np.linalg.norm(b))
        assert found["linf"][i] == np.abs(d).max()


def test_a_black_image_has_no_relative_distance() -> None:
    found = distances(torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2))
    assert np.isnan(found["relative_l2"]).all()
    assert found["rms"][0] == 1


def test_ties_of_the_worst_case_go_to_the_stronger_attack() -> None:
    # Oracle: by hand. Sample 0 ties on the first half; the second attack is stronger on the whole.
    select, report = [[0.0, 1.0], [0.0, 0.0]], [[1.0, 1.0], [0.25, 0.5]]
    assert worst_case(select, report).tolist() == [0.25, 0.5]
    assert worst_case(select[::-1], report[::-1]).tolist() == [0.25, 0.5]
