"""`feint reproduce`: a published table or figure, ours, and under an attacker who knows."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from feint.cli import common
from feint.core.errors import ConfigError, DataError, UnknownNameError
from feint.evaluation.loop import Progress
from feint.recipes.reproduce import reproduce as run
from feint.recipes.schema import PAPERS, SCALES, list_recipes, load_recipe
from feint.reports.reproduction import Rendered, write

__all__ = ["reproduce"]

_WHAT, _STAND_IN, _WORK = "What to reproduce", "Models and data", "How to go about it"


def reproduce(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Tables or figures, such as ace/table3; a paper, such as ace, for all of it; or a "
            "recipe's YAML file."
        ),
    ] = None,
    scale: Annotated[
        str, typer.Option(help=f"One of {', '.join(SCALES)}.", rich_help_panel=_WHAT)
    ] = "cpu",
    show_list: Annotated[
        bool, typer.Option("--list", help="List what there is.", rich_help_panel=_WHAT)
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="ROLE=SPEC: the model for a role of the recipe; SPEC alone if it has one role.",
            rich_help_panel=_STAND_IN,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="SPEC: data instead of the scale's; ROLE=SPEC: the data for a role of the recipe.",
            rich_help_panel=_STAND_IN,
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option("--samples", "-n", help="How many images.", rich_help_panel=_STAND_IN),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every draw.", rich_help_panel=_WORK)] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for runs and files; resumes there.", rich_help_panel=_WORK),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(help="Write PAPER/TABLE.json, .md and figures here.", rich_help_panel=_WORK),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images per pass.", rich_help_panel=_WORK)] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda …", rich_help_panel=_WORK)] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", rich_help_panel=_WORK)] = None,
    workers: Annotated[
        int, typer.Option(help="Local processes for the evaluations.", rich_help_panel=_WORK)
    ] = 0,
    trust: Annotated[
        bool, typer.Option("--trust", help="Open pickles.", rich_help_panel=_STAND_IN)
    ] = False,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch weights, CIFAR.", rich_help_panel=_STAND_IN)
    ] = False,
    as_json: common.Json = False,
) -> None:
    """Reproduce published tables and figures, with what is left under an adaptive attacker."""
    where = "runs/reproduce" if out is None else str(out)
    with common.guard(on_interrupt=lambda: f"the same command resumes from {where}"):
        if show_list:
            _list(as_json)
            return
        common.set_threads(threads)
        wanted = _wanted(names or [])
        _check(scale, samples, batch_size, workers)
        _check_device(device)
        if results is not None:
            _writable(results)
        missed, told = False, []
        for name in wanted:
            recipe = load_recipe(name)
            chosen = recipe.scales[scale]  # type: ignore[index]
            base = out or Path("runs") / "reproduce"
            folder = base / f"{recipe.name.replace('/', '-')}-{scale}"
            _writable(folder)
            given, sets = _data(data or [], chosen.sets)
            if samples is not None:
                given["samples"] = samples
            with common.progress(not as_json) as bar:
                task = bar.add_task(recipe.name, total=None, rate="")

                def show(at: Progress, task: Any = task, bar: Any = bar) -> None:
                    bar.update(task, completed=at.done, total=at.total, rate=at.cell.scenario)

                def measured(
                    what: str, done: int, total: int, task: Any = task, bar: Any = bar
                ) -> None:
                    bar.update(task, completed=done, total=total, rate=what)

                found = run(
                    recipe,
                    scale=scale,  # type: ignore[arg-type]
                    folder=folder,
                    models=_roles(model or [], chosen.models, recipe.name),
                    data=given,
                    sets=sets,
                    seed=seed,
                    device=device,
                    threads=threads,
                    workers=workers,
                    batch_size=batch_size,
                    trust=trust,
                    download=download,
                    on_progress=show,
                    on_measure=measured,
                    command=sys.argv,
                )
            write(found, folder)
            if results is not None:
                write(found, results / recipe.paper)
            missed |= found.misses > 0 and scale != "smoke"
            if as_json:
                told.append(found.as_dict())
            else:
                common.out.print(Rendered(found))
                common.out.print(f"{folder}", soft_wrap=True, markup=False)
        if as_json:
            common.print_json(told[0] if len(told) == 1 else {"reproductions": told})
    raise typer.Exit(common.MISSED if missed else common.DONE)


def _wanted(names: list[str]) -> list[str]:
    known = list_recipes()
    if not names:
        raise ConfigError("name a table or figure, such as ace/table3; feint reproduce --list")
    found: list[str] = []
    for name in names:
        whole = [n for n in known if n.partition("/")[0] == name]
        if not whole and name not in known and not name.endswith((".yaml", ".yml")):
            raise UnknownNameError("recipe", name, [*known, *PAPERS])
        found += whole or [name]
    return list(dict.fromkeys(found))


def _check(scale: str, samples: int | None, batch_size: int, workers: int) -> None:
    """What is wrong whatever the recipe."""
    if scale not in SCALES:
        raise UnknownNameError("scale", scale, SCALES)
    for option, value, least in (
        ("--samples", samples, 1),
        ("--batch-size", batch_size, 1),
        ("--workers", workers, 0),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{option} is {value}; expected at least {least}")


def _check_device(text: str) -> None:
    import torch

    try:
        torch.device(text)
    except RuntimeError:
        raise ConfigError(f"--device is {text!r}; expected cpu, cuda, cuda:1, mps …") from None


def _writable(folder: Path) -> None:
    """Make a folder before any work, and find out whether files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataError(
            f"cannot write into {folder}: {error.strerror}; name another folder with --out or "
            "--results"
        ) from None


def _data(given: list[str], roles: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The spec for all points, and those by role."""
    whole: dict[str, Any] = {}
    sets = {}
    for text in given:
        role, sign, spec = text.partition("=")
        if sign and role in roles:
            sets[role] = spec
        elif "spec" in whole:
            raise ConfigError(
                f"--data names {whole['spec']!r} and {text!r} for the same images; the roles of "
                f"this recipe are {', '.join(roles) or 'none'}"
            )
        else:
            whole["spec"] = text
    return whole, sets


def _roles(given: list[str], roles: Mapping[str, str], name: str) -> dict[str, str]:
    """`ROLE=SPEC`, or a spec alone where there is one role."""
    found = {}
    for text in given:
        role, sign, spec = text.partition("=")
        if sign and role in roles:
            found[role] = spec
        elif len(roles) == 1:
            found[next(iter(roles))] = text
        else:
            raise UnknownNameError(f"model role of {name}", role, roles)
    return found


def _list(as_json: bool) -> None:
    recipes = [load_recipe(name) for name in list_recipes()]
    if as_json:
        rows = [
            {"name": r.name, "title": r.title, "place": r.place, "scales": list(r.scales)}
            for r in recipes
        ]
        common.print_json({"recipes": rows})
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", no_wrap=True, style="bold")
    table.add_column("place", no_wrap=True)
    table.add_column("what it shows")
    for recipe in recipes:
        table.add_row(recipe.name, recipe.place, recipe.title)
    common.out.print(table)
    common.out.print(f"Scales: {', '.join(SCALES)}. Run one: feint reproduce NAME --scale smoke")
