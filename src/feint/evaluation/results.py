"""What a cell came to: its rows, and the numbers that are read from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from feint.evaluation.cell import Cell
from feint.evaluation.metrics import Rate, rate
from feint.evaluation.shard import Rows

__all__ = ["CellResult", "by_pipeline"]


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

    def accuracy_after(self, tries: int) -> Rate:
        """Accuracy if the attacker may submit each image `tries` times: right every time."""
        return rate(self.shares**tries, self.draws)

    def as_dict(self) -> dict[str, object]:
        """Plain data: one entry of the command line's `cells`."""
        rows, n = self.rows, len(self.rows["index"])
        names = ("rms", "abs_l2", "relative_l2", "linf")
        return {
            **self.cell.spec(),
            "n": n,
            "draws": self.draws,
            "accuracy": self.accuracy.as_dict(),
            "accuracy_8bit": self.accuracy_8bit.as_dict(),
            "majority": self.majority.as_dict(),
            "target_hits": float((rows["target_hits"] / rows["draws"]).mean()),
            "distance": {name: float(np.nanmean(rows[name])) for name in names},
            "key": self.key,
            "examples": self.examples,
        }

    @property
    def majority(self) -> Rate:
        """Accuracy of the majority vote over the judge's draws."""
        return rate((self.rows["prediction"] == self.rows["label"]).astype(float))


def by_pipeline(results: Iterable[CellResult]) -> dict[tuple[str, str], list[CellResult]]:
    """Results grouped by (model, defense), in order of appearance."""
    groups: dict[tuple[str, str], list[CellResult]] = {}
    for result in results:
        groups.setdefault((result.cell.model, result.cell.defense), []).append(result)
    return groups
