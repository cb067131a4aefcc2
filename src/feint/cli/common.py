"""What the verbs share: consoles, errors and exit codes, options that recur, progress."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from feint.core.errors import ConfigError, FeintError

__all__ = [
    "DONE",
    "FAILED",
    "INTERRUPTED",
    "MISSED",
    "Json",
    "err",
    "guard",
    "number",
    "out",
    "print_json",
    "progress",
    "set_threads",
]

DONE, MISSED, FAILED, INTERRUPTED = 0, 1, 2, 130

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")
]


def number(text: str) -> float:
    """A number as people write budgets: `8/255`, `0.031`.

    Raises:
        ConfigError: If it is none.
    """
    top, slash, bottom = text.partition("/")
    try:
        return float(top) / float(bottom) if slash else float(top)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"{text!r} is no number; expected for example 8/255 or 0.031") from None


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def guard(*, on_interrupt: Callable[[], str] | None = None) -> Iterator[None]:
    """Turn expected errors into one message and exit code 2, and Ctrl-C into a hint.

    What is no `FeintError` is a defect of ours: it keeps its traceback.
    """
    try:
        yield
    except FeintError as error:
        err.print(f"[bold red]error[/]: {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        hint = on_interrupt() if on_interrupt else "nothing was kept"
        err.print(f"[bold yellow]interrupted[/]: {escape(hint)}", soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        # The reader of a pipe went away: no traceback, and no flush of what nobody wants.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(DONE) from None


def progress(enabled: bool = True) -> Progress:
    """A progress bar on standard error: what, how far, how long."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(compact=True),
        console=err,
        transient=True,
        disable=not (enabled and err.is_terminal),
    )


def set_threads(threads: int | None) -> None:
    """Limit torch to so many CPU threads."""
    if threads is not None:
        if threads < 1:
            raise ConfigError(f"--threads is {threads}; expected at least 1")
        import torch

        torch.set_num_threads(threads)
