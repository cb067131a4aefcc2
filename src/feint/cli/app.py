"""The entry point of the command `feint`."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer
from rich.logging import RichHandler

import feint
from feint.cli import common
from feint.cli.diagnose import diagnose
from feint.cli.doctor import doctor
from feint.cli.evaluate import evaluate
from feint.cli.list import list_names
from feint.cli.report import report
from feint.cli.reproduce import reproduce
from feint.cli.train import train
from feint.cli.verify import verify
from feint.store.memory import hold_on_to_memory

__all__ = ["app", "main"]

app = typer.Typer(
    name="feint",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Defences that deceive gradients, the attacks that test them, and honest evaluations.",
)


def _version(value: bool) -> None:
    if value:
        sys.stdout.write(f"feint {feint.__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    level = logging.INFO if verbose else logging.WARNING
    handler = RichHandler(console=common.err, show_path=False, show_time=verbose, markup=False)
    logging.basicConfig(level=level, format="%(message)s", handlers=[handler], force=True)


app.command()(evaluate)
app.command()(train)
app.command()(diagnose)
app.command()(report)
app.command()(reproduce)
app.command()(verify)
app.command("list")(list_names)
app.command()(doctor)


def main() -> None:
    """Run the command line."""
    hold_on_to_memory()
    app()
