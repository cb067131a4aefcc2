"""Reproduce a table or figure: published, ours, and under an attacker who knows the defense."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from feint.core.errors import ConfigError, UnknownNameError
from feint.diagnostics.numbers import Measured, Number
from feint.evaluation import Cell, CellResult, Evaluation
from feint.evaluation.cell import digest
from feint.evaluation.loop import OnProgress
from feint.recipes import (  # noqa: F401  (they register their metrics)
    measures,
    measures_ace,
    measures_pixel_deflection,
    measures_prm,
    measures_qiu,
    measures_s2snet,
)
from feint.recipes.claims import Verdict, decide
from feint.recipes.grid import Point, adaptive_fields, points
from feint.recipes.lab import Lab, data_spec
from feint.recipes.metrics import METRICS, Case, Fields, Metric, metric_of
from feint.recipes.provenance import models_of, provenance, typed
from feint.recipes.schema import PAPERS, SCALES, Recipe, Scale, load_recipe
from feint.store import DataSpec, RunSpec, run
from feint.store.files import read_bytes

__all__ = ["METRICS", "Entry", "Reproduction", "reproduce"]

_Z = 1.959963984540054
ScaleName = Literal["smoke", "cpu", "paper"]


@dataclass(frozen=True)
class Entry:
    """One number of the table: what was published, what we measured, what is left of it."""

    point: Point
    metric: str
    share: bool
    ours: Number
    adaptive: Number | None
    hit: bool | None
    """Whether the published number lies within the sampling error of ours; None if there is
    none."""
    arrays: Mapping[str, Any] = field(default_factory=dict, hash=False)
    others: Mapping[str, Number] = field(default_factory=dict, hash=False)
    """Further numbers of the same measure."""

    def as_dict(self, axes: Sequence[str]) -> dict[str, Any]:
        """Plain data."""
        return {
            "labels": dict(zip(axes, self.point.labels, strict=True)),
            "metric": self.metric,
            "unit": "share" if self.share else "number",
            "published": self.point.published,
            "ours": self.ours.as_dict(),
            "hit": self.hit,
            "adaptive": None if self.adaptive is None else self.adaptive.as_dict(),
            **({"lacks": self.point.lacks} if self.point.lacks else {}),
        }


@dataclass(frozen=True)
class Reproduction:
    """A table or figure, reproduced."""

    recipe: Recipe
    scale: ScaleName
    entries: tuple[Entry, ...]
    claims: tuple[Verdict, ...]
    evaluations: tuple[Evaluation, ...]
    """The evaluations behind it, with their findings; empty if it needed none."""
    folder: Path
    provenance: Mapping[str, Any]
    seconds: float

    @property
    def hits(self) -> int:
        """How many published numbers ours agree with."""
        return sum(e.hit is True for e in self.entries)

    @property
    def misses(self) -> int:
        """How many they do not agree with."""
        return sum(e.hit is False for e in self.entries)

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed in the evaluations behind it."""
        found = (f for e in self.evaluations for f in e.findings if f.status == "fail")
        return tuple(dict.fromkeys(f.check for f in found))

    def entry(self, *labels: str) -> Entry:
        """The entry at the labels of every axis."""
        return next(e for e in self.entries if e.point.labels == labels)

    def as_dict(self) -> dict[str, Any]:
        """Plain data: the command line's `--json`, and `results/PAPER/TABLE.json`."""
        recipe, axes = self.recipe, list(self.recipe.axes)
        made = recipe.scales[self.scale].checks != "none"
        grades = [e.verdict.grade for e in self.evaluations] if made else []
        return {
            "recipe": recipe.name,
            "title": recipe.title,
            "place": recipe.place,
            "paper": PAPERS[recipe.paper],
            "scale": self.scale,
            "differs": recipe.scales[self.scale].about,
            "about": recipe.about,
            "axes": {name: list(labels) for name, labels in recipe.axes.items()},
            "entries": [e.as_dict(axes) for e in self.entries],
            "claims": [c.as_dict() for c in self.claims],
            "targets": {"hit": self.hits, "missed": self.misses},
            "checks": {"failed": list(self.failed), "grades": grades},
            "provenance": dict(self.provenance),
            "seconds": round(self.seconds, 1),
        }


def reproduce(
    recipe: str | Recipe,
    *,
    scale: ScaleName = "smoke",
    folder: str | Path,
    models: Mapping[str, str] | None = None,
    data: Mapping[str, Any] | None = None,
    sets: Mapping[str, str] | None = None,
    seed: int = 0,
    device: str = "cpu",
    threads: int | None = None,
    workers: int = 0,
    batch_size: int = 64,
    trust: bool = False,
    download: bool = False,
    on_progress: OnProgress | None = None,
    on_measure: Callable[[str, int, int], None] | None = None,
    command: Sequence[str] = (),
) -> Reproduction:
    """Compute a recipe at a scale. What was stopped resumes, and nothing is computed twice.

    Args:
        recipe: A name, a YAML file, or a recipe.
        scale: `"smoke"` (seconds, bundled models and images), `"cpu"` (two cores, real data) or
            `"paper"` (the paper's models, data and steps).
        folder: Where runs and measures are kept.
        models: Model specs by role (`Scale.models`).
        data: Fields of `DataSpec` that replace the scale's.
        sets: Data specs by role (`Scale.sets`).
        seed: Of every draw.
        device: Where models are.
        threads: Threads of torch.
        workers: Local processes for the evaluations' units.
        batch_size: Images per pass.
        trust: Open pickles.
        download: Fetch weights and CIFAR.
        on_progress: Called around every unit of an evaluation.
        on_measure: Called as `on_measure(what, done, total)` for every measure that needs models.
        command: What the user typed.

    Raises:
        UnknownNameError, ConfigError: A recipe, scale, role or field that cannot be, or that must
            be given; before any work.
        DataError: Data or models that are not there.

    Cost: that of its evaluations and measures.
    """
    begun = time.perf_counter()
    plan = load_recipe(recipe) if isinstance(recipe, str) else recipe
    if scale not in SCALES:
        raise UnknownNameError("scale", scale, SCALES)
    chosen = plan.scales[scale]
    grid = points(plan, chosen, models or {}, sets)
    lab = Lab(
        Path(folder), _data(plan, chosen, data or {}), device, batch_size, trust, download, seed
    )
    if download:
        lab.data = lab.data.model_copy(update={"download": True})
    tasks = [_Task(p, adaptive_fields(plan, chosen, p)) for p in grid]
    for task in tasks:
        task.metric = metric_of(task.point.fields)
    used = [fields for task in tasks for fields in task.both()]
    for spec in models_of(used):
        lab.loaded(spec)  # weights that are not there are told of now
    results, evaluations = _evaluate(
        tasks, lab, plan, chosen, seed, threads, workers, on_progress, command
    )
    slow = [t for t in tasks if t.metric.models and not t.point.lacks]
    entries, done = [], 0
    for task in tasks:
        if task.point.lacks:
            share = task.metric.share or plan.unit == "percent"
            entries.append(Entry(task.point, task.metric.name, share, Number(None), None, None))
            continue
        if task.metric.models and on_measure:
            on_measure(", ".join(task.point.labels), done, len(slow))
        done += task.metric.models
        entries.append(_entry(task, results, lab, plan))
    axes = {name: list(labels) for name, labels in plan.axes.items()}
    told = []
    for claim in plan.claims:
        numbers = {e.point.labels: e.ours if claim.of == "ours" else e.adaptive for e in entries}
        percent = all(e.share for e in entries)
        show: Callable[[float], str] = _percent if percent else "{:.3g}".format
        told.append(decide(claim, axes, numbers, show))
    return Reproduction(
        plan,
        scale,
        tuple(entries),
        tuple(told),
        tuple(evaluations),
        Path(folder),
        {
            "command": typed(plan, scale, models or {}, data or {}, sets or {}, seed),
            **provenance(lab, used, seed),
        },
        # What was there already took its time, too.
        max(
            time.perf_counter() - begun,
            sum(found.seconds for found in results.values()) + sum(lab.seconds.values()),
        ),
    )


@dataclass
class _Task:
    """A point, and its adaptive twin."""

    point: Point
    adaptive: dict[str, Any] | None
    metric: Metric = field(init=False)

    def both(self) -> Iterator[Fields]:
        """The fields of what is measured: none if something must be given first."""
        if self.point.lacks:
            return
        yield self.point.fields
        if self.adaptive is not None:
            yield self.adaptive


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _data(recipe: Recipe, scale: Scale, given: Mapping[str, Any]) -> DataSpec:
    wanted = {**scale.data, **given}
    if wanted.get("spec") == "?":
        what = recipe.needs.get("data", "images with labels")
        raise ConfigError(f"{recipe.name} needs data ({what}); give it with --data SPEC")
    return data_spec(wanted)


def _evaluate(
    tasks: Sequence[_Task],
    lab: Lab,
    recipe: Recipe,
    scale: Scale,
    seed: int,
    threads: int | None,
    workers: int,
    on_progress: OnProgress | None,
    command: Sequence[str],
) -> tuple[dict[tuple[str, Cell], CellResult], list[Evaluation]]:
    """Every cell that any point asks for, one run for each set of samples."""
    wanted: dict[str, dict[Cell, None]] = {}
    specs: dict[str, DataSpec] = {}
    for task in tasks:
        for fields in task.both():
            spec = lab.data_of(fields)
            key = spec.model_dump_json()
            asked = task.metric.ask({"seed": seed, **fields}, _shape(task.metric, lab, fields))
            for cells in asked.values():
                for cell in cells:
                    specs[key] = spec
                    wanted.setdefault(key, {})[cell] = None
    results: dict[tuple[str, Cell], CellResult] = {}
    evaluations = []
    for number, (key, asked_for) in enumerate(wanted.items()):
        job = RunSpec(
            title=f"{recipe.place}: {recipe.title}",
            data=specs[key],
            cells=tuple(asked_for),
            shard_size=25,
            batch_size=lab.batch_size,
            device=lab.device,
            channels_last=True,
            threads=threads,
            workers=workers,
            trust=lab.trust,
            download=lab.download,
            checks="quick" if scale.checks == "none" else scale.checks,
        )
        name = "run" if len(wanted) == 1 else f"run-{number}"
        room = _room(lab.folder / name, job)
        found = run(
            job,
            room,
            checked=scale.checks != "none",
            beside=[d for d in sorted(lab.folder.parent.glob("*/run*")) if d != room],
            on_progress=on_progress,
            command=command,
        )
        evaluations.append(found)
        results.update({(key, r.cell): r for r in found.results})
    return results, evaluations


def _room(folder: Path, job: RunSpec) -> Path:
    """The folder for a run: another one if it holds a run of what the recipe was before."""
    raw = read_bytes(folder / "run.json")
    try:
        other = raw is not None and RunSpec(**json.loads(raw)["spec"]).content != job.content
    except (ValueError, KeyError, TypeError):
        other = False  # a damaged run is told of by `run`
    return folder.with_name(f"{folder.name}-{digest(job.content)[:8]}") if other else folder


def _shape(metric: Metric, lab: Lab, fields: Fields) -> tuple[int, ...]:
    """The shape of a point's images, which S1's budget needs."""
    return lab.dataset(fields).shape if fields.get("norm") == "rms" else ()


def _entry(
    task: _Task, results: Mapping[tuple[str, Cell], CellResult], lab: Lab, recipe: Recipe
) -> Entry:
    def read(fields: Fields) -> Measured:
        key = lab.data_of(fields).model_dump_json()
        asked = task.metric.ask({"seed": lab.seed, **fields}, _shape(task.metric, lab, fields))
        cells = {name: [results[key, c] for c in found] for name, found in asked.items()}
        return task.metric(Case(fields, cells, lab))

    ours = read(task.point.fields)
    knowing = None if task.adaptive is None else read(task.adaptive).numbers["value"]
    value = ours.numbers["value"]
    return Entry(
        task.point,
        task.metric.name,
        task.metric.share or recipe.unit == "percent",
        value,
        knowing,
        _hit(value, task.point.published, recipe, task.metric.share or recipe.unit == "percent"),
        ours.arrays,
        {k: v for k, v in ours.numbers.items() if k != "value"},
    )


def _hit(ours: Number, published: float | None, recipe: Recipe, share: bool = True) -> bool | None:
    """Whether a published number agrees with ours within the sampling errors of both.

    The interval of a difference of two independent rates (Newcombe 1998, method 10, from both
    Wilson intervals), and how finely the number is given. The sampling error of a published number
    that is no share is not known.
    """
    if published is None or ours.value is None:
        return None
    unit = 0.01 if recipe.unit == "percent" else 1.0
    slack = recipe.published_interval * unit
    low = ours.value if ours.low is None else ours.low
    high = ours.value if ours.high is None else ours.high
    theirs_down = theirs_up = 0.0
    if share and recipe.images and 0 <= published <= 1:
        n, z2 = recipe.images, _Z**2
        middle = (published + z2 / (2 * n)) / (1 + z2 / n)
        half = _Z / (1 + z2 / n) * math.sqrt(published * (1 - published) / n + z2 / (4 * n * n))
        theirs_down, theirs_up = published - (middle - half), middle + half - published
    gap = published - ours.value
    if gap >= 0:
        return gap <= math.hypot(high - ours.value, theirs_down) + slack + 1e-12
    return -gap <= math.hypot(ours.value - low, theirs_up) + slack + 1e-12
