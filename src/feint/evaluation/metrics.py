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
    "defense_success",
    "distances",
    "mcnemar",
    "newly_misclassified",
    "rate",
    "ratio",
    "wilson",
    "worst_case",
]

_Z = float(stats.norm.ppf(0.975))


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
    with the effective number of trials n_eff = m(1−m)/Var(mean), which lies between the number of
    samples (draws of a sample all agree) and samples × draws (they are all independent).

    Args:
        shares: (N,) values in [0, 1].
        draws: Draws behind each share.

    Raises:
        RangeError: If there are no samples or a share lies outside [0, 1].
    """
    values = np.asarray(shares, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise RangeError(f"a rate of {values.shape} samples; expected at least one sample")
    if not ((values >= 0) & (values <= 1)).all():
        raise RangeError("shares outside [0, 1]")
    n, mean = len(values), float(values.mean())
    effective = float(n)
    if draws > 1 and n > 1 and 0 < mean < 1:
        variance = float(values.var(ddof=1)) / n
        most = float(n * draws)
        effective = most if variance == 0 else mean * (1 - mean) / variance
        effective = min(max(effective, float(n)), most)
    low, high = wilson(mean * effective, effective)
    return Rate(mean, low, high, n)


def ratio(numerator: ArrayLike, denominator: ArrayLike, resamples: int = 2000) -> Rate:
    """Ratio of two means over the same samples, with a percentile bootstrap interval.

    Samples are resampled in pairs, with keys that depend on nothing but the number of samples, so
    the interval is reproducible. May exceed 1.

    Raises:
        RangeError: If the denominator's mean is zero.
        ShapeError: If the two differ in length.
    """
    top, bottom = (np.asarray(v, dtype=np.float64) for v in (numerator, denominator))
    if top.shape != bottom.shape:
        raise ShapeError(f"{top.shape} against {bottom.shape} samples; expected the same samples")
    if not len(bottom) or bottom.mean() == 0:
        raise RangeError("the ratio's denominator is zero: no sample is classified correctly")
    keys = random.keys(0, resamples)
    picks = random.integers(keys, 0, len(top), (len(top),)).numpy()
    below = bottom[picks].mean(1)
    values = top[picks].mean(1)[below > 0] / below[below > 0]
    low, high = np.quantile(values, [0.025, 0.975])
    return Rate(float(top.mean() / bottom.mean()), float(low), float(high), len(top))


def attack_survival(attacked: ArrayLike, clean: ArrayLike) -> Rate:
    """S0's attack survival rate: the bare model's accuracy under attack over its clean accuracy."""
    return ratio(attacked, clean)


def defense_success(defended: ArrayLike, clean: ArrayLike) -> Rate:
    """S0's defense success rate: accuracy of the defended model under attack over clean accuracy.

    Deviations: S0's code logs another quantity, 1 − (acc_clean − acc_def)/(acc_clean − acc_att).
    """
    return ratio(defended, clean)


def newly_misclassified(attacked: ArrayLike, clean: ArrayLike) -> Rate:
    """S3's measure: share of the correctly classified samples that the attack makes wrong.

    Raises:
        RangeError: If no sample is classified correctly without attack.
    """
    lost = np.asarray(attacked, dtype=np.float64)[np.asarray(clean, dtype=np.float64) > 0.5]
    return rate(1 - lost)


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
    return read[choose.argmin(0), np.arange(choose.shape[1])]


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
