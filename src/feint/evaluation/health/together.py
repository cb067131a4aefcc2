"""Checks of one pipeline's cells against each other, and against blind controls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from feint.core import random
from feint.core.norms import random_in_ball
from feint.evaluation.attackers import ParsedAttack
from feint.evaluation.cell import Cell
from feint.evaluation.findings import Finding, Status
from feint.evaluation.health.case import Case, case_of
from feint.evaluation.health.declare import Undeclared
from feint.evaluation.health.experiments import ZERO
from feint.evaluation.health.words import attack_words, knows, steps_of
from feint.evaluation.results import CellResult
from feint.evaluation.scenarios import get_scenario
from feint.evaluation.shard import Batch, Subject

__all__ = ["RANDOM_POINTS", "cases_of", "check_rows", "random_points", "zero_budget"]

RANDOM_POINTS = 20
"""Random points per sample of the blind control."""
NUMBERS = 1 << 22
"""Random numbers that are drawn at a time."""


def cases_of(
    group: Sequence[CellResult],
    resolve: Callable[[Cell], Subject],
    batch: Batch,
    batch_size: int,
) -> list[Case]:
    """One pipeline's cells by threat model, those that hold an attacker who knows the pipeline.

    Args:
        group: The cells of one deployed pipeline.
        resolve: Gives a cell's objects.
        batch: The run's first samples.
        batch_size: Images per forward pass.
    """
    threats = list(dict.fromkeys((r.cell.norm, r.cell.targeted) for r in group if knows(r.cell)))
    found = []
    for norm, targeted in threats:
        here = [
            r
            for r in group
            if r.cell.attack == "none" or (r.cell.norm, r.cell.targeted) == (norm, targeted)
        ]
        case = case_of(here, resolve, batch, batch_size)
        if len(threats) > 1:
            words = f"{case.name}, {norm}" + (", targeted" if targeted else "")
            case = replace(case, name=words)
        found.append(case)
    return found


def check_rows(case: Case) -> Iterator[Finding]:
    """What a case's rows say of each other: it needs no pass.

    Args:
        case: A pipeline's cells of one threat model.
    """
    yield from _weaker_attackers(case)
    yield from _larger_budgets(case.group, case.name)


def _weaker_attackers(case: Case) -> Iterator[Finding]:
    for result in case.group:
        cell = result.cell
        judged = get_scenario(cell.scenario).judged == "pipeline"
        if cell.attack == "none" or not judged or id(result) in case.white:
            continue
        if cell.eps > case.cell.eps:
            continue
        lost = case.lost(result.rows["correct"], result.rows["draws"])
        yield Finding(
            "white-box-is-strongest",
            "fail" if lost.mean() > 0.02 else "warn" if lost.any() else "pass",
            case.name,
            f"{cell.scenario} {attack_words(cell.attack)} breaks {int(lost.sum())} of {len(lost)} "
            "samples that no white-box gradient attack broke (fail above 2 %)",
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
                f"{more.cell.scenario} {attack_words(more.cell.attack)}: accuracy "
                f"{less.accuracy} at eps {less.cell.eps:.4g}, {more.accuracy} at "
                f"{more.cell.eps:.4g} (warn if a larger budget clearly leaves more)",
            )


def random_points(case: Case, parsed: ParsedAttack) -> Iterator[Finding]:
    """Random points of the ball (half of them corners for linf) against the white-box attacks."""
    check, places = "random-does-not-win", case.standing
    if not len(places):
        evidence = f"0 of {len(case.batch)} samples stand to be tried at random points"
        yield Finding(check, "pass", case.name, evidence)
        return
    cell, batch = case.cell, case.select(places)
    keys = random.keys(cell.seed, batch.index).to(batch.x.device)
    size = max(1, NUMBERS // (RANDOM_POINTS * batch.x[0].numel()))
    parts = [
        _worst_point(case, batch.select(slice(i, i + size)), keys[i : i + size])
        for i in range(0, len(batch), size)
    ]
    # The luckiest of the points looks strong on the draws that chose it: judge it on fresh ones.
    draws = max(2, cell.judge_draws)
    found = case.judge(torch.cat(parts), batch.y, keys, draws, "blind-judge")
    lost = case.also_lost(places, found.correct.numpy(), found.draws)
    yield Finding(
        check,
        "fail" if lost.mean() > 0.02 else "warn" if lost.any() else "pass",
        case.name,
        f"{RANDOM_POINTS} random points of the {cell.norm} ball break {int(lost.sum())} of the "
        f"{len(places)} samples that the white-box attacks left standing (fail above 2 % of all "
        f"{len(lost)})",
    )


def _worst_point(case: Case, batch: Batch, keys: Tensor) -> Tensor:
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


def zero_budget(case: Case, parsed: ParsedAttack) -> Iterator[Finding]:
    """The attack with a budget of zero: it must give the images back, judged as they were."""
    few, check = case.batch, "zero-budget"
    if parsed.info.goal != "budget" or "eps" not in parsed.info.parameters:
        evidence = f"{parsed.info.name} has no budget to set to zero"
        yield Finding(check, "pass", case.name, evidence)
        return
    # Whatever budget the expression names, here it is zero; a few steps show as much as many.
    kwargs = {**parsed.kwargs, "eps": 0.0}
    steps = steps_of(parsed)
    if steps is not None:
        kwargs["steps"] = min(ZERO, steps)
    x_adv, rows = case.attack(replace(parsed, kwargs=kwargs), few, 0.0)
    moved = int((x_adv != few.x).flatten(1).any(1).sum())
    evidence = f"at eps = 0 the attack changes {moved} of {len(few)} images"
    clean = next(
        (
            r
            for r in case.group
            if r.cell.scenario == "none"
            and (r.cell.seed, r.draws) == (case.cell.seed, int(rows["draws"].max()))
        ),
        None,
    )
    pipeline = case.subject.pipeline(case.cell)
    unkeyed = any(isinstance(m, Undeclared) and not m.keyed for m in pipeline.modules())
    other = 0
    if clean is not None and not unkeyed:
        other = int((rows["correct"] != clean.rows["correct"][: len(few)]).sum())
        evidence += (
            f", and {other} are judged otherwise than the clean ones (one may be, by rounding)"
        )
    status: Status = "pass" if moved == 0 and other <= 1 else "fail"
    yield Finding(check, status, case.name, evidence)
