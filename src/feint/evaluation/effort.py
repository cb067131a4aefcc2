"""What breaking a pipeline costs: success against rounds, queries or gradient evaluations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from feint.core.errors import ConfigError, RangeError, ShapeError
from feint.evaluation.metrics import Rate, wilson
from feint.evaluation.results import CellResult

__all__ = ["Unit", "effort_curve", "effort_to", "fallen_by"]

Unit = Literal["rounds", "queries", "gradients"]
"""The attack's own steps, forward passes, or backward passes, per sample."""


def fallen_by(
    time: ArrayLike, fell: ArrayLike, at: Iterable[float] | None = None
) -> list[tuple[float, Rate]]:
    """Share of samples that have fallen by a time, where some were given up standing.

    The product-limit estimate: a sample that was given up (right-censored) counts among those that
    might fall for as long as it was tried, and not beyond. If all were tried equally long, this is
    the plain share.

    Args:
        time: (N,) when each sample fell or was given up.
        fell: (N,) bool: whether it fell.
        at: Times of interest; by default every time at which one fell.

    Returns:
        (time, share with 95 % interval), by rising time. Beyond the longest trial nothing is known,
        and the share stays what it was.

    Raises:
        ShapeError: If the two differ in length.
        RangeError: If there are no samples, or a time is not finite.

    References:
        Kaplan, Meier, "Nonparametric estimation from incomplete observations", JASA 1958; interval:
        Rothman, "Estimation of confidence limits for the cumulative probability of survival in
        life table analysis", J. Chronic Dis. 1978 (Wilson's, with the effective number of samples
        that Greenwood's variance implies).
    """
    t, event = np.asarray(time, np.float64), np.asarray(fell, np.bool_)
    if t.shape != event.shape or t.ndim != 1:
        raise ShapeError(f"{t.shape} times, {event.shape} outcomes; expected one of each a sample")
    if len(t) == 0 or not np.isfinite(t).all():
        raise RangeError("expected at least one sample, and a finite time for each")
    moments = np.unique(t[event])
    deaths = np.array([(event & (t == m)).sum() for m in moments], np.float64)
    at_risk = np.array([(t >= m).sum() for m in moments], np.float64)
    standing = np.cumprod(1 - deaths / at_risk)
    with np.errstate(divide="ignore"):
        terms = np.where(at_risk > deaths, deaths / (at_risk * (at_risk - deaths)), np.inf)
    greenwood = np.cumsum(terms)
    wanted = moments if at is None else np.array(sorted({float(m) for m in at}))
    found = []
    for moment in wanted:
        place = int(np.searchsorted(moments, moment, side="right")) - 1
        left = float(standing[place]) if place >= 0 else 1.0
        n = float(len(t))
        if 0 < left < 1:
            n = left * (1 - left) / (left**2 * float(greenwood[place]))
        low, high = wilson((1 - left) * n, n)
        found.append((float(moment), Rate(1 - left, low, high, len(t))))
    return found


def effort_curve(
    result: CellResult,
    unit: Unit = "queries",
    *,
    at: Iterable[float] | None = None,
    verified: bool = False,
) -> list[tuple[float, Rate]]:
    """Share of samples at which the attacker saw a success, against what he had spent on each.

    Only successes within the budget count, of attacks that look beyond it, too.

    Args:
        result: A cell with a traced attack.
        unit: `"rounds"`, `"queries"` or `"gradients"`.
        at: Amounts of interest; by default every one at which a sample fell.
        verified: Count a success only if the image holds on more than half of the judge's fresh
            draws; of a sample with a lucky hit nothing is known from then on (right-censored).

    Raises:
        ConfigError: If the cell has no attack, or one whose effort was not recorded.

    Example:
        >>> import torch
        >>> from feint.evaluation import evaluate
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).eval()
        >>> x = torch.rand(8, 3, 2, 2)
        >>> found = evaluate(model, x, model(x).argmax(1), attacks=["pgd(steps=9)"], eps=0.5)
        >>> effort_curve(found.results[-1], "gradients")[-1][1].value > 0
        True
    """
    if unit not in get_args(Unit):
        raise ConfigError(f"unit is {unit!r}; expected one of {', '.join(get_args(Unit))}")
    cell = result.cell
    time = result.rows.get(unit)
    if cell.attack == "none" or time is None or np.isnan(time).any():
        raise ConfigError(
            f"{cell.scenario} {cell.attack}: its {unit} were not recorded (no attack, one without "
            "a trace, or a run of an earlier version); run it again"
        )
    fell = result.fell
    return fallen_by(time, fell & _held(result) if verified else fell, at)


def effort_to(
    result: CellResult, shares: Iterable[float], unit: Unit = "rounds", *, verified: bool = False
) -> dict[float, float | None]:
    """What reaching each share of successes took, as S1's Table II; None where it was not reached.

    Args:
        result: As for `effort_curve`.
        shares: In (0, 1].
        unit: As for `effort_curve`.
        verified: As for `effort_curve`.

    Raises:
        RangeError: A share outside (0, 1].
    """
    curve, found = effort_curve(result, unit, verified=verified), {}
    for share in shares:
        if not 0 < share <= 1:
            raise RangeError(f"share is {share}; expected a number in (0, 1]")
        reached = (amount for amount, rate in curve if rate.value >= share - 1e-9)
        found[share] = next(reached, None)
    return found


def _held(result: CellResult) -> NDArray[np.bool_]:
    """Images on which the attacker's goal is met on more than half of the judge's draws."""
    rows = result.rows
    won = rows["target_hits"] if result.cell.targeted else rows["draws"] - rows["correct"]
    return np.asarray(won / rows["draws"] > 0.5)
