"""Accuracy against eps: the data of the security curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feint.core.errors import FeintError
from feint.evaluation import SCENARIOS, CellResult, Rate, curve_from_distances
from feint.evaluation.attackers import parse_attack
from feint.evaluation.results import by_deployment, worst
from feint.reports.data import ReportData
from feint.reports.words import deployment_words

__all__ = ["Curve", "Series", "curves", "telling"]

GRID = 9
"""Budgets at which a minimal-norm attack's distances are read."""


@dataclass(frozen=True)
class Series:
    """One line: a scenario's accuracy at every budget where it is known."""

    scenario: str
    points: tuple[tuple[float, Rate], ...]
    """(eps, accuracy), by rising eps; at 0 it is clean accuracy."""
    derived: bool = False
    """Whether points were read from the distances that a minimal-norm attack needed."""


@dataclass(frozen=True)
class Curve:
    """A deployed pipeline's security curves in one norm."""

    name: str
    norm: str
    series: tuple[Series, ...]

    @property
    def reach(self) -> float:
        """The largest budget."""
        return max(eps for s in self.series for eps, _ in s.points)


def curves(data: ReportData) -> list[Curve]:
    """Every curve of a run: table cells and the extra ones, per pipeline, norm and scenario."""
    found = []
    for key, group in by_deployment([*data.results, *data.curve]).items():
        clean = next((r for r in group if r.cell.scenario == "none"), None)
        attacked = [r for r in group if r.cell.attack != "none"]
        for norm, targeted in dict.fromkeys((r.cell.norm, r.cell.targeted) for r in attacked):
            here = [r for r in attacked if (r.cell.norm, r.cell.targeted) == (norm, targeted)]
            series = [
                line
                for scenario in SCENARIOS
                for line in _series(
                    scenario, [r for r in here if r.cell.scenario == scenario], clean
                )
            ]
            if series:
                found.append(Curve(deployment_words(key), norm, tuple(series)))
    return found


def telling(found: list[Curve]) -> list[Curve]:
    """Curves with more than one budget, if there are any: two points are no curve."""
    return [c for c in found if any(len(s.points) > 2 for s in c.series)] or found


def _minimal(result: CellResult) -> bool:
    try:
        return parse_attack(result.cell.attack).info.goal == "minimal"
    except FeintError:
        return False  # a run of another version of Feint, or of a plug-in that is not installed


def _series(scenario: str, cells: Sequence[CellResult], clean: CellResult | None) -> list[Series]:
    if SCENARIOS[scenario].judged != "pipeline":
        clean = None  # its clean accuracy is that of another pipeline
    start = [] if clean is None else [(0.0, clean.accuracy)]
    out = []
    fixed = [r for r in cells if not _minimal(r)]
    budgets = sorted({r.cell.eps for r in fixed if r.cell.eps > 0})
    if budgets:
        points = [(eps, worst([r for r in fixed if r.cell.eps == eps])) for eps in budgets]
        out.append(Series(scenario, tuple(start + points)))
    if clean is not None:
        out += [
            Series(scenario, tuple(_read(result, clean)), derived=True)
            for result in cells
            if _minimal(result)
        ]
    return out


def _read(result: CellResult, clean: CellResult) -> list[tuple[float, Rate]]:
    grid = [result.cell.eps * n / (GRID - 1) for n in range(GRID)]
    return curve_from_distances(result, clean, grid)
