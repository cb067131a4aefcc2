"""`feint report`: a run's table and page again, from what is stored."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from feint.cli import common
from feint.cli.evaluate import gather
from feint.cli.gate import Conditions, FailUnder, FailUnderEnd, Junit, MinGrade, Sarif
from feint.core.errors import ConfigError, DataError, FeintError
from feint.reports import ReportData, render
from feint.reports.figures import save, story_figure
from feint.reports.html import write as write_html
from feint.reports.markdown import write as write_markdown
from feint.reports.output import output
from feint.reports.schema import text as schema_text
from feint.store import open_run
from feint.store.verify import spec_here

__all__ = ["report"]


def _figure(data: ReportData, path: Path) -> Path:
    return save(story_figure(data), path)


_WRITERS: dict[str, Callable[[ReportData, Path], Path]] = {
    ".html": write_html,
    ".md": write_markdown,
    ".svg": _figure,
    ".png": _figure,
    ".pdf": _figure,
}


def report(
    folder: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="A run's directory.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write here: .html, .md, or the ladder figure as .svg, .png or .pdf; "
            "RUN/report.html by default."
        ),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of --json, and nothing else.")
    ] = False,
    trust: Annotated[
        bool,
        typer.Option(
            "--trust",
            help="Run code that the run names (file.py:function, pickles), for gradient maps.",
        ),
    ] = False,
    fail_under: FailUnder = None,
    fail_under_end: FailUnderEnd = "low",
    min_grade: MinGrade = None,
    sarif: Sarif = None,
    junit: Junit = None,
    as_json: common.Json = False,
) -> None:
    """Show a run again: table, findings, verdict, and its HTML page. Nothing is recomputed.

    Exit codes: 0 done, 1 a condition not met (--fail-under, --min-grade), 2 bad input.
    """
    with common.guard():
        if schema:
            sys.stdout.write(schema_text())
            return
        if folder is None:
            raise ConfigError("which run? give its directory: feint report RUN")
        conditions = Conditions(fail_under, fail_under_end, min_grade, sarif, junit)
        stored = open_run(folder)
        page = out or folder / "report.html"
        if page.suffix not in _WRITERS:
            known = ", ".join(_WRITERS)
            raise DataError(f"{page} has suffix {page.suffix!r}; expected one of {known}")
        write = _WRITERS[page.suffix]
        try:
            data = gather(stored, page, models=spec_here(stored, trust=trust))
            write(data, page)
        except FeintError as error:
            # The numbers need no model; the heat maps do, and it may not be on this machine.
            common.err.print(f"without gradient maps: {escape(str(error))}", soft_wrap=True)
            data = gather(stored, page, models=None)
            write(data, page)
        gate = conditions.judge(data)
        failed = gate is not None and not gate.passed
        conditions.write(data, gate, failed=failed)
        if as_json:
            common.print_json(
                output(
                    stored.evaluation,
                    run=str(folder),
                    html=str(page),
                    command=data.command,
                    gate=gate,
                )
            )
        else:
            render(common.out, data)
            conditions.show(gate)
            if out is not None:
                common.err.print(f"written: {escape(str(page))}")
        if failed:
            raise typer.Exit(common.MISSED)
