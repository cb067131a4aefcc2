"""What a cell came to: its rows, and the numbers that are read from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from feint.core.errors import RangeError
from feint.evaluation.cell import Cell
from feint.evaluation.metrics import Rate, rate, worst_case_both
from feint.evaluation.shard import Rows

__all__ = ["CellResult", "by_deployment", "by_pipeline", "worst"]

_DISTANCES = ("rms", "abs_l2", "relative_l2", "linf")


@dataclass
class CellResult:
    """A cell's rows, and what computing them took."""

    cell: Cell
    key: str
    rows: Rows
    examples: str
    """Address of the adversarial examples in the cache."""
    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0
    """Time spent in this process; what came from the cache took none."""

    @property
    def draws(self) -> int:
        """Draws that the judge took per sample."""
        return int(self.rows["draws"].max(initial=1))

    @property
    def shares(self) -> NDArray[np.float64]:
        """(N,) share of draws on which the judged pipeline was right."""
        return self.rows["correct"] / self.rows["draws"]

    @property
    def accuracy(self) -> Rate:
        """Expected accuracy with its interval."""
        return rate(self.shares, self.draws)

    @property
    def accuracy_8bit(self) -> Rate:
        """The same on the images rounded to 8 bits."""
        return rate(self.rows["correct_8bit"] / self.rows["draws"], self.draws)

    @property
    def majority(self) -> Rate:
        """Accuracy of the majority vote over the judge's draws."""
        return rate((self.rows["prediction"] == self.rows["label"]).astype(float))

    @property
    def hits(self) -> Rate:
        """S1's attack success rate: share of draws that give the attacker's target.

        Raises:
            RangeError: If the threat is not targeted.
        """
        if not self.cell.targeted:
            raise RangeError("an untargeted cell has no target to hit")
        return rate(self.rows["target_hits"] / self.rows["draws"], self.draws)

    def accuracy_after(self, tries: int) -> Rate:
        """Accuracy if the attacker may submit each image `tries` times: right every time.

        Estimated without bias: the share of the sets of `tries` judged draws that are all right.
        A deterministic pipeline says the same every time.

        Raises:
            RangeError: If `tries` is below 1 or more than the draws of a stochastic pipeline.
        """
        if tries < 1 or (self.draws > 1 and tries > int(self.rows["draws"].min())):
            raise RangeError(
                f"accuracy after {tries} tries from {self.draws} draws; expected 1 to "
                f"{self.draws}; raise judge_draws"
            )
        if self.draws == 1:
            return self.accuracy
        right, asked = self.rows["correct"].astype(float), self.rows["draws"].astype(float)
        used = np.arange(tries)[:, None]
        return rate((np.maximum(right - used, 0) / (asked - used)).prod(0), self.draws)

    def distance(self) -> dict[str, float | None]:
        """Mean of the four distances; `relative_l2` leaves out black images, and may be None."""
        found: dict[str, float | None] = {}
        for name in _DISTANCES:
            known = self.rows[name][~np.isnan(self.rows[name])]
            found[name] = float(known.mean()) if len(known) else None
        return found

    def as_dict(self) -> dict[str, object]:
        """Plain data: one entry of the command line's `cells`."""
        rows, n = self.rows, len(self.rows["index"])
        return {
            **self.cell.spec(),
            "n": n,
            "draws": self.draws,
            "accuracy": self.accuracy.as_dict(),
            "accuracy_8bit": self.accuracy_8bit.as_dict(),
            "majority": self.majority.as_dict(),
            "target_hits": float((rows["target_hits"] / rows["draws"]).mean()),
            "distance": self.distance(),
            "key": self.key,
            "examples": self.examples,
        }


def worst(results: Sequence[CellResult]) -> Rate:
    """Per-sample worst case over cells of one deployed pipeline; of one cell, its own accuracy.

    A stochastic pipeline's worst attack is chosen on half of the judge's draws and read on the
    other, both ways round.
    """
    if len(results) == 1:
        return results[0].accuracy
    draws = min(r.draws for r in results)
    even = np.stack([r.rows["correct_even"] for r in results])
    odd = np.stack([r.rows["correct_odd"] for r in results])
    return rate(np.clip(worst_case_both(even, odd, draws), 0, 1), draws)


def by_pipeline(results: Iterable[CellResult]) -> dict[tuple[str, str], list[CellResult]]:
    """Results grouped by (model, defense), in order of appearance."""
    groups: dict[tuple[str, str], list[CellResult]] = {}
    for result in results:
        groups.setdefault((result.cell.model, result.cell.defense), []).append(result)
    return groups


def by_deployment(
    results: Iterable[CellResult],
) -> dict[tuple[str, str, int, str], list[CellResult]]:
    """Results grouped by what is deployed: (model, defense, votes, combine)."""
    groups: dict[tuple[str, str, int, str], list[CellResult]] = {}
    for result in results:
        cell = result.cell
        combine = cell.combine if cell.votes > 1 else "mean_probability"
        key = (cell.model, cell.defense, cell.votes, combine)
        groups.setdefault(key, []).append(result)
    return groups
