"""Rates with counts and 95 % intervals, and the papers' own metrics, from per-sample facts.

Inputs are arrays over samples. A stochastic pipeline's fact is a *share* of draws in [0, 1]; a
deterministic one's is 0 or 1. Nothing here averages over attacks or threat models.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from feint.core import random
from feint.core.errors import RangeError, ShapeError

__all__ = [
    "Rate",
    "attack_survival",
    "clearly_more",
    "defense_recovery",
    "defense_success",
    "distances",
    "mcnemar",
    "newly_misclassified",
    "rate",
    "ratio",
    "wilson",
    "worst_case",
    "worst_case_both",
]

_Z = float(stats.norm.ppf(0.975))
_CHUNK = 1 << 21
"""Numbers that the bootstrap draws at a time."""


@dataclass(frozen=True)
class Rate:
    """A rate with its count of samples and its 95 % interval."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def wilson(successes: float, n: float) -> tuple[float, float]:
    """95 % Wilson score interval; `n` may be an effective, fractional number of trials.

    Raises:
        RangeError: If `n` is not positive or `successes` is not in [0, n].

    References:
        Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    """
    if not (n > 0 and 0 <= successes <= n * (1 + 1e-12)):
        raise RangeError(f"{successes} successes of {n} trials; expected 0 ≤ successes ≤ n, n > 0")
    p = min(1.0, successes / n)
    scale = 1 / (1 + _Z**2 / n)
    centre = scale * (p + _Z**2 / (2 * n))
    half = scale * _Z * np.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    low, high = float(centre - half), float(centre + half)
    return (0.0 if p == 0 else max(0.0, low)), (1.0 if p == 1 else min(1.0, high))


def rate(shares: ArrayLike, draws: int = 1) -> Rate:
    """Mean of per-sample shares with a 95 % interval over samples and draws.

    For 0/1 facts this is Wilson's interval. For shares of `draws` draws it is Wilson's interval
    with the effective number of trials m(1−m)/Var(mean), which lies between the number of samples
    (draws of a sample all agree) and samples × draws (they are all independent). Four samples are
    added to the variance, two always right and two never: a kind of sample that is too rare to
    have been met may still be there, and without them a few failing draws among many right ones
    would give a narrower interval than none.

    Args:
        shares: (N,) values in [0, 1].
        draws: Draws behind each share.

    Raises:
        RangeError: If there are no samples or a share lies outside [0, 1].

    References:
        Agresti, Coull, "Approximate is better than exact for interval estimation of binomial
        proportions", The American Statistician 1998: two successes and two failures, there added
        to the estimate, here to its variance.
    """
    values = np.asarray(shares, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise RangeError(f"a rate of {values.shape} samples; expected at least one sample")
    if not ((values >= 0) & (values <= 1)).all():
        raise RangeError("shares outside [0, 1]")
    n, mean = len(values), float(values.mean())
    effective = float(n)
    if draws > 1 and n > 1 and 0 < mean < 1:
        spread = float(((values - mean) ** 2).sum()) + 2 * mean**2 + 2 * (1 - mean) ** 2
        variance = spread / ((n - 1) * n)
        effective = min(max(mean * (1 - mean) / variance, float(n)), float(n * draws))
    low, high = wilson(mean * effective, effective)
    return Rate(mean, low, high, n)


def ratio(numerator: ArrayLike, denominator: ArrayLike, resamples: int = 2000) -> Rate:
    """Ratio of two means over the same samples, with a percentile bootstrap interval.

    Samples are resampled in pairs, with keys that depend on nothing but the number of samples, so
    the interval is reproducible. Two pairs are added to what is resampled, (0, 1) and (1, 1):
    without them a numerator of zeros would have the interval [0, 0]. May exceed 1.

    Args:
        numerator: (N,) facts.
        denominator: (N,) facts of the same samples.
        resamples: Bootstrap resamples.

    Raises:
        RangeError: If the denominator's mean is not positive.
        ShapeError: If the two differ in length.
    """
    top, bottom = (np.asarray(v, dtype=np.float64) for v in (numerator, denominator))
    if top.shape != bottom.shape:
        raise ShapeError(f"{top.shape} against {bottom.shape} samples; expected the same samples")
    if top.ndim != 1 or not len(bottom) or bottom.mean() <= 0:
        raise RangeError(
            f"the ratio's denominator is {bottom.mean() if len(bottom) else 0:g}; expected more "
            "than zero: no sample is right without attack, or the attack did no harm"
        )
    value = float(top.mean() / bottom.mean())
    wide_top, wide_bottom = np.append(top, [0.0, 1.0]), np.append(bottom, [1.0, 1.0])
    keys, n = random.keys(0, resamples), len(wide_top)
    found = []
    for start in range(0, resamples, max(1, _CHUNK // n)):
        part = keys[start : start + max(1, _CHUNK // n)]
        picks = random.integers(part, 0, n, (n,)).numpy()
        above, below = wide_top[picks].sum(1), wide_bottom[picks].sum(1)
        found.append(above[below > 0] / below[below > 0])
    low, high = np.quantile(np.concatenate(found), [0.025, 0.975])
    return Rate(value, min(float(low), value), max(float(high), value), len(top))


def attack_survival(attacked: ArrayLike, clean: ArrayLike) -> Rate:
    """S0's attack survival rate: the bare model's accuracy under attack over its clean accuracy."""
    return ratio(attacked, clean)


def defense_success(defended: ArrayLike, clean: ArrayLike) -> Rate:
    """S0's defense success rate: accuracy of the defended model under attack over clean accuracy.

    Deviations: S0's code logs another quantity, `defense_recovery`.
    """
    return ratio(defended, clean)


def defense_recovery(defended: ArrayLike, attacked: ArrayLike, clean: ArrayLike) -> Rate:
    """What S0's code logs as the defense rate: 1 − (clean − defended) / (clean − attacked).

    The share of the accuracy that the attack took which the defense gives back.

    Raises:
        RangeError: If the attack did not lower the accuracy.
    """
    base = np.asarray(attacked, dtype=np.float64)
    return ratio(
        np.asarray(defended, dtype=np.float64) - base, np.asarray(clean, dtype=np.float64) - base
    )


def newly_misclassified(attacked: ArrayLike, clean: ArrayLike, draws: int = 1) -> Rate:
    """S3's measure: share of the correctly classified samples that the attack makes wrong.

    For shares of draws, each sample counts with its share of correct draws before the attack.

    Raises:
        RangeError: If no sample is classified correctly without attack.
    """
    after, before = (np.asarray(v, dtype=np.float64) for v in (attacked, clean))
    if after.shape != before.shape:
        raise ShapeError(f"{after.shape} against {before.shape} samples; expected the same samples")
    if not (before > 0).any():
        raise RangeError("no sample is right without attack, so none can be newly misclassified")
    if np.isin(before, (0.0, 1.0)).all():
        return rate(1 - after[before == 1], draws)
    return ratio(before * (1 - after), before)


def mcnemar(first: ArrayLike, second: ArrayLike) -> float:
    """Exact two-sided p-value that two 0/1 facts on the same samples have the same rate."""
    a, b = (np.asarray(v) > 0.5 for v in (first, second))
    if a.shape != b.shape:
        raise ShapeError(f"{a.shape} against {b.shape} samples; expected the same samples")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b).pvalue)


def worst_case(select: ArrayLike, report: ArrayLike) -> NDArray[np.float64]:
    """Per sample, the share under the attack that did worst, judged on draws not used to choose it.

    Args:
        select: (A, N) shares correct on the first half of the draws: each sample's attack is
            chosen here.
        report: (A, N) shares correct on the other half: the chosen attack is read here. Choosing
            and reading on the same draws would count luck as weakness.

    Returns:
        (N,) shares correct.
    """
    choose, read = np.asarray(select, np.float64), np.asarray(report, np.float64)
    if choose.shape != read.shape or choose.ndim != 2:
        raise ShapeError(f"{choose.shape} and {read.shape}; expected (attacks, samples) twice")
    # Ties, which few draws make common, go to the attack that is the strongest over all samples.
    order = np.argsort(choose.mean(1), kind="stable")
    return read[order[choose[order].argmin(0)], np.arange(choose.shape[1])]


def worst_case_both(even: ArrayLike, odd: ArrayLike, draws: int = 1) -> NDArray[np.float64]:
    """`worst_case` both ways, so that every draw is read once: chosen on the other half's draws.

    With a single attack this is that attack's own share.

    Args:
        even: (A, N) shares correct on the even draws.
        odd: (A, N) shares correct on the odd draws.
        draws: Draws in all; with one draw the halves are the same.
    """
    if draws == 1:
        return worst_case(even, odd)
    fewer = draws // 2
    return (fewer * worst_case(even, odd) + (draws - fewer) * worst_case(odd, even)) / draws


def clearly_more(
    first: ArrayLike, first_draws: ArrayLike, second: ArrayLike, second_draws: ArrayLike
) -> NDArray[np.bool_]:
    """Per sample, whether `first` of so many draws is more than `second`, beyond chance.

    Single draws are compared as they are (the pipeline is deterministic). Otherwise the difference
    of the shares must exceed three standard errors of the pooled share, to which one success and
    one failure are added.

    Args:
        first: (N,) counts.
        first_draws: (N,) draws behind them, or one number.
        second: (N,) counts to compare with.
        second_draws: (N,) draws behind them, or one number.
    """
    a, m, b, k = (np.asarray(v, np.float64) for v in (first, first_draws, second, second_draws))
    pooled = (a + b + 1) / (m + k + 2)
    error = np.sqrt(pooled * (1 - pooled) * (1 / m + 1 / k))
    single = (m == 1) & (k == 1)
    return np.asarray(np.where(single, a > b, a / m - b / k > 3 * error), dtype=np.bool_)


def distances(x_adv: torch.Tensor, x: torch.Tensor) -> dict[str, NDArray[np.float64]]:
    """The four distances per sample, in float64.

    Returns:
        `rms` √mean δ², `abs_l2` ‖δ‖₂, `relative_l2` ‖δ‖₂/‖x‖₂ (NaN for a black
        image), `linf` max|δ|.
    """
    delta = (x_adv.double() - x.double()).flatten(1)
    size = torch.linalg.vector_norm(delta, dim=1)
    base = torch.linalg.vector_norm(x.double().flatten(1), dim=1)
    return {
        "rms": (size / delta.shape[1] ** 0.5).cpu().numpy(),
        "abs_l2": size.cpu().numpy(),
        "relative_l2": torch.where(base > 0, size / base, torch.nan).cpu().numpy(),
        "linf": delta.abs().amax(1).cpu().numpy(),
    }
