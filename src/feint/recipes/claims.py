"""Whether what a paper says, or what is said of it, follows from the measured numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from feint.diagnostics.numbers import Number
from feint.recipes.schema import Claim

__all__ = ["Verdict", "decide"]

Answer = Literal["holds", "fails", "undecided"]
Labels = tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """A claim and what the numbers say of it.

    `holds` and `fails` are said where the 95 % intervals bear it out; a difference in the claimed
    direction that the sampling error could explain is `undecided`.
    """

    claim: Claim
    answer: Answer
    evidence: str

    def as_dict(self) -> dict[str, str]:
        """Plain data."""
        return {
            "say": self.claim.say,
            "by": self.claim.by,
            "answer": self.answer,
            "evidence": self.evidence,
        }


def decide(
    claim: Claim,
    axes: Mapping[str, Sequence[str]],
    numbers: Mapping[Labels, Number | None],
    show: Callable[[float], str] = "{:.3g}".format,
) -> Verdict:
    """Judge a claim.

    Convention:
        "rises" holds where no number lies below an earlier one by more than their intervals and
        the last one above the first by more than theirs; it fails where one does. "above" compares
        every label of the one with every label of the other, plus the margin, all others equal. Of
        several comparisons the worst answer counts.

    Args:
        claim: The claim.
        axes: Labels by axis, in the order of the table.
        numbers: By the labels of each point; None where there is none.
        show: Writes a number.
    """
    names = list(axes)
    chosen = {
        labels: number
        for labels, number in numbers.items()
        if number is not None
        and number.value is not None
        and all(labels[names.index(a)] in found for a, found in claim.where.items())
    }
    answers: list[tuple[Answer, str]] = []
    if claim.rises or claim.falls:
        axis = claim.rises or claim.falls or ""
        place = names.index(axis)
        for key, line in _lines(chosen, place, list(axes[axis])).items():
            if len(line) > 1:
                line = line if claim.rises else line[::-1]
                answers.append(_rises(line, key, show))
    elif claim.above is not None and claim.below is not None:
        answers += _compare(claim.above, claim.below, claim.margin, names, chosen, show)
    else:
        for labels, number in chosen.items():
            answers.append(_bound(number, claim.least, claim.most, labels, show))
    if not answers:
        return Verdict(claim, "undecided", "there are no such numbers")
    order: dict[Answer, int] = {"fails": 0, "undecided": 1, "holds": 2}
    worst = min((a for a, _ in answers), key=order.__getitem__)
    told = [text for answer, text in answers if answer == worst]
    more = f"; and {len(told) - 3} more" if len(told) > 3 else ""
    where = "" if worst == "holds" else f"{len(told)} of {len(answers)}: "
    return Verdict(claim, worst, where + "; ".join(told[:3]) + more)


def _lines(
    chosen: Mapping[Labels, Number], place: int, order: list[str]
) -> dict[Labels, list[Number]]:
    """Numbers along an axis, by the other labels."""
    lines: dict[Labels, list[tuple[int, Number]]] = {}
    for labels, number in chosen.items():
        key = labels[:place] + labels[place + 1 :]
        lines.setdefault(key, []).append((order.index(labels[place]), number))
    return {
        key: [n for _, n in sorted(found, key=lambda entry: entry[0])]
        for key, found in lines.items()
    }


def _ends(number: Number) -> tuple[float, float, float]:
    value = number.value or 0.0
    low = value if number.low is None else number.low
    high = value if number.high is None else number.high
    return low, value, high


def _rises(line: list[Number], key: Labels, show: Callable[[float], str]) -> tuple[Answer, str]:
    ends = [_ends(n) for n in line]
    text = f"{', '.join(key) or 'all'}: " + " → ".join(show(value) for _, value, _ in ends)
    if any(high < low for (low, _, _), (_, _, high) in combinations(ends, 2)):
        return "fails", text
    return ("holds" if ends[-1][0] > ends[0][2] else "undecided"), text


def _compare(
    above: Mapping[str, Sequence[str]],
    below: Mapping[str, Sequence[str]],
    margin: float,
    names: list[str],
    chosen: Mapping[Labels, Number],
    show: Callable[[float], str],
) -> list[tuple[Answer, str]]:
    moved = {names.index(axis) for axis in (*above, *below)}

    def side(spec: Mapping[str, Sequence[str]]) -> dict[Labels, list[tuple[Labels, Number]]]:
        found: dict[Labels, list[tuple[Labels, Number]]] = {}
        for labels, number in chosen.items():
            if all(labels[names.index(a)] in wanted for a, wanted in spec.items()):
                key = tuple(label for i, label in enumerate(labels) if i not in moved)
                found.setdefault(key, []).append((labels, number))
        return found

    upper, lower, answers = side(above), side(below), []
    for key in upper:
        for labels, high in upper[key]:
            for others, low in lower.get(key, []):
                if labels == others:
                    continue
                a, b = _ends(high), _ends(low)
                text = f"{', '.join(labels)}: {show(a[1])}; {', '.join(others)}: {show(b[1])}"
                if a[1] < b[1] + margin:
                    answers.append(("fails" if a[2] < b[0] + margin else "undecided", text))
                else:
                    answers.append(("holds" if a[0] > b[2] + margin else "undecided", text))
    return answers  # type: ignore[return-value]


def _bound(
    number: Number,
    least: float | None,
    most: float | None,
    labels: Labels,
    show: Callable[[float], str],
) -> tuple[Answer, str]:
    low, value, high = _ends(number)
    text = f"{', '.join(labels)}: {show(value)}"
    if least is not None:
        return ("holds" if low >= least else "fails" if high < least else "undecided"), text
    most = most or 0.0
    return ("holds" if high <= most else "fails" if low > most else "undecided"), text
