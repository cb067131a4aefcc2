"""`feint report`: a run's table and page again, from what is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from feint.cli import common
from feint.cli.evaluate import gather
from feint.core.errors import DataError, FeintError
from feint.reports import render
from feint.reports.html import write as write_html
from feint.reports.markdown import write as write_markdown
from feint.store import open_run

__all__ = ["report"]


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Write here: .html or .md; RUN/report.html by default."),
    ] = None,
    as_json: common.Json = False,
) -> None:
    """Show a run again: table, findings, verdict, and its HTML page. Nothing is recomputed."""
    with common.guard():
        stored = open_run(folder)
        page = out or folder / "report.html"
        if page.suffix not in (".html", ".md"):
            raise DataError(f"{page} has suffix {page.suffix!r}; expected .html or .md")
        write = write_markdown if page.suffix == ".md" else write_html
        try:
            data = gather(stored, page)
            write(data, page)
        except FeintError as error:
            # The numbers need no model; the heat maps do, and it may not be on this machine.
            common.err.print(f"without gradient maps: {escape(str(error))}", soft_wrap=True)
            data = gather(stored, page, maps=False)
            write(data, page)
        if as_json:
            common.print_json(
                {**stored.evaluation.as_dict(), "run": str(folder), "html": str(page)}
            )
            return
        render(common.out, data)
        if out is not None:
            common.err.print(f"written: {escape(str(page))}")
