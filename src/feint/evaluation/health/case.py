"""One threat model's cells of a pipeline, ready to be checked against each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from feint.core import random
from feint.core.errors import ConfigError
from feint.evaluation.attackers import ParsedAttack, parse_attack
from feint.evaluation.cell import Cell
from feint.evaluation.judge import Judgement, judge
from feint.evaluation.metrics import clearly_more
from feint.evaluation.results import CellResult
from feint.evaluation.shard import Batch, Rows, Subject, judge_shard
from feint.evaluation.verdict import name_of

__all__ = ["Case", "case_of", "strongest"]


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
class Case:
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
    white: frozenset[int]
    """Identities of the results behind `right`."""

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


def case_of(
    group: Sequence[CellResult],
    resolve: Callable[[Cell], Subject],
    batch: Batch,
    batch_size: int,
) -> Case:
    """The cells of one threat model, at least one of them white-box."""
    best = strongest(group)
    if best is None:
        raise ConfigError("no white-box cell among these; nothing can be checked against them")
    gradient = parse_attack(best.cell.attack).needs_gradient
    white = [
        r
        for r in group
        if r.cell.scenario == "white-box" and parse_attack(r.cell.attack).needs_gradient == gradient
    ]
    worst = np.argmin([r.shares for r in white], axis=0), np.arange(len(best.shares))
    return Case(
        resolve(best.cell),
        best.cell,
        batch,
        group,
        np.stack([r.rows["correct"] for r in white])[worst].astype(np.float64),
        np.stack([r.rows["draws"] for r in white])[worst].astype(np.float64),
        batch_size,
        name_of(best.cell.model, best.cell.defense),
        frozenset(id(r) for r in white),
    )
