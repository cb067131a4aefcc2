"""All checks of a run, in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from feint.core.gradients import is_stochastic
from feint.evaluation.cell import Cell
from feint.evaluation.findings import Finding
from feint.evaluation.health.across import check_across
from feint.evaluation.health.case import strongest
from feint.evaluation.health.cells import check_cell
from feint.evaluation.health.controls import CONTROLS
from feint.evaluation.health.pipelines import check_pipeline
from feint.evaluation.health.together import check_together
from feint.evaluation.health.words import knows
from feint.evaluation.results import CellResult, by_deployment
from feint.evaluation.samples import Samples
from feint.evaluation.shard import Subject

__all__ = ["PROBE", "SAMPLES", "check"]

PROBE = 16
"""Samples that the pipeline checks look at."""
SAMPLES = 64
"""Samples on which the step count is doubled and random points are tried."""


def check(
    results: Sequence[CellResult],
    resolve: Callable[[Cell], Subject],
    samples: Samples,
    *,
    batch_size: int,
    costly: Sequence[str] = (),
) -> list[Finding]:
    """All checks of a run.

    Args:
        results: Its cells.
        resolve: Gives a cell's objects.
        samples: The run's samples; the first ones are looked at again.
        batch_size: Images per forward pass.
        costly: Names of checks on request (`feint.evaluation.checklist.COSTLY`).

    Cost: for every pipeline that a white-box cell attacked, on at most 64 samples: twice the
        steps of its strongest attack where they still stand, and 20 random points each.
    """
    found: list[Finding] = []
    if not results:
        return found
    larger = samples.read(0, min(SAMPLES, len(samples)))
    probe = larger.select(slice(0, PROBE))
    groups = list(by_deployment(results).values())
    for group in groups:
        best = strongest(group)
        cell = group[0].cell if best is None else best.cell
        left = 1.0 if best is None else best.accuracy.value
        found += check_pipeline(resolve(cell), cell, probe, batch_size=batch_size, left=left)
    for group in groups:
        answered = any(knows(r.cell) for r in group)
        for result in group:
            stochastic = is_stochastic(resolve(result.cell).judged(result.cell))
            found += check_cell(result, stochastic, answered)
    found += check_across(results)
    for group in groups:
        found += check_together(group, resolve, larger, batch_size, costly)
    for check in costly:
        if check in CONTROLS:
            found += CONTROLS[check](results, batch_size)
    return found
