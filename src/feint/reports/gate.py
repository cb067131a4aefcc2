"""Conditions on a run, for continuous integration: what must hold, and whether it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from feint.core.errors import ConfigError, RangeError
from feint.evaluation import Rate
from feint.reports.data import ReportData
from feint.reports.words import deployment_words, percent, threat_words

__all__ = ["End", "Gate", "Gated", "Grade", "gate", "judged_end"]

End = Literal["low", "value", "high"]
Grade = Literal["A", "B", "C"]


@dataclass(frozen=True)
class Gated:
    """One deployed pipeline within one threat model, against the threshold."""

    name: str
    threat: str
    worst: Rate | None
    judged: float | None
    """The end of the interval that is judged; None without a bound."""
    passed: bool


@dataclass(frozen=True)
class Gate:
    """The conditions and what became of them."""

    fail_under: float | None
    end: End
    min_grade: Grade | None
    grade: str
    withheld: bool
    pipelines: tuple[Gated, ...]

    @property
    def graded(self) -> bool:
        """Whether the evaluation can be trusted as far as was asked for."""
        return not self.withheld and (self.min_grade is None or self.grade <= self.min_grade)

    @property
    def passed(self) -> bool:
        """Whether everything holds."""
        return self.graded and all(p.passed for p in self.pipelines)

    @property
    def reasons(self) -> list[str]:
        """What does not hold, in sentences."""
        found = []
        if self.withheld:
            found.append(f"grade {self.grade}: the verdict is withheld")
        elif not self.graded:
            found.append(f"grade {self.grade}: {self.min_grade} or better was asked for")
        found += [sentence(self, p) for p in self.pipelines if not p.passed]
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "fail_under": self.fail_under,
            "end": self.end,
            "min_grade": self.min_grade,
            "grade": self.grade,
            "withheld": self.withheld,
            "passed": self.passed,
            "pipelines": [
                {
                    "name": p.name,
                    "threat": p.threat,
                    "judged": p.judged,
                    "worst": None if p.worst is None else p.worst.as_dict(),
                    "passed": p.passed,
                }
                for p in self.pipelines
            ],
        }


def sentence(found: Gate, pipeline: Gated) -> str:
    """What one pipeline came to, beside the threshold."""
    where = f"{pipeline.name} at {pipeline.threat}"
    if pipeline.worst is None or pipeline.judged is None:
        return f"{where}: no attacker who knows the defense was tried, so there is no bound"
    ends = {"low": "lower end", "value": "value", "high": "upper end"}
    text = f"{where}: worst-case accuracy {pipeline.worst}"
    if found.fail_under is None:
        return text
    side = "reaches" if pipeline.passed else "is under"
    return (
        f"{text}, whose {ends[found.end]} {percent(pipeline.judged)} % {side} "
        f"{percent(found.fail_under)} %"
    )


def judged_end(rate: Rate, end: End) -> float:
    """The end of an interval that is judged."""
    return {"low": rate.low, "value": rate.value, "high": rate.high}[end]


def gate(
    data: ReportData,
    *,
    fail_under: float | None = None,
    end: End = "low",
    min_grade: Grade | None = None,
) -> Gate:
    """Judge a run by conditions.

    Convention:
        The worst-case accuracy is an upper bound on robust accuracy, measured on some images. By
        default the *lower* end of its 95 % interval is judged: the gate passes only if the
        images show that at least so much is left, so that fewer images can only make it stricter,
        and no luck of the sample passes for robustness. Pipelines with a defense are judged if
        there are any (bare models beside them are controls, which should fall), all otherwise.
        A withheld verdict never passes.

    Args:
        data: The run.
        fail_under: Least accuracy, a share in [0, 1].
        end: Which end of the interval is judged: `"low"`, `"value"` or `"high"`.
        min_grade: Least grade of the evaluation itself.

    Raises:
        RangeError: If `fail_under` lies outside [0, 1].
        ConfigError: If `end` or `min_grade` is unknown.
    """
    if fail_under is not None and not 0 <= fail_under <= 1:
        raise RangeError(f"fail_under is {fail_under:g}; expected a share in [0, 1]")
    if end not in get_args(End):
        raise ConfigError(f"end is {end!r}; expected one of {', '.join(get_args(End))}")
    if min_grade is not None and min_grade not in get_args(Grade):
        raise ConfigError(f"min_grade is {min_grade!r}; expected A, B or C")
    bounds = data.verdict.bounds
    chosen = [b for b in bounds if b.defense != "none"] or list(bounds)
    pipelines = []
    for bound in chosen:
        judged = None if bound.worst is None else judged_end(bound.worst, end)
        enough = fail_under is None or (judged is not None and judged >= fail_under)
        pipelines.append(
            Gated(
                deployment_words((bound.model, bound.defense, bound.votes, bound.combine)),
                threat_words((bound.norm, bound.eps, bound.targeted)),
                bound.worst,
                judged,
                enough and bound.worst is not None,
            )
        )
    return Gate(
        fail_under, end, min_grade, data.verdict.grade, data.verdict.withheld, tuple(pipelines)
    )
