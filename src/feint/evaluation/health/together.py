"""Checks of one pipeline's cells against each other, and against blind controls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feint.core import random
from feint.core.norms import random_in_ball
from feint.evaluation.attackers import ParsedAttack, parse_attack
from feint.evaluation.cell import Cell
from feint.evaluation.findings import Finding, Status
from feint.evaluation.health.declare import Undeclared
from feint.evaluation.judge import Judgement, judge
from feint.evaluation.metrics import clearly_more
from feint.evaluation.results import CellResult
from feint.evaluation.scenarios import get_scenario
from feint.evaluation.shard import Batch, Rows, Subject, judge_shard
from feint.evaluation.verdict import name_of

__all__ = ["check_together", "strongest"]

RANDOM_POINTS = 20
"""Random points per sample of the blind control."""
FEW = 16
"""Samples that are attacked with a budget of zero."""
NUMBERS = 1 << 22
"""Random numbers that are drawn at a time."""


def strongest(group: Sequence[CellResult]) -> CellResult | None:
    """The white-box cell that left the least, among those that differentiate where there are any.

    Only cells of the group's largest budget count.
    """
    white = [r for r in group if r.cell.scenario == "white-box"]
    white = [r for r in white if parse_attack(r.cell.attack).needs_gradient] or white
    if not white:
        return None
    budget = max(r.cell.eps for r in white if r.cell.norm == white[0].cell.norm)
    here = [r for r in white if r.cell.norm == white[0].cell.norm and r.cell.eps == budget]
    return min(here, key=lambda r: r.accuracy.value)


@dataclass(frozen=True)
class _Case:
    """A pipeline under its strongest white-box cell, and the counts that white-box attacks left."""

    subject: Subject
    cell: Cell
    batch: Batch
    group: Sequence[CellResult]
    right: NDArray[np.float64]
    """(N,) draws right under the gradient attack that did worst to each sample."""
    draws: NDArray[np.float64]
    batch_size: int
    name: str

    @property
    def keys(self) -> Tensor:
        """Keys of the batch's samples."""
        return random.keys(self.cell.seed, self.batch.index).to(self.batch.x.device)

    def lost(self, right: NDArray[Any], draws: NDArray[Any] | int) -> NDArray[np.bool_]:
        """Samples that white-box attacks left standing and that other counts show to fall."""
        n = len(right)
        standing = self.right[:n] / self.draws[:n] > 0.5
        falls = np.asarray(right) / draws <= 0.5
        return standing & falls & clearly_more(self.right[:n], self.draws[:n], right, draws)

    def attack(self, attack: ParsedAttack, batch: Batch, eps: float) -> tuple[Tensor, Rows]:
        """The cell's attack with other settings, and its judged rows."""
        attacker = replace(self.subject.attacker(self.cell), attack=attack, eps=eps)
        keys = random.keys(self.cell.seed, batch.index)
        found = attacker.run(batch.x, batch.goal(self.cell.targeted), keys, self.batch_size)
        cell = replace(self.cell, eps=eps)
        return found.x_adv, judge_shard(cell, self.subject, batch, found, self.batch_size)

    def judge(self, x: Tensor, y: Tensor, keys: Tensor, draws: int, purpose: str) -> Judgement:
        """Fresh draws of the deployed pipeline."""
        pipeline = self.subject.judged(self.cell)
        return judge(pipeline, x, y, keys, draws=draws, batch_size=self.batch_size, purpose=purpose)


def check_together(
    group: Sequence[CellResult],
    resolve: Callable[[Cell], Subject],
    batch: Batch,
    batch_size: int,
) -> Iterator[Finding]:
    """Checks of one pipeline's cells against each other, and against blind controls.

    Args:
        group: The cells of one deployed pipeline.
        resolve: Gives a cell's objects.
        batch: The run's first samples.
        batch_size: Images per forward pass.
    """
    best = strongest(group)
    if best is None:
        return
    cell, gradient = best.cell, parse_attack(best.cell.attack).needs_gradient
    white = [
        r
        for r in group
        if r.cell.scenario == "white-box"
        and (r.cell.norm, r.cell.targeted) == (cell.norm, cell.targeted)
        and parse_attack(r.cell.attack).needs_gradient == gradient
    ]
    worst = np.argmin([r.shares for r in white], axis=0), np.arange(len(best.shares))
    case = _Case(
        resolve(cell),
        cell,
        batch,
        group,
        np.stack([r.rows["correct"] for r in white])[worst].astype(np.float64),
        np.stack([r.rows["draws"] for r in white])[worst].astype(np.float64),
        batch_size,
        name_of(cell.model, cell.defense),
    )
    yield from _weaker_attackers(case, white)
    yield from _larger_budgets(group, case.name)
    yield _random_points(case)
    yield _zero_budget(case)
    yield from _more_steps(case)


def _weaker_attackers(case: _Case, white: Sequence[CellResult]) -> Iterator[Finding]:
    mine = case.cell
    for result in case.group:
        cell = result.cell
        same = (cell.norm, cell.targeted) == (mine.norm, mine.targeted) and cell.eps <= mine.eps
        if cell.attack == "none" or not same or get_scenario(cell.scenario).judged != "pipeline":
            continue
        if any(result is r for r in white):
            continue
        lost = case.lost(result.rows["correct"], result.rows["draws"])
        yield Finding(
            "white-box-is-strongest",
            "fail" if lost.mean() > 0.02 else "warn" if lost.any() else "pass",
            case.name,
            f"{cell.scenario} {cell.attack} breaks {int(lost.sum())} of {len(lost)} samples that "
            "no white-box gradient attack broke (fail above 2 %)",
        )


def _larger_budgets(group: Sequence[CellResult], name: str) -> Iterator[Finding]:
    """Does the same attack with more budget leave more?"""
    families: dict[Cell, list[CellResult]] = {}
    for result in group:
        if result.cell.attack != "none":
            families.setdefault(replace(result.cell, eps=0.0), []).append(result)
    for family in families.values():
        ordered = sorted(family, key=lambda r: r.cell.eps)
        for less, more in pairwise(ordered):
            rise = more.accuracy.value - less.accuracy.value
            clear = more.accuracy.low > less.accuracy.high or (more.draws == 1 and rise > 0.02)
            yield Finding(
                "monotone-in-eps",
                "warn" if rise > 0 and clear else "pass",
                name,
                f"{more.cell.scenario} {more.cell.attack}: accuracy {less.accuracy} at eps "
                f"{less.cell.eps:.4g}, {more.accuracy} at {more.cell.eps:.4g} (warn if a larger "
                "budget clearly leaves more)",
            )


def _random_points(case: _Case) -> Finding:
    """Random points of the ball (half of them corners for linf) against the white-box attacks."""
    cell, batch, keys = case.cell, case.batch, case.keys
    size = max(1, NUMBERS // (RANDOM_POINTS * batch.x[0].numel()))
    parts = [
        _worst_point(case, batch.select(slice(i, i + size)), keys[i : i + size])
        for i in range(0, len(batch), size)
    ]
    # The luckiest of the points looks strong on the draws that chose it: judge it on fresh ones.
    draws = max(2, cell.judge_draws)
    found = case.judge(torch.cat(parts), batch.y, keys, draws, "blind-judge")
    lost = case.lost(found.correct.numpy(), found.draws)
    return Finding(
        "random-does-not-win",
        "fail" if lost.mean() > 0.02 else "warn" if lost.any() else "pass",
        case.name,
        f"{RANDOM_POINTS} random points of the {cell.norm} ball break {int(lost.sum())} of "
        f"{len(lost)} samples that the white-box attacks left standing (fail above 2 %)",
    )


def _worst_point(case: _Case, batch: Batch, keys: Tensor) -> Tensor:
    """For each sample the random point that is right on the fewest of four draws."""
    number = torch.arange(RANDOM_POINTS, device=keys.device)
    drawn = random.fold(keys, "blind", 0, number).flatten()
    wide = batch.x.repeat_interleave(RANDOM_POINTS, 0)
    delta = random_in_ball(drawn, wide, case.cell.norm, case.cell.eps)
    if case.cell.norm == "linf":
        corner = (number % 2 == 0).repeat(len(batch)).view(-1, 1, 1, 1)
        delta = torch.where(corner, delta.sign() * case.cell.eps, delta)
    points = (wide + delta).clamp(0, 1)
    found = case.judge(points, batch.y.repeat_interleave(RANDOM_POINTS), drawn, 4, "blind")
    share = (found.correct.double() / found.draws).view(len(batch), RANDOM_POINTS)
    best = torch.arange(len(batch)) * RANDOM_POINTS + share.argmin(1)
    return points[best.to(points.device)]


def _steps(parsed: ParsedAttack) -> int | None:
    """The attack's number of steps, if it has one."""
    found = parsed.effective("steps") if "steps" in parsed.info.parameters else None
    return found if isinstance(found, int) else None


def _zero_budget(case: _Case) -> Finding:
    """The attack with a budget of zero: it must give the images back, judged as they were."""
    few, parsed = case.batch.select(slice(0, FEW)), parse_attack(case.cell.attack)
    check = "zero-budget"
    if parsed.info.goal != "budget" or "eps" not in parsed.info.parameters:
        evidence = f"{case.cell.attack} has no budget to set to zero"
        return Finding(check, "pass", case.name, evidence)
    # Whatever budget the expression names, here it is zero; a few steps show as much as many.
    kwargs = {**parsed.kwargs, "eps": 0.0}
    steps = _steps(parsed)
    if steps is not None:
        kwargs["steps"] = min(3, steps)
    x_adv, rows = case.attack(replace(parsed, kwargs=kwargs), few, 0.0)
    moved = int((x_adv != few.x).flatten(1).any(1).sum())
    evidence = f"at eps = 0 the attack changes {moved} of {len(few)} images"
    clean = next((r for r in case.group if r.cell.scenario == "none"), None)
    pipeline = case.subject.pipeline(case.cell)
    unkeyed = any(isinstance(m, Undeclared) and not m.keyed for m in pipeline.modules())
    other = 0
    if clean is not None and not unkeyed:
        other = int((rows["correct"] != clean.rows["correct"][: len(few)]).sum())
        evidence += (
            f", and {other} are judged otherwise than the clean ones (one may be, by rounding)"
        )
    status: Status = "pass" if moved == 0 and other <= 1 else "fail"
    return Finding(check, status, case.name, evidence)


def _more_steps(case: _Case) -> Iterator[Finding]:
    """Twice the steps on the samples that still stand."""
    check, parsed, batch = "more-steps-do-not-help", parse_attack(case.cell.attack), case.batch
    steps = _steps(parsed)
    if steps is None:
        return
    standing = np.flatnonzero(case.right[: len(batch)] / case.draws[: len(batch)] > 0.5)
    if len(standing) == 0:
        evidence = f"no sample of {len(batch)} stands to be tried"
        yield Finding(check, "pass", case.name, evidence)
        return
    left = batch.select(torch.from_numpy(standing).to(batch.x.device))
    doubled = replace(parsed, kwargs={**parsed.kwargs, "steps": 2 * steps})
    _, rows = case.attack(doubled, left, case.cell.eps)
    right, draws = np.zeros(len(batch)), np.ones(len(batch))
    right[:] = case.right[: len(batch)]
    draws[:] = case.draws[: len(batch)]
    right[standing], draws[standing] = rows["correct"], rows["draws"]
    lost = case.lost(right, draws)
    share = float(lost.mean())
    yield Finding(
        check,
        "fail" if share > 0.05 else "warn" if share > 0.02 else "pass",
        case.name,
        f"{2 * steps} steps instead of {steps} break {int(lost.sum())} of the {len(left)} samples "
        f"that stand among {len(batch)} (warn above 2 %, fail above 5 % of all)",
    )
