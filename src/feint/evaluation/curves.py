"""Security curves: one attack at several budgets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from feint.core.errors import ConfigError, RangeError
from feint.evaluation.attackers import parse_attack
from feint.evaluation.cell import Cell
from feint.evaluation.metrics import Rate, rate, worst_case_both
from feint.evaluation.results import CellResult
from feint.evaluation.scenarios import get_scenario

__all__ = ["curve", "curve_from_distances", "security_curve", "worst_curve"]


def curve(cell: Cell, eps: Iterable[float]) -> list[Cell]:
    """The cell at other budgets, by rising eps.

    Args:
        cell: A cell with an attack; the attack's expression must leave the budget open.
        eps: Budgets in image units.

    Raises:
        ConfigError: If the cell has no attack, or its expression or preset names a budget.

    Example:
        >>> base = Cell("white-box", "m", attack="pgd(steps=10)")
        >>> [round(255 * c.eps) for c in curve(base, [8 / 255, 2 / 255])]
        [2, 8]
    """
    if cell.attack == "none":
        raise ConfigError("a cell without attack has no security curve")
    attack = parse_attack(cell.attack)
    if attack.fixes("eps"):
        raise ConfigError(
            f"attack {cell.attack!r} names its own eps {attack.effective('eps'):g}; leave it out "
            "to let the budget vary"
        )
    return [replace(cell, eps=e) for e in sorted({float(e) for e in eps})]


def security_curve(results: Sequence[CellResult], cell: Cell) -> list[tuple[float, Rate]]:
    """(eps, accuracy) of the results that differ from `cell` in their budget only, by rising eps.

    The pipeline's clean cell, where there is one, stands at eps = 0.
    """
    wanted = replace(cell, eps=0.0)
    points = {r.cell.eps: r.accuracy for r in results if replace(r.cell, eps=0.0) == wanted}
    clean = replace(wanted, scenario="none", attack="none", source="")
    for result in results:
        if cell.scenario != "removal" and replace(result.cell, eps=0.0) == clean:
            points.setdefault(0.0, result.accuracy)
    return sorted(points.items(), key=lambda point: point[0])


def curve_from_distances(
    result: CellResult, clean: CellResult, eps: Iterable[float]
) -> list[tuple[float, Rate]]:
    """Accuracy at every budget up to a minimal-norm cell's own, from one attack.

    At budget e an image counts as attacked if the perturbation found for it is at most e, and as
    clean otherwise.

    Args:
        result: A cell of a minimal-norm attack.
        clean: The same pipeline's cell without attack, over the same samples.
        eps: Budgets, none above the cell's.

    Raises:
        ConfigError: If the attack is no minimal-norm attack, or the samples differ.
        RangeError: If a budget exceeds the cell's: nearest images beyond it were not kept.
    """
    if parse_attack(result.cell.attack).info.goal != "minimal":
        raise ConfigError(f"{result.cell.attack} looks for no nearest image; use curve(cell, eps)")
    if not np.array_equal(result.rows["index"], clean.rows["index"]):
        raise ConfigError("the two cells are about other samples; expected the same ones")
    budgets = sorted({float(e) for e in eps})
    if budgets and budgets[-1] > result.cell.eps:
        raise RangeError(
            f"eps {budgets[-1]:g} exceeds the cell's {result.cell.eps:g}; run it with more"
        )
    size, draws = result.rows["size"], max(result.draws, clean.draws)
    return [(e, rate(np.where(size <= e, result.shares, clean.shares), draws)) for e in budgets]


def worst_curve(
    results: Sequence[CellResult], eps: Iterable[float], *, norm: str = "linf"
) -> list[tuple[float, Rate]]:
    """Per-sample worst case at every budget, from all the cells of one pipeline at once.

    An image that some attack made counts at every budget that its measured perturbation keeps to,
    whatever budget the attack was given: one run of a minimal-norm attack gives a whole curve, and
    cells of other budgets add to it. It cannot rise with the budget, but for the luck of draws.

    Args:
        results: Cells of one deployed pipeline over the same samples; its clean cell among them.
        eps: Budgets in image units, none above the largest of the cells.
        norm: The norm in which they are measured: cells of other norms do not count.

    Raises:
        ConfigError: If the clean cell is missing, no cell has an attack in this norm, or samples
            differ.
        RangeError: If a budget exceeds every cell's: nothing was tried there.
    """
    clean = next((r for r in results if r.cell.attack == "none"), None)
    attacked = [
        r
        for r in results
        if r.cell.attack != "none"
        and r.cell.norm == norm
        and get_scenario(r.cell.scenario).judged == "pipeline"
    ]
    if clean is None or not attacked:
        raise ConfigError(f"expected the clean cell and at least one attack in {norm}")
    if not all(np.array_equal(r.rows["index"], clean.rows["index"]) for r in attacked):
        raise ConfigError("the cells are about other samples; expected the same ones")
    budgets, most = sorted({float(e) for e in eps}), max(r.cell.eps for r in attacked)
    if budgets and budgets[-1] > most * (1 + 1e-9):
        raise RangeError(f"eps {budgets[-1]:g} exceeds the cells' {most:g}; run one with more")
    draws = min(r.draws for r in [clean, *attacked])
    points = []
    for budget in budgets:
        even, odd = (
            np.stack([clean.rows[name], *(_within(r, clean, budget, name) for r in attacked)])
            for name in ("correct_even", "correct_odd")
        )
        points.append((budget, rate(np.clip(worst_case_both(even, odd, draws), 0, 1), draws)))
    return points


def _within(result: CellResult, clean: CellResult, budget: float, name: str) -> NDArray[np.float64]:
    """A half's shares where the image keeps to the budget, and the clean ones elsewhere."""
    small = result.rows["size"] <= budget * (1 + 1e-9)
    return np.where(small, result.rows[name], clean.rows[name])
