"""Options and files for continuous integration, the same for `evaluate` and `report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.markup import escape

from feint.cli import common
from feint.core.errors import ConfigError, RangeError
from feint.reports import ReportData
from feint.reports.gate import End, Gate, Grade, gate
from feint.reports.junit import write as write_junit
from feint.reports.sarif import write as write_sarif

__all__ = ["Conditions", "FailUnder", "FailUnderEnd", "Junit", "MinGrade", "Sarif"]

_PANEL = "Continuous integration"

FailUnder = Annotated[
    float | None,
    typer.Option(
        metavar="PERCENT",
        help="Exit 1 unless the worst-case accuracy reaches this many per cent: the lower end of "
        "its 95 % interval, see --fail-under-end. A withheld verdict exits 1 anyway.",
        rich_help_panel=_PANEL,
    ),
]
FailUnderEnd = Annotated[
    str,
    typer.Option(help="What --fail-under judges: low, value or high.", rich_help_panel=_PANEL),
]
MinGrade = Annotated[
    str | None,
    typer.Option(
        help="Exit 1 if the evaluation's grade is worse: A, B or C.", rich_help_panel=_PANEL
    ),
]
Sarif = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write findings as SARIF 2.1.0.", rich_help_panel=_PANEL),
]
Junit = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write checks as JUnit XML.", rich_help_panel=_PANEL),
]


@dataclass(frozen=True)
class Conditions:
    """What was typed; made, and refused, before any work."""

    fail_under: float | None
    end: str
    min_grade: str | None
    sarif: Path | None
    junit: Path | None

    def __post_init__(self) -> None:
        if self.fail_under is not None and not 0 <= self.fail_under <= 100:
            raise RangeError(
                f"--fail-under is {self.fail_under:g}; expected per cent, from 0 to 100"
            )
        if self.end not in get_args(End):
            raise ConfigError(
                f"--fail-under-end is {self.end!r}; expected {', '.join(get_args(End))}"
            )
        if self.min_grade is not None and self.min_grade not in get_args(Grade):
            raise ConfigError(f"--min-grade is {self.min_grade!r}; expected A, B or C")
        for option, path in (("--sarif", self.sarif), ("--junit", self.junit)):
            if path is not None and not path.parent.is_dir():
                raise ConfigError(f"{option} {path}: there is no folder {path.parent}; make it")

    @property
    def asked(self) -> bool:
        """Whether there is a condition beside that of a verdict."""
        return self.fail_under is not None or self.min_grade is not None

    def judge(self, data: ReportData) -> Gate | None:
        """The gate, if there is a condition."""
        if not self.asked:
            return None
        least = None if self.fail_under is None else self.fail_under / 100
        return gate(data, fail_under=least, end=self.end, min_grade=self.min_grade)  # type: ignore[arg-type]

    def write(self, data: ReportData, found: Gate | None, *, failed: bool) -> None:
        """The files that were asked for."""
        if self.sarif is not None:
            write_sarif(data, self.sarif, found, failed=failed)
        if self.junit is not None:
            write_junit(data, self.junit, found)

    @staticmethod
    def show(found: Gate | None) -> None:
        """Say whether the conditions hold."""
        if found is None:
            return
        if found.passed:
            common.out.print("[bold green]gate passed[/]")
            return
        for reason in found.reasons:
            common.out.print(f"[bold red]gate failed[/]  {escape(reason)}", soft_wrap=True)
