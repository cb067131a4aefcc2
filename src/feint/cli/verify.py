"""`feint verify`: judge a run's kept examples again on this machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.cells import cell_len
from rich.markup import escape
from rich.text import Text

from feint.cli import common
from feint.evaluation import CellResult
from feint.evaluation.rejudge import TOLERANCE
from feint.reports.words import attack_words, columns_apart, deployment_words, rate_words
from feint.store import Verification
from feint.store import verify as verify_run

__all__ = ["verify"]


def verify(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's directory.")],
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Judge on fresh draws, too, and compare within chance.")
    ] = False,
    tolerance: Annotated[
        float,
        typer.Option(
            help="Gap of the two largest logits, as a share of the largest, up to which another "
            "outcome is put down to the last bit."
        ),
    ] = TOLERANCE,
    trust: Annotated[
        bool,
        typer.Option("--trust", help="Run code that the run names: file.py:function, pickles."),
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda …")] = "cpu",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per forward pass; by default the run's.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    as_json: common.Json = False,
) -> None:
    """Judge a run's kept examples again, here, and compare with what it claims.

    No attack is made: model, defense and data are loaded by the run's own specs, every example must
    lie within its budget and in [0, 1], and every outcome must be the stored one, on the same
    draws, but for near ties of logits.

    Exit codes: 0 it agrees, 1 it does not, 2 no run, a damaged one, or bad input.
    """
    begun = time.perf_counter()
    with common.guard():
        common.set_threads(threads)
        with common.progress(not as_json) as bar:
            task = bar.add_task("reading", total=None, rate="")

            def show(position: int, cells: int, result: CellResult) -> None:
                words = f"{result.cell.scenario} {attack_words(result.cell)}"
                bar.update(task, completed=position, total=cells, description=escape(words[:44]))

            found = verify_run(
                folder,
                trust=trust,
                device=device,
                batch_size=batch_size,
                tolerance=tolerance,
                fresh=fresh,
                on_cell=show,
            )
        if as_json:
            seconds = round(time.perf_counter() - begun, 2)
            common.print_json({**found.as_dict(), "seconds": seconds})
        else:
            _print(found)
        if not found.agrees:
            raise typer.Exit(common.MISSED)


def _print(found: Verification) -> None:
    """A line per cell under its pipeline, what is wrong, and the conclusion."""
    fresh = any(c.fresh is not None for c in found.cells)
    titles = ["scenario", "attack", "stored % [95 %]", "here", *(["fresh"] if fresh else [])]
    titles += ["flipped", ""]
    room = common.out.width - (75 if fresh else 68)
    attacks = [attack_words(c.result.cell) for c in found.cells]
    attacks = columns_apart(attacks, max(12, room))
    lines, names = [titles], [""]
    for checked, attack in zip(found.cells, attacks, strict=True):
        cell = checked.result.cell
        names.append(deployment_words((cell.model, cell.defense, cell.votes, cell.combine)))
        lines.append(
            [
                cell.scenario,
                attack,
                rate_words(checked.result.accuracy),
                f"{100 * checked.accuracy.value:.1f}",
                *([f"{100 * checked.fresh.shares.mean():.1f}"] if checked.fresh else []),
                str(checked.flipped),
                "agrees" if checked.agrees else "DISAGREES",
            ]
        )
    widths = [max(cell_len(line[i]) for line in lines) for i in range(len(titles))]
    before = ""
    for name, line in zip(names, lines, strict=True):
        if name != before:
            common.out.print(f"[bold]{escape(name)}[/]", overflow="ellipsis", no_wrap=True)
            before = name
        texts = [
            text.rjust(width) if 1 < i < len(titles) - 1 else text.ljust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        style = "dim" if not name else "bold red" if line[-1] == "DISAGREES" else ""
        common.out.print(Text("  " + "  ".join(texts).rstrip(), style=style), soft_wrap=True)
    common.out.print()
    for checked in found.cells:
        cell = checked.result.cell
        where = f"{cell.scenario} {attack_words(cell)}"
        said = list(checked.problems)
        if checked.unexplained:
            said.append(
                f"{checked.unexplained} samples have another outcome though their logits are no "
                "near tie"
            )
        if checked.fresh is not None and not checked.fresh.agrees:
            said.append(
                f"fresh draws differ by {checked.fresh.z:.1f} standard errors (4 are allowed)"
            )
        for sentence in said:
            common.out.print(f"[bold red]wrong[/]  {escape(f'{where}: {sentence}')}")
    for sentence in found.problems:
        common.out.print(f"[bold red]wrong[/]  {escape(sentence)}")
    for sentence in found.notes:
        common.out.print(f"[yellow]note[/]   {escape(sentence)}")
    flips = sum(c.flipped for c in found.cells)
    samples = sum(len(c.result.rows["index"]) for c in found.cells)
    gaps = [c.gap for c in found.cells if c.gap is not None]
    words = f"{found.files} files whole; {samples} examples judged again, {flips} flipped"
    if gaps:
        words += f" (their logits lie within {max(gaps):.1e} of a tie)"
    common.out.print(words)
    verdict = "The run agrees with its examples." if found.agrees else "The run does not agree."
    common.out.print(f"[bold]{verdict}[/]" if found.agrees else f"[bold red]{verdict}[/]")
