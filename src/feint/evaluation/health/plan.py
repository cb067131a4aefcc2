"""The checks that ask a pipeline again, with what each would cost: what a budget chooses from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from feint.core.gradients import is_stochastic
from feint.evaluation.attackers import EOT_DRAWS, parse_attack
from feint.evaluation.cell import Cell
from feint.evaluation.findings import Finding
from feint.evaluation.health import differentiable as parts
from feint.evaluation.health import experiments, together
from feint.evaluation.health.budget import BACKWARD, Active
from feint.evaluation.health.case import Case
from feint.evaluation.health.differentiable import check_parts
from feint.evaluation.health.gradients import check_gradient, check_slope, gradient_passes
from feint.evaluation.health.pipelines import CONTRACT, check_contract
from feint.evaluation.health.words import knows, steps_of
from feint.evaluation.shard import Batch, Subject
from feint.evaluation.verdict import name_of

__all__ = ["of_case", "of_pipeline"]


def of_pipeline(
    subject: Subject, cell: Cell, batch: Batch, batch_size: int, left: float
) -> list[Active]:
    """The checks of a deployed pipeline and of its attacker's view, the most telling first.

    Args:
        subject: The cell's objects.
        cell: A cell of the pipeline; if its attacker knows the pipeline, his view is checked, too.
        batch: The samples to choose from.
        batch_size: Images per pass.
        left: Accuracy that the cell's attack left.

    Cost: one gradient of one sample, which is measured.
    """
    name, n = name_of(cell.model, cell.defense), len(batch)

    def some(count: int) -> Batch:
        return batch.select(slice(0, count))

    found = [
        Active(
            CONTRACT,
            name,
            lambda m: 8.0 * m,
            min(2, n),
            n,
            lambda m: check_contract(subject, cell, some(m), name),
        )
    ]
    if not knows(cell):
        return found
    asked = subject.attacker(cell).attack
    stochastic = is_stochastic(subject.pipeline(cell))
    one = gradient_passes(subject, cell, batch)
    draws = EOT_DRAWS if stochastic else 1
    names = ["view-is-exact"]
    if asked.needs_gradient:
        names += ["zero-gradient", "loss-is-alive"]
    if asked.info.knowledge == "gradient":
        names += ["gradient-is-useful", *(["eot-signal"] if stochastic else [])]
    per_view = 2 + (3 if stochastic else 2) * one + 3 * draws if len(names) > 1 else 2.0
    found += [
        Active(
            ("differentiable-parts",),
            name,
            lambda m: float(parts.PASSES * m),
            min(1, n),
            min(parts.FEW, n),
            lambda m: check_parts(subject, cell, batch, name, m),
        ),
        Active(
            tuple(names),
            name,
            lambda m: per_view * m,
            min(4, n),
            n,
            lambda m: check_gradient(subject, cell, some(m), name, batch_size, left),
        ),
    ]
    if len(names) > 1:
        slopes = ("gradient-foretells", "stable-loss") if asked.needs_gradient else ("stable-loss",)
        found.append(
            Active(
                slopes,
                name,
                lambda m: 22.0 * m,
                min(2, n),
                n,
                lambda m: check_slope(subject, cell, some(m), name, batch_size),
            )
        )
    return found


def of_case(case: Case) -> list[Active]:
    """The small experiments with the strongest attack, the cheapest first.

    Args:
        case: A pipeline under its strongest white-box cell.

    Cost: one gradient of one sample, which is measured.
    """
    parsed, n = parse_attack(case.cell.attack), len(case.batch)
    best = next(r for r in case.group if r.cell == case.cell)
    stochastic = is_stochastic(case.subject.pipeline(case.cell))
    draws = max(2, case.cell.judge_draws) if stochastic else 1
    fewer = min(experiments.DRAWS, draws)
    one = gradient_passes(case.subject, case.cell, case.batch)
    spent = (best.forwards + BACKWARD * best.backwards) / max(1, len(best.rows["index"]))
    steps = steps_of(parsed)
    per_step = one if steps is None else max(one, spent / (steps + 1))

    def standing(count: int) -> int:
        return int(np.count_nonzero(case.standing < count))

    def whole(length: int) -> float:
        """Passes of so many steps on a sample that does not fall."""
        return per_step * (length + 1) if steps is not None else max(one, spent)

    def again(length: int) -> float:
        """Passes of so many steps on any sample: most fall as soon as they did in the cell."""
        return min(whole(length), max(1.5 * spent, 2 * one))

    def active(
        names: tuple[str, ...],
        price: float,
        least: int,
        full: int,
        run: experiments.Experiment,
        where: str = "all",
        most: int = n,
    ) -> Active:
        def cost(count: int) -> float:
            return price * min(most, count if where == "all" else standing(count))

        def made(count: int) -> Iterator[Finding]:
            few = replace(case, batch=case.batch.select(slice(0, count)))
            return run(few, parsed)

        return Active(names, case.name, cost, min(least, full), full, made)

    few, fewest = min(experiments.FEW, n), min(experiments.FEWER, n)
    if stochastic:  # each costs a batch of draws
        few, fewest = -(-few // 2), -(-fewest // 2)
    points = together.RANDOM_POINTS * min(4, draws) + draws
    found = [
        active(
            ("zero-budget",),
            whole(experiments.ZERO) + 2 * draws,
            2,
            min(experiments.FEW, n),
            together.zero_budget,
        ),
        active(("random-does-not-win",), points, 4, n, together.random_points, "standing"),
        active(
            ("iterative-beats-single",),
            2 * one + 2 * draws,
            4,
            n,
            experiments.single_step,
            "standing",
        ),
        active(
            ("large-budget-breaks",),
            again(experiments.LONG) + 3 * fewer,
            4,
            few,
            experiments.large_budget,
        ),
        active(
            ("attack-batch-invariance", "logit-shift"),
            5 * again(experiments.SHORT) + 6 * fewer,
            2,
            fewest,
            experiments.repeats,
        ),
    ]
    if parsed.needs_gradient:
        found.append(
            active(
                ("logit-scale",),
                whole(experiments.LONG) + 1 + 2 * draws,
                4,
                n,
                experiments.scale,
                "standing",
                experiments.FEW,
            )
        )
    if steps is not None:
        names = ["more-steps-do-not-help"]
        if experiments.watch(case, parsed) is not None:
            names.append("gradients-along-the-path")
        restarts = parsed.effective("restarts") if "restarts" in parsed.info.parameters else 1
        longer = max(whole(2 * steps) * (restarts if isinstance(restarts, int) else 1), 2 * spent)
        found.append(
            active(tuple(names), longer + 2 * draws, 4, n, experiments.more_steps, "standing")
        )
    return found
