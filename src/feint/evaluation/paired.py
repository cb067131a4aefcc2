"""Two pipelines on the same samples: is one really better?"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike

from feint.core.errors import ConfigError, RangeError, ShapeError
from feint.evaluation.metrics import _Z, Rate, mcnemar
from feint.evaluation.results import CellResult, worst_shares

__all__ = ["Paired", "compare", "difference", "paired"]


@dataclass(frozen=True)
class Paired:
    """Two sets of facts about the same samples, side by side."""

    n: int
    both: int
    """Samples that both get right; of a random pipeline, on more than half of the draws."""
    only_first: int
    only_second: int
    neither: int
    difference: Rate
    """Mean of the first minus mean of the second, in [−1, 1], with its 95 % interval."""
    p_value: float
    """McNemar's exact test that both are right equally often."""

    def as_dict(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        d = self.difference
        return (
            f"{100 * d.value:+.1f} points [{100 * d.low:+.1f}, {100 * d.high:+.1f}], "
            f"n = {self.n}, {self.only_first} against {self.only_second} samples, "
            f"p = {self.p_value:.3g}"
        )


def difference(first: ArrayLike, second: ArrayLike) -> Rate:
    """Difference of two rates over the same samples, with a 95 % interval.

    For 0/1 facts this is Bonett and Price's adjusted Wald interval: one sample that only the first
    gets right and one that only the second does are added. Shares of draws are treated alike, their
    difference sample by sample. The value itself is not adjusted.

    Args:
        first: (N,) values in [0, 1].
        second: (N,) values of the same samples.

    Raises:
        ShapeError: If the two differ in length.
        RangeError: If there are no samples, or a value lies outside [0, 1].

    References:
        Bonett, Price, "Adjusted Wald confidence interval for a difference of binomial proportions
        based on paired data", J. Educ. Behav. Stat. 2012.
    """
    a, b = (np.asarray(v, dtype=np.float64) for v in (first, second))
    if a.shape != b.shape or a.ndim != 1:
        raise ShapeError(f"{a.shape} against {b.shape} samples; expected the same samples")
    if len(a) == 0 or not ((a >= 0) & (a <= 1) & (b >= 0) & (b <= 1)).all():
        raise RangeError("expected at least one sample, and values in [0, 1]")
    gaps = a - b
    wide = np.append(gaps, [1.0, -1.0])
    middle, count = float(wide.mean()), len(wide)
    half = _Z * float(np.sqrt((np.square(wide).mean() - middle**2) / count))
    value = float(gaps.mean())
    low, high = max(-1.0, middle - half), min(1.0, middle + half)
    return Rate(value, min(low, value), max(high, value), len(gaps))


def paired(first: ArrayLike, second: ArrayLike) -> Paired:
    """Compare facts, or shares of draws, of the same samples.

    Args:
        first: (N,) values in [0, 1].
        second: (N,) values of the same samples, in the same order.

    Raises:
        As `difference`.

    Example:
        >>> found = paired([1, 1, 1, 0], [1, 0, 0, 0])
        >>> found.only_first, found.difference.value, found.p_value
        (2, 0.5, 0.5)
    """
    gap = difference(first, second)
    a, b = (np.asarray(v, np.float64) > 0.5 for v in (first, second))
    return Paired(
        len(a),
        int((a & b).sum()),
        int((a & ~b).sum()),
        int((b & ~a).sum()),
        int((~a & ~b).sum()),
        gap,
        mcnemar(a, b),
    )


def compare(first: CellResult | list[CellResult], second: CellResult | list[CellResult]) -> Paired:
    """Compare two pipelines by their cells over the same samples.

    Args:
        first: A cell, or the cells of one deployed pipeline within one threat model: then their
            per-sample worst case counts, every attack chosen and read on different draws.
        second: As `first`, of the other pipeline.

    Raises:
        ConfigError: If the two are about other samples, or about other threat models.
    """
    groups = [v if isinstance(v, list) else [v] for v in (first, second)]
    if not all(groups):
        raise ConfigError("there are no cells to compare")
    threats = {
        (r.cell.norm, r.cell.eps, r.cell.targeted)
        for group in groups
        for r in group
        if r.cell.attack != "none"
    }
    if len(threats) > 1:
        raise ConfigError(
            f"the cells are about {len(threats)} threat models (norm, eps, targeted: "
            f"{sorted(threats)}); compare pipelines under one"
        )
    index = groups[0][0].rows["index"]
    if not all(np.array_equal(r.rows["index"], index) for group in groups for r in group):
        raise ConfigError("the cells are about other samples; expected the same ones in order")
    return paired(*map(worst_shares, groups))
