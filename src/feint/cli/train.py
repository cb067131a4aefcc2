"""`feint train`: weights from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from feint.cli import common
from feint.core.trained import trained_folder
from feint.training.fit import EpochReport
from feint.training.recipe import content_digest, load_recipe
from feint.training.run import train as run_training
from feint.training.run import with_classifier

__all__ = ["train"]


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (`feint list recipes`) or file.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Data to train on, such as cifar10 or cifar10.npz; the recipe's own by default."
        ),
    ] = None,
    classifier: Annotated[
        str | None,
        typer.Option(help="Classifier behind a defense; the recipe's own by default."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for checkpoint, log and weights; by default one in the cache, from which "
            "trained:NAME loads them."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    as_json: common.Json = False,
) -> None:
    """Train a classifier or a defense by a recipe; what was interrupted resumes."""
    with common.guard(on_interrupt=lambda: "the last epoch is kept; the same command resumes"):
        common.set_threads(threads)
        plan = with_classifier(load_recipe(recipe), classifier)
        folder = out or trained_folder(plan.name, content_digest(plan))
        with common.progress(not as_json) as bar:
            task = bar.add_task(plan.name, total=plan.epochs, rate="")

            def show(report: EpochReport) -> None:
                hit = report.accuracy
                share = "" if hit is None else f"accuracy {100 * hit:.1f} %  "
                rate = f"loss {report.loss:.3f}  {share}{report.seconds:.0f} s/epoch"
                bar.update(task, completed=report.epoch, rate=rate)

            card = run_training(plan, data=data, out=folder, device=device, on_epoch=show)
        if as_json:
            common.print_json(card)
            return
        common.out.print(
            f"{escape(plan.name)}: {_summary(card)}; weights and card: {escape(card['path'])}"
        )


def _summary(card: dict[str, Any]) -> str:
    """What came out, in a few words."""
    said = []
    rates = card["accuracy"]
    if "clean" in rates:
        clean, alone = rates["clean"], rates.get("undefended")
        beside = "" if alone is None else f" ({100 * alone['value']:.2f} % undefended)"
        said.append(f"{100 * clean['value']:.2f} % of {clean['n']} test images{beside}")
    if "reconstruction_rms" in card:
        said.append(f"reconstruction error {card['reconstruction_rms']:.4f} rms")
    if "bits_per_value" in card:
        said.append(f"{card['bits_per_value']:.3f} bits per value")
    return ", ".join(said)
