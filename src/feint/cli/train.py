"""`feint train`: weights from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from feint.cli import common
from feint.training.fit import EpochReport
from feint.training.recipe import load_recipe
from feint.training.run import train as run_training

__all__ = ["train"]


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (`feint list recipes`) or file.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Data to train on, such as cifar10 or cifar10.npz; the recipe's own by default."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for checkpoint, log and weights.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    as_json: common.Json = False,
) -> None:
    """Train a classifier by a recipe; an interrupted training resumes where it stopped."""
    folder = out or Path("checkpoints") / Path(recipe).stem
    with common.guard(
        on_interrupt=lambda: f"the last epoch is kept; the same command resumes from {folder}"
    ):
        common.set_threads(threads)
        plan = load_recipe(recipe)
        with common.progress(not as_json) as bar:
            task = bar.add_task(plan.name, total=plan.epochs, rate="")

            def show(report: EpochReport) -> None:
                rate = (
                    f"loss {report.loss:.3f}  accuracy {100 * report.accuracy:.1f} %  "
                    f"{report.seconds:.0f} s/epoch"
                )
                bar.update(task, completed=report.epoch, rate=rate)

            card = run_training(recipe, data=data, out=folder, device=device, on_epoch=show)
        if as_json:
            common.print_json(card)
            return
        clean = card["accuracy"]["clean"]
        common.out.print(
            f"{escape(plan.name)}: {100 * clean['value']:.2f} % of {clean['n']} test images; "
            f"weights and card: {escape(card['path'])}"
        )
