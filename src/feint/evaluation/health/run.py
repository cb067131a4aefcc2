"""All checks of a run, in a fixed order, within a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from feint.core.gradients import is_stochastic
from feint.evaluation.asked import SHARE
from feint.evaluation.cell import Cell
from feint.evaluation.findings import Finding
from feint.evaluation.health import budget as budgets
from feint.evaluation.health.across import check_across
from feint.evaluation.health.case import strongest
from feint.evaluation.health.cells import check_cell
from feint.evaluation.health.controls import CONTROLS
from feint.evaluation.health.costly import EXPERIMENTS
from feint.evaluation.health.plan import of_case, of_pipeline
from feint.evaluation.health.together import cases_of, check_rows
from feint.evaluation.health.words import knows
from feint.evaluation.recorder import Passes
from feint.evaluation.results import CellResult, by_deployment
from feint.evaluation.samples import Samples
from feint.evaluation.shard import Subject

__all__ = ["PROBE", "SAMPLES", "check"]

PROBE = 16
"""Samples that the pipeline checks look at, at most."""
SAMPLES = 64
"""Samples on which the step count is doubled and random points are tried, at most."""


def check(
    results: Sequence[CellResult],
    resolve: Callable[[Cell], Subject],
    samples: Samples,
    *,
    batch_size: int,
    costly: Sequence[str] = (),
    share: float = SHARE,
) -> list[Finding]:
    """All checks of a run.

    Those that read rows cost no pass. Those that ask a pipeline again share a budget
    (`feint.evaluation.health.budget`): first each pipeline and its gradient, then the small
    experiments with its strongest attack, each on as many samples as the budget allows.

    Args:
        results: Its cells.
        resolve: Gives a cell's objects.
        samples: The run's samples; the first ones are looked at again.
        batch_size: Images per forward pass.
        costly: Names of checks on request (`feint.evaluation.checklist.COSTLY`); they come on top
            of the budget.
        share: The budget, as a share of what the cells took.

    Cost: at most about the budget: for every pipeline that a white-box cell attacked, on at most 64
        samples, twice the steps of its strongest attack where they still stand, 20 random points
        each, and some ten short attacks on 16 samples.
    """
    if not results:
        return []
    larger = samples.read(0, min(SAMPLES, len(samples)))
    probe = larger.select(slice(0, PROBE))
    groups = list(by_deployment(results).values())
    subjects = [resolve(r.cell) for r in results]
    models = {id(s.model): s.model for s in subjects}
    limit = budgets.limit(
        share,
        basis := sum(map(budgets.cost_of, results)),
        len(groups),
        max(budgets.operations(model, probe.x) for model in models.values()),
    )
    with _counted(models) as passes:
        spending = budgets.Spending(limit, passes, basis)
        first: list[budgets.Active] = []
        for group in groups:
            best = strongest(group)
            cell = group[0].cell if best is None else best.cell
            left = 1.0 if best is None else best.accuracy.value
            first += of_pipeline(resolve(cell), cell, probe, batch_size, left)
        cases = [cases_of(group, resolve, larger, batch_size) for group in groups]
        later = [[of_case(case) for case in own] for own in cases]
        everything = [*first, *(active for own in later for case in own for active in case)]
        made = budgets.make(everything, spending)
        found = [f for _ in first for f in next(made)]
        for group in groups:
            answered = any(knows(r.cell) for r in group)
            for result in group:
                stochastic = is_stochastic(resolve(result.cell).judged(result.cell))
                found += check_cell(result, stochastic, answered)
        found += check_across(results)
        for own, theirs in zip(cases, later, strict=True):
            for case, actives in zip(own, theirs, strict=True):
                found += check_rows(case)
                found += [f for _ in actives for f in next(made)]
        found.append(spending.finding())
    for case in (case for own in cases for case in own):
        for check in costly:
            found += EXPERIMENTS[check](case) if check in EXPERIMENTS else ()
    for check in costly:
        if check in CONTROLS:
            found += CONTROLS[check](results, batch_size)
    return found


@contextmanager
def _counted(models: dict[int, nn.Module]) -> Iterator[Passes]:
    """Count the images that pass through models, TorchScript's (which take no hooks) among them."""
    passes = Passes()

    def back(gradient: Tensor) -> None:
        passes.backwards += len(gradient)

    def forth(module: nn.Module, _: tuple[object, ...], output: object) -> None:
        if id(module) in models and isinstance(output, Tensor) and output.ndim:
            passes.forwards += len(output)
            if output.requires_grad:
                output.register_hook(back)

    handle = nn.modules.module.register_module_forward_hook(forth)
    try:
        yield passes
    finally:
        handle.remove()
