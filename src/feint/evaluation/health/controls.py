"""Known-broken controls: what the run's attack must break, and what it must not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from feint import data, defenses, models
from feint.core.errors import FeintError
from feint.evaluation.attackers import parse_attack
from feint.evaluation.cell import Cell
from feint.evaluation.findings import Finding, Status
from feint.evaluation.health.case import strongest
from feint.evaluation.health.words import attack_words
from feint.evaluation.metrics import rate
from feint.evaluation.results import CellResult, by_deployment
from feint.evaluation.shard import Batch, Subject, attack_shard, judge_shard

__all__ = ["AUTOATTACK", "CONTROLS", "Control"]

SAMPLES = 32
"""Bundled images that each control is attacked on."""
BUDGETS = {"linf": 8 / 255, "l2": 1.0, "l1": 24.0}
"""Budgets that are large enough for an undefended CIFAR-10 classifier to fall."""
AUTOATTACK: tuple[int, ...] = (0, 2, 9, 10, 11, 14)
"""Places, among the first sixteen bundled images, that AutoAttack leaves standing:
`feint.attacks.autoattack`, standard, linf 8/255, seed 0, four images at a time, on the
adversarially trained classifier."""
MORE = 2
"""Images of these that another attack may break without having broken its rules."""
BARE, BEHIND = 0.05, 0.15
"""Accuracy that may be left of the bare model, and behind a defense that is known to be broken."""


@dataclass(frozen=True)
class Control:
    """A bundled pipeline whose fate is known."""

    model: str
    defense: str
    most: float
    """Accuracy that may be left."""


_MUST_FALL = (
    Control("bundled:cifar10-resnet20", "none", BARE),
    Control("bundled:cifar10-resnet20", "jpeg(quality=75)", BEHIND),
    Control("bundled:cifar10-resnet20", "bit_depth(bits=3)", BEHIND),
    Control("bundled:cifar10-resnet20", "rand(low=32, high=39, canvas=40)", BEHIND),
)
_MUST_STAND = "bundled:cifar10-resnet20-at"


def _known_broken(results: Sequence[CellResult], batch_size: int) -> Iterator[Finding]:
    """The strongest attack of every pipeline of the run, once each, on the bundled controls."""
    tried: list[Cell] = []
    for group in by_deployment(results).values():
        best = strongest(group)
        if best is None or best.cell.norm not in BUDGETS:
            continue
        cell = Cell(
            "white-box",
            "control",
            attack=best.cell.attack,
            norm=best.cell.norm,
            eps=max(best.cell.eps, BUDGETS[best.cell.norm]),
            judge_draws=16,
            seed=best.cell.seed,
        )
        if cell not in tried:
            tried.append(cell)
            yield _fall(cell, batch_size)
            yield _stand(replace(cell, norm="linf", eps=8 / 255), batch_size)


def _left(cell: Cell, model: str, defense: str, batch_size: int) -> NDArray[np.float64]:
    """(N,) shares of the judge's draws that are right about each bundled image."""
    read = next(iter(data.load("bundled:cifar10", samples=SAMPLES).batches(SAMPLES)))
    batch = Batch(read.x, read.y, read.index)
    chain = None if defense == "none" else defenses.parse(defense)
    subject = Subject(models.load(model), chain)
    cell = replace(cell, model=model, defense=defense)
    made = attack_shard(cell, subject, batch, batch_size)
    rows = judge_shard(cell, subject, batch, made, batch_size)
    shares: NDArray[np.float64] = rows["correct"] / rows["draws"]
    return shares


def _fall(cell: Cell, batch_size: int) -> Finding:
    parts, bad = [], False
    for control in _MUST_FALL:
        name = "bare" if control.defense == "none" else control.defense
        try:
            shares = _left(cell, control.model, control.defense, batch_size)
        except FeintError as error:
            parts.append(f"{name}: refused ({error})")
            continue
        random = bool(((shares > 0) & (shares < 1)).any())
        left = rate(shares, cell.judge_draws if random else 1)
        bad |= left.value > control.most
        parts.append(f"{name} {left} (at most {100 * control.most:.0f} %)")
    status: Status = "fail" if bad else "pass"
    evidence = (
        f"{attack_words(cell.attack)} at {cell.norm} {cell.eps:.4g} leaves of a bundled classifier "
        f"on {SAMPLES} images: {'; '.join(parts)}"
    )
    return Finding("known-broken-controls", status, "controls that must fall", evidence)


def _stand(cell: Cell, batch_size: int) -> Finding:
    check, subject = "known-broken-controls", "control that must stand"
    if cell.norm not in parse_attack(cell.attack).info.norms:
        return Finding(check, "pass", subject, f"{cell.attack} has no norm linf: 0 images tried")
    try:
        shares = _left(cell, _MUST_STAND, "none", batch_size)
    except FeintError as error:
        return Finding(check, "warn", subject, f"refused: {error}")
    broken = int((shares[list(AUTOATTACK)] <= 0.5).sum())
    evidence = (
        f"the adversarially trained classifier keeps {rate(shares)} of {SAMPLES} images at linf "
        f"8/255; of the {len(AUTOATTACK)} that AutoAttack leaves, {broken} are broken (fail above "
        f"{MORE}: the attack then breaks its rules)"
    )
    return Finding(check, "fail" if broken > MORE else "pass", subject, evidence)


CONTROLS: dict[str, Callable[[Sequence[CellResult], int], Iterator[Finding]]] = {
    "known-broken-controls": _known_broken
}
"""Costly checks of a whole run."""
