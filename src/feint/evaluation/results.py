"""What a cell came to: its rows, and the numbers that are read from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from feint.core.errors import ConfigError, RangeError
from feint.evaluation.attackers import parse_attack
from feint.evaluation.cell import Cell
from feint.evaluation.judge import VOTES
from feint.evaluation.metrics import Rate, rate, worst_case_both
from feint.evaluation.shard import Rows

__all__ = ["CellResult", "by_deployment", "by_pipeline", "worst", "worst_shares"]

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
    def accuracy_png(self) -> Rate | None:
        """The same on the images read back from PNG files; None if it was not recorded."""
        found = self.rows.get("correct_png")
        if found is None or np.isnan(found).any():
            return None
        return rate(found / self.rows["draws"], self.draws)

    @property
    def majority(self) -> Rate:
        """Accuracy of the majority vote over the judge's draws."""
        return rate((self.rows["prediction"] == self.rows["label"]).astype(float))

    def majority_of(self, votes: int) -> Rate:
        """Accuracy of a majority vote of so many draws, as if the defender took them.

        Of a deterministic pipeline every vote is the same. The attack was still made against what
        the cell deploys: an attacker of the vote is a cell with `votes`.

        Args:
            votes: 1, one of `feint.evaluation.judge.VOTES`, or the judge's number of draws.

        Raises:
            RangeError: If `votes` is another number, or more than the judge's draws.
            ConfigError: If it was not recorded.
        """
        if votes == 1 or self.draws == 1:
            return self.accuracy
        if votes == self.draws:
            return self.majority
        if votes not in VOTES or votes > self.draws:
            known = (1, *(n for n in VOTES if n < self.draws), self.draws)
            raise RangeError(
                f"majority of {votes}; expected one of {', '.join(map(str, known))} (the judge "
                f"took {self.draws} draws)"
            )
        shares = self.rows.get(f"vote_{votes}")
        if shares is None or np.isnan(shares).any():
            raise ConfigError("votes were not recorded by the version that made this run")
        return rate(shares, max(1, self.draws // votes))

    def probabilities(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Ends of every sample's own 95 % interval for its probability of being right, (N,) each.

        Clopper and Pearson's exact interval over the judge's draws. A deterministic pipeline is
        right or not: both ends say so.
        """
        right, asked = self.rows["correct"].astype(float), self.rows["draws"].astype(float)
        if self.draws == 1:
            return right, right.copy()
        with np.errstate(invalid="ignore"):
            low = stats.beta.ppf(0.025, right, asked - right + 1)
            high = stats.beta.ppf(0.975, right + 1, asked - right)
        return np.where(right > 0, low, 0.0), np.where(right < asked, high, 1.0)

    @property
    def first_hits(self) -> Rate | None:
        """Share of samples on which the attacker saw a success on at least one draw of his own.

        What an evaluation reports that lets one lucky draw decide. None if he kept no record.
        """
        if self.cell.attack == "none" or np.isnan(self.rows.get("late_gain", np.nan)).any():
            return None
        return rate(self.fell.astype(float))

    @property
    def fell(self) -> NDArray[np.bool_]:
        """(N,) whether the attacker saw a success within the budget, on a draw of his own.

        A minimal-norm attack looks beyond the budget, too; what it found there was given back.
        """
        seen = self.rows["first_hit"]
        if parse_attack(self.cell.attack).info.goal == "minimal":
            return np.asarray(~self.rows["unchanged"].astype(bool) | (seen == 0))
        return np.asarray(seen >= 0)

    @property
    def luck(self) -> float | None:
        """The gap between first hits and the mean success on fresh draws; None without a record."""
        seen = self.first_hits
        if seen is None:
            return None
        held = self.hits if self.cell.targeted else None
        return seen.value - (held.value if held is not None else 1 - self.accuracy.value)

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

    def _tries(self) -> list[int]:
        """Numbers of tries that plain data tell of."""
        if self.draws == 1:
            return [1]
        most = int(self.rows["draws"].min())
        return sorted({1, *(k for k in (10, 100) if k < most), most})

    def _votes(self) -> dict[int, Rate]:
        """Majority votes that plain data tell of."""
        known = {n: self.rows.get(f"vote_{n}") for n in VOTES if 1 < n < self.draws}
        here = [n for n, v in known.items() if v is not None and not np.isnan(v).any()]
        return {n: self.majority_of(n) for n in here}

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
            "accuracy_png": _plain(self.accuracy_png),
            "tries": {str(k): self.accuracy_after(k).as_dict() for k in self._tries()},
            "majority_of": {str(k): v.as_dict() for k, v in self._votes().items()},
            "first_hits": _plain(self.first_hits),
            "luck": self.luck,
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
    return rate(worst_shares(results), min(r.draws for r in results))


def worst_shares(results: Sequence[CellResult]) -> NDArray[np.float64]:
    """(N,) share correct of every sample under the cell that did worst to it, as `worst` has it."""
    if len(results) == 1:
        return results[0].shares
    draws = min(r.draws for r in results)
    even = np.stack([r.rows["correct_even"] for r in results])
    odd = np.stack([r.rows["correct_odd"] for r in results])
    return np.clip(worst_case_both(even, odd, draws), 0, 1)


def _plain(value: Rate | None) -> dict[str, float | int] | None:
    return None if value is None else value.as_dict()


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
