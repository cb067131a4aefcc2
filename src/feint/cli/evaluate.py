"""`feint evaluate`: model × defense × attackers → table, findings, verdict, HTML."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import Progress as Bar
from rich.progress import TaskID

from feint.cli import common
from feint.cli.gate import Conditions, FailUnder, FailUnderEnd, Junit, MinGrade, Sarif
from feint.core.errors import ConfigError, FeintError
from feint.data import DEFAULT, load
from feint.evaluation.cell import digest
from feint.evaluation.evaluate import Progress
from feint.evaluation.rungs import QUERIES, ROUNDS
from feint.recipes.plans import DEFAULT_ATTACKS, DEFAULT_SCENARIOS, plan, story
from feint.reports import ReportData, from_run, render
from feint.reports.attached import diagnose_run
from feint.reports.html import write
from feint.reports.output import output
from feint.store import DataSpec, Resolver, RunSpec, StoredRun, open_run, run

__all__ = ["evaluate", "gather", "publish"]

SAMPLES = 200
"""How many samples are taken unless told otherwise, where there are so many."""

_THREAT, _WORK, _INPUT = "Threat model", "How to go about it", "Model and data"


def evaluate(
    model: Annotated[
        str | None,
        typer.Option(
            help="Model: bundled:NAME, torchvision:NAME, timm:NAME, file.py:function, "
            "checkpoint.safetensors. Without it, the bundled story of ACE runs.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            help="Data: bundled:NAME, cifar10, imagefolder:DIR, images.csv, arrays.npz.",
            rich_help_panel=_INPUT,
        ),
    ] = DEFAULT,
    defense: Annotated[
        str,
        typer.Option(help="Defense, such as 'fd*2 + rand'.", rich_help_panel=_INPUT),
    ] = "none",
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            "-n",
            help="How many samples; 200 by default, or all if there are fewer.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="test or train.", rich_help_panel=_INPUT)] = "test",
    resize: Annotated[
        int | None,
        typer.Option(help="Bring every image to this side first.", rich_help_panel=_INPUT),
    ] = None,
    input_size: Annotated[
        int | None,
        typer.Option(
            help="Let the model resize its input to this side; attackers see the resizing.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    arch: Annotated[
        str | None, typer.Option(help="Architecture of a checkpoint.", rich_help_panel=_INPUT)
    ] = None,
    trust: Annotated[
        bool,
        typer.Option("--trust", help="Open pickles and TorchScript.", rich_help_panel=_INPUT),
    ] = False,
    attack: Annotated[
        str,
        typer.Option(help="Attacks, separated by commas.", rich_help_panel=_THREAT),
    ] = DEFAULT_ATTACKS,
    scenario: Annotated[
        str,
        typer.Option(
            help="Scenarios, separated by commas (see: feint list scenarios), or all: the whole "
            "ladder of attackers.",
            rich_help_panel=_THREAT,
        ),
    ] = DEFAULT_SCENARIOS,
    source: Annotated[
        str,
        typer.Option(
            help="Models that 'transfer' attacks, separated by commas.", rich_help_panel=_THREAT
        ),
    ] = "",
    norm: Annotated[
        str, typer.Option(help="linf, l2, l1, l0, or rms (S1's l2).", rich_help_panel=_THREAT)
    ] = "linf",
    eps: Annotated[
        str,
        typer.Option(
            help="Budget in image units, such as 8/255; more, separated by commas, give a curve.",
            rich_help_panel=_THREAT,
        ),
    ] = "8/255",
    targeted: Annotated[
        bool,
        typer.Option(
            "--targeted", help="The data's targets are the goal.", rich_help_panel=_THREAT
        ),
    ] = False,
    backward: Annotated[
        str,
        typer.Option(
            help="Backward rules for the defense, separated by commas: default, identity …; "
            "one per part of a chain as in 'aligned + exact'.",
            rich_help_panel=_THREAT,
        ),
    ] = "default",
    votes: Annotated[
        int, typer.Option(help="Draws per deployed prediction.", rich_help_panel=_THREAT)
    ] = 1,
    combine: Annotated[
        str,
        typer.Option(help="mean_probability, mean_logits, majority.", rich_help_panel=_THREAT),
    ] = "mean_probability",
    judge_draws: Annotated[
        int, typer.Option(help="Held-out draws per sample.", rich_help_panel=_THREAT)
    ] = 32,
    queries: Annotated[
        int,
        typer.Option(
            help="Queries per sample of the attackers of 'score' and 'decision'.",
            rich_help_panel=_THREAT,
        ),
    ] = QUERIES,
    steps: Annotated[
        int,
        typer.Option(help="Steps of the attackers of 'adaptive'.", rich_help_panel=_THREAT),
    ] = 40,
    rounds: Annotated[
        int, typer.Option(help="Rounds of 'semi-brute-force'.", rich_help_panel=_THREAT)
    ] = ROUNDS,
    seed: Annotated[int, typer.Option(help="Seed of every draw.", rich_help_panel=_WORK)] = 0,
    batch_size: Annotated[
        int, typer.Option(help="Images per forward pass.", rich_help_panel=_WORK)
    ] = 128,
    shard_size: Annotated[
        int, typer.Option(help="Samples per unit of work.", rich_help_panel=_WORK)
    ] = 100,
    device: Annotated[str, typer.Option(help="cpu, cuda …", rich_help_panel=_WORK)] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", rich_help_panel=_WORK)] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Local worker processes; by default none, or for the built-in models one per "
            "CPU core where there is much to do.",
            rich_help_panel=_WORK,
        ),
    ] = None,
    checks: Annotated[
        str,
        typer.Option(
            help="Checks beside the quick ones: all, or names such as binarisation,equal-budget; "
            "they cost as much as the evaluation itself. budget=2 lets the quick ones cost twice "
            "what the attacks took (half of it by default), budget=none whatever it takes.",
            rich_help_panel=_WORK,
        ),
    ] = "quick",
    diagnose: Annotated[
        bool,
        typer.Option(
            "--diagnose",
            help="Also show where gradients and perturbations go (feint diagnose), in the page; "
            "takes about a minute for small models.",
            rich_help_panel=_WORK,
        ),
    ] = False,
    fail_under: FailUnder = None,
    fail_under_end: FailUnderEnd = "low",
    min_grade: MinGrade = None,
    sarif: Sarif = None,
    junit: Junit = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Run directory; by default runs/NAME, where the same command resumes.",
            rich_help_panel=_WORK,
        ),
    ] = None,
    as_json: common.Json = False,
) -> None:
    """Evaluate a model and a defense against attackers, and grade the evaluation itself.

    Exit codes: 0 done, 1 verdict withheld or a condition not met (--fail-under, --min-grade), 2
    bad input, 130 interrupted (resumable).
    """
    begun = time.perf_counter()
    folder = out
    with common.guard(on_interrupt=lambda: _hint(folder)):
        conditions = Conditions(fail_under, fail_under_end, min_grade, sarif, junit)
        budgets = [common.number(part) for part in eps.split(",")]
        if samples is None:
            samples = min(SAMPLES, load(data, split=split).available)  # type: ignore[arg-type]
        chosen = DataSpec(spec=data, samples=samples, split=split, resize=resize)  # type: ignore[arg-type]
        built_in = model is None or (model.startswith("bundled:") and scenario.strip() == "all")
        if workers is None:
            workers = _cores() if built_in and device == "cpu" and threads is None else 0
        options = {
            "batch_size": batch_size,
            "shard_size": shard_size,
            "device": device,
            "threads": threads,
            "workers": workers,
            "checks": checks,
        }
        if model is None:
            _nothing_else(defense, source, arch, targeted)
            spec = story(chosen, seed=seed, judge_draws=judge_draws, **options)
        else:
            spec = plan(
                model,
                data=chosen,
                defense=defense,
                attacks=attack,
                scenarios=scenario,
                source=source,
                norm=norm,
                eps=budgets[0],
                curve=budgets[1:],
                targeted=targeted,
                backward=backward,
                votes=votes,
                combine=combine,
                judge_draws=judge_draws,
                seed=seed,
                queries=queries,
                steps=steps,
                rounds=rounds,
                input_size=input_size,
                arch=arch,
                trust=trust,
                **options,
            )
        folder = folder or Path("runs") / _name(spec)
        with common.progress(not as_json) as bar:
            show = _Show(bar, bar.add_task("starting", total=None, rate=""))
            result = run(spec, folder, on_progress=show, command=["feint", *sys.argv[1:]])
        if diagnose:
            _diagnose(folder, quiet=as_json)
        page, shown = publish(folder, as_json=as_json)
        gate = conditions.judge(shown)
        failed = result.verdict.withheld or (gate is not None and not gate.passed)
        conditions.write(shown, gate, failed=failed)
        if as_json:
            seconds = time.perf_counter() - begun
            common.print_json(
                output(
                    result,
                    run=str(folder),
                    html=str(page),
                    command=shown.command,
                    gate=gate,
                    seconds=seconds,
                )
            )
        else:
            conditions.show(gate)
        if failed:
            raise typer.Exit(common.MISSED)


def publish(folder: Path, *, as_json: bool = False) -> tuple[Path, ReportData]:
    """Write a run's HTML page into its folder, and print its table unless JSON is wanted.

    Returns:
        Where the page is, and what it shows.
    """
    page = folder / "report.html"
    stored = open_run(folder)
    data = gather(stored, page, models=stored.spec)  # the user has just run it
    write(data, page)
    if not as_json:
        render(common.out, data)
    return page, data


def _diagnose(folder: Path, *, quiet: bool) -> None:
    """A run's diagnosis, into its folder; what a model does not allow is said, and left out."""
    stored = open_run(folder)
    with common.progress(not quiet) as bar:
        task = bar.add_task("diagnosis", total=None, rate="")

        def show(measure: str, subject: str) -> None:
            bar.update(task, advance=1, description=escape(f"{measure} {subject}"[-44:]))

        try:
            diagnose_run(stored, Resolver(stored.spec), on_measure=show)
        except FeintError as error:
            common.err.print(f"without diagnosis: {escape(str(error))}", soft_wrap=True)


def gather(stored: StoredRun, page: Path, *, models: RunSpec | None) -> ReportData:
    """What a run's reports show; the budget of its first attack is the main one.

    Args:
        stored: The run.
        page: Where the page will be.
        models: The run's spec, if its models may be loaded for heat maps of input gradients.
    """
    attacked = [c.eps for c in stored.spec.cells if c.attack != "none"]
    return from_run(
        stored,
        resolver=None if models is None else Resolver(models),
        eps=attacked[0] if attacked else None,
        html=str(page),
    )


class _Show:
    """Progress of a run: which cell, how many samples, how fast."""

    def __init__(self, bar: Bar, task: TaskID) -> None:
        self.bar, self.task, self.begun, self.fresh = bar, task, time.perf_counter(), 0

    def __call__(self, state: Progress) -> None:
        cell = state.cell
        what = "clean" if cell.attack == "none" else f"{cell.scenario} {cell.attack}"
        label = f"{state.position + 1}/{state.cells} {escape(what[:40])}"
        seconds = time.perf_counter() - self.begun
        rate = f"{state.done / seconds:.0f}/s" if seconds > 1 else ""
        self.bar.update(
            self.task, description=label, completed=state.done, total=state.total, rate=rate
        )


def _cores() -> int:
    """Worker processes for models that are small enough to have several: up to four, 0 for one."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(usable or 1, 4) if (usable or 1) > 1 else 0


def _name(spec: RunSpec) -> str:
    """Folder of a run: readable, and the same for the same content."""
    slug = "".join(c if c.isalnum() else "-" for c in spec.title.lower())
    slug = "-".join(part for part in slug.split("-") if part)[:40].strip("-")
    return f"{slug}-{digest(spec.content)[:8]}"


def _hint(folder: Path | None) -> str:
    if folder is None:
        return "nothing was computed yet"
    return f"what is done is kept in {folder}; the same command goes on from there"


def _nothing_else(defense: str, source: str, arch: str | None, targeted: bool) -> None:
    given = {
        "--defense": defense != "none",
        "--source": bool(source),
        "--arch": bool(arch),
        "--targeted": targeted,
    }
    for option, used in given.items():
        if used:
            raise ConfigError(f"{option} needs a model; give --model SPEC (see: feint list models)")
