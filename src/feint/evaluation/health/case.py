"""One threat model's cells of a pipeline, ready to be checked against each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from feint.core import random
from feint.core.errors import ConfigError
from feint.evaluation.attackers import Attacked, ParsedAttack, parse_attack
from feint.evaluation.cell import Cell
from feint.evaluation.findings import Status
from feint.evaluation.health.words import knows
from feint.evaluation.judge import Judgement, judge
from feint.evaluation.metrics import clearly_more
from feint.evaluation.results import CellResult
from feint.evaluation.shard import Batch, Rows, Subject, judge_shard
from feint.evaluation.verdict import name_of

__all__ = ["Case", "case_of", "graded", "reduced", "strongest"]


def graded(lost: NDArray[np.bool_]) -> Status:
    """Fail above 5 % of the samples, warn above 2 %, pass below two samples."""
    share, count = float(lost.mean()) if len(lost) else 0.0, int(lost.sum())
    if count < 2:
        return "pass"
    return "fail" if share > 0.05 else "warn" if share > 0.02 else "pass"


def reduced(parsed: ParsedAttack, steps: int, **more: Any) -> ParsedAttack:
    """The attack with at most so many steps (and queries), one start, and other settings."""
    kwargs = dict(parsed.kwargs)
    parameters = parsed.info.parameters
    for key, most in (("steps", steps), ("queries", 20 * steps), ("restarts", 1)):
        now = parsed.effective(key) if key in parameters else None
        if isinstance(now, int):
            kwargs[key] = min(now, most)
    kwargs |= {key: value for key, value in more.items() if key in parameters}
    return replace(parsed, kwargs=kwargs)


def strongest(group: Sequence[CellResult]) -> CellResult | None:
    """The white-box cell that left the least, among those that differentiate where there are any.

    Only cells of the group's largest budget count.
    """
    white = [r for r in group if knows(r.cell)]
    # A search over attacks is no attack to experiment with, where there is a plain one.
    white = [r for r in white if r.cell.scenario == "white-box"] or white
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

    @property
    def standing(self) -> NDArray[np.int64]:
        """Places in `batch` of the samples that white-box attacks left standing."""
        n = len(self.batch)
        return np.flatnonzero(self.right[:n] / self.draws[:n] > 0.5)

    def select(self, places: NDArray[np.int64]) -> Batch:
        """Samples of the batch by their places."""
        return self.batch.select(torch.from_numpy(places).to(self.batch.x.device))

    def find(
        self,
        attack: ParsedAttack,
        batch: Batch,
        eps: float | None = None,
        view: nn.Module | None = None,
        batch_size: int | None = None,
    ) -> Attacked:
        """The images that the attack finds.

        Args:
            attack: The cell's attack, or another with the same threat model.
            batch: The samples.
            eps: Another budget.
            view: Something else to attack.
            batch_size: Images per call of the attack.
        """
        attacker = self.subject.attacker(self.cell)
        attacker = replace(
            attacker,
            attack=attack,
            eps=self.cell.eps if eps is None else eps,
            view=attacker.view if view is None else view,
        )
        keys = random.keys(self.cell.seed, batch.index)
        goal = batch.goal(self.cell.targeted)
        return attacker.run(batch.x, goal, keys, batch_size or self.batch_size)

    def attack(
        self,
        attack: ParsedAttack,
        batch: Batch,
        eps: float | None = None,
        view: nn.Module | None = None,
        draws: int | None = None,
    ) -> tuple[Tensor, Rows]:
        """What the attack finds, and the deployed pipeline's rows, judged on so many draws."""
        found = self.find(attack, batch, eps, view)
        cell = self.cell if eps is None else replace(self.cell, eps=eps)
        if draws is not None:
            cell = replace(cell, judge_draws=min(draws, cell.judge_draws))
        return found.x_adv, judge_shard(cell, self.subject, batch, found, self.batch_size)

    def also_lost(
        self, places: NDArray[np.int64], right: NDArray[Any], draws: NDArray[Any] | int
    ) -> NDArray[np.bool_]:
        """`lost` for counts that are known at some places only, over the whole batch."""
        n = len(self.batch)
        all_right, all_draws = self.right[:n].copy(), self.draws[:n].copy()
        all_right[places], all_draws[places] = right, draws
        return self.lost(all_right, all_draws)

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
        r for r in group if knows(r.cell) and parse_attack(r.cell.attack).needs_gradient == gradient
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
