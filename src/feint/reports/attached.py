"""A diagnosis that belongs to a run: of its own models and samples, kept beside it, shown."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feint.core.errors import DataError, UnknownNameError
from feint.diagnostics import MEASURES, Options, Subject, diagnose
from feint.evaluation.pipeline import Pipeline
from feint.evaluation.verdict import name_of
from feint.reports.diagnostics import Written, write
from feint.reports.diagnostics_captions import caption
from feint.reports.diagnostics_drawing import brief
from feint.store import Resolver, StoredRun
from feint.store.files import read_bytes

__all__ = ["FOLDER", "Attached", "Plate", "attached", "diagnose_run"]

FOLDER = "diagnosis"
"""Folder of a run's diagnosis, in the run's own."""
SAMPLES = 24
"""Images that are diagnosed, the run's first ones."""
_SSIM_SIDE = 7


@dataclass(frozen=True)
class Plate:
    """One figure of a diagnosis."""

    measure: str
    title: str
    paper: str
    caption: str
    uri: str


@dataclass(frozen=True)
class Attached:
    """A stored diagnosis, as a page shows it.

    Attributes:
        headline: What stands out.
        n: How many images were diagnosed.
        subjects: Names of the columns.
        lines: (measure, label, values, intervals) of the table.
        plates: Figures.
        notes: What a reader must know.
    """

    headline: str
    n: int
    subjects: tuple[str, ...]
    lines: tuple[tuple[str, str, tuple[str, ...], tuple[str, ...]], ...]
    plates: tuple[Plate, ...]
    notes: tuple[str, ...]


def diagnose_run(
    run: StoredRun,
    resolver: Resolver,
    *,
    samples: int = SAMPLES,
    measures: Sequence[str] | None = None,
    on_measure: Callable[[str, str], None] | None = None,
) -> Written:
    """Diagnose a run's pipelines on its first samples, into its folder `diagnosis`.

    Every model is shown bare, and behind each defense that the run puts in front of it. The attack
    behind perturbations is `feint.diagnostics`' own, at the run's budget where that is linf.

    Args:
        run: A run on disk.
        resolver: Gives its models and samples.
        samples: How many images, at most.
        measures: Names of `feint.diagnostics.MEASURES`; all that fit by default.
        on_measure: Called as `on_measure(measure, subject)` before each.

    Returns:
        The files.

    Raises:
        FeintError: As `feint.diagnostics.diagnose`.

    Cost: as `feint.diagnostics.diagnose`, for every pipeline.
    """
    batch = resolver.samples.read(0, min(samples, len(resolver.samples)))
    cells = [r.cell for r in run.results]
    subjects: dict[str, Subject] = {}
    notes = []
    for bare in (True, False):
        for cell in cells:
            name = cell.model if bare else name_of(cell.model, cell.defense)
            if name in subjects:
                continue
            found = resolver(cell)
            pipeline = Pipeline(found.model, None if bare else found.defense)
            try:
                subjects[name] = Subject(name, found.model, pipeline, pipeline.view())
            except UnknownNameError as error:
                notes.append(f"{name} is left out: no gradient passes its defense ({error})")
    wanted = list(MEASURES) if measures is None else list(measures)
    if min(batch.x.shape[-2:]) < _SSIM_SIDE and measures is None:
        wanted.remove("ssim")
    attacked = [c for c in cells if c.attack != "none" and c.norm == "linf" and 0 < c.eps <= 1]
    seed = cells[0].seed if cells else 0
    options = Options(
        seed=seed,
        batch_size=run.spec.batch_size,
        eps=attacked[0].eps if attacked else Options.eps,
    )
    result = diagnose(
        list(subjects.values()),
        batch.x,
        batch.y,
        measures=wanted,
        options=options,
        index=batch.index,
        on_measure=on_measure,
    )
    folder = run.directory / FOLDER
    folder.mkdir(exist_ok=True)
    facts = {
        "run": str(run.directory),
        "data": f"the first {len(batch)} of {run.info['data']['text']}",
        "attack": "PGD, 20 steps along the l2-normalised gradient, clipped to linf",
        "eps": f"{255 * options.eps:g}/255",
        "seed": str(seed),
    }
    title = f"Diagnosis of {run.spec.title or run.directory.name}"
    classes = run.classes or ()
    return write(result, folder, title=title, facts=facts, notes=notes, classes=classes)


def attached(folder: Path) -> Attached | None:
    """The diagnosis that a run's folder holds; None if it holds none.

    Raises:
        DataError: A file of it is missing or damaged; names it.
    """
    path = folder / FOLDER / "numbers.json"
    raw = read_bytes(path)
    if raw is None:
        return None
    try:
        told: dict[str, Any] = json.loads(raw)
        lines = tuple(
            (line["measure"], line["label"], tuple(line["values"]), tuple(line["intervals"]))
            for line in told["table"]
        )
        measures = [name for name in MEASURES if name in told["numbers"]]
        return Attached(
            told["headline"],
            int(told["n"]),
            tuple(brief(name) for name in told["models"]),
            lines,
            tuple(_plate(path.parent, name) for name in measures),
            tuple(told["notes"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is damaged or of an earlier version ({type(error).__name__}); delete the "
            "folder and diagnose again (--diagnose)"
        ) from None


def _plate(folder: Path, measure: str) -> Plate:
    path = folder / f"{measure}.svg"
    raw = read_bytes(path)
    if raw is None:
        raise DataError(f"{path} is missing; diagnose again (--diagnose)")
    about = MEASURES[measure]
    uri = "data:image/svg+xml;base64," + base64.b64encode(raw).decode()
    return Plate(measure, about.title, about.paper, caption(measure), uri)
