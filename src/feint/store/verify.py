"""Verify a run: judge its kept examples again on this machine, and compare with its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from feint.core.errors import ConfigError, DataError
from feint.evaluation import CellResult, Rate
from feint.evaluation.metrics import rate
from feint.evaluation.rejudge import (
    TOLERANCE,
    Fresh,
    Rejudged,
    compare_fresh,
    fresh_draws,
    rejudge,
)
from feint.evaluation.shard import Rows
from feint.models.checkpoint import PICKLES
from feint.store.files import read_json
from feint.store.resolver import Resolver
from feint.store.spec import RunSpec
from feint.store.stored import StoredRun, open_run

__all__ = ["Checked", "Verification", "spec_here", "verify"]

OnCell = Callable[[int, int, CellResult], None]
"""Called with (position, cells, cell) before a cell is judged again."""
_KNOWN = ("model", "defense", "source")
_ALSO = ("n", "draws", "key", "examples")


@dataclass(frozen=True)
class Checked:
    """One cell, judged again.

    Attributes:
        result: The cell as stored.
        accuracy: What the judge says now.
        flipped: Samples with another outcome than the stored one.
        unexplained: Those of them whose logits are no near tie.
        gap: The largest of the flipped samples' gaps between the two largest logits, as a share of
            the largest; None without a flip.
        problems: What is wrong with examples or rows, in sentences.
        fresh: The cell on fresh draws, if they were asked for.
    """

    result: CellResult
    accuracy: Rate
    flipped: int
    unexplained: int
    gap: float | None
    problems: tuple[str, ...]
    fresh: Fresh | None

    @property
    def agrees(self) -> bool:
        """Whether every outcome is the stored one, but for near ties, and the examples hold."""
        chance = self.fresh is None or self.fresh.agrees
        return not (self.unexplained or self.problems) and chance

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        fresh = None
        if self.fresh is not None:
            again = rate(self.fresh.shares, self.result.draws)
            z = self.fresh.z if math.isfinite(self.fresh.z) else None
            fresh = {"accuracy": again.as_dict(), "z": z, "agrees": self.fresh.agrees}
        return {
            **self.result.cell.spec(),
            "key": self.result.key,
            "n": len(self.result.rows["index"]),
            "stored": self.result.accuracy.as_dict(),
            "recomputed": self.accuracy.as_dict(),
            "flipped": self.flipped,
            "unexplained": self.unexplained,
            "gap": self.gap,
            "problems": list(self.problems),
            "fresh": fresh,
            "agrees": self.agrees,
        }


@dataclass(frozen=True)
class Verification:
    """What came of verifying a run.

    Attributes:
        run: What was verified.
        cells: Every cell, judged again.
        files: How many files of rows and examples were read and found whole.
        problems: What does not fit beside the cells: a result that is not that of the rows.
        notes: What differs here without having changed an outcome.
    """

    run: StoredRun
    cells: tuple[Checked, ...]
    files: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        """Whether the run's numbers are what its examples come to here."""
        return not self.problems and all(c.agrees for c in self.cells)

    def as_dict(self) -> dict[str, Any]:
        """Plain data: the command line's `--json`."""
        return {
            "run": str(self.run.directory),
            "agrees": self.agrees,
            "files": self.files,
            "cells": [c.as_dict() for c in self.cells],
            "problems": list(self.problems),
            "notes": list(self.notes),
        }


def verify(
    directory: str | Path,
    *,
    trust: bool = False,
    device: str = "cpu",
    batch_size: int | None = None,
    tolerance: float = TOLERANCE,
    fresh: bool = False,
    on_cell: OnCell | None = None,
) -> Verification:
    """Judge the kept examples of a run again, on this machine, and compare with what is stored.

    Nothing is attacked. Files are read and checked against their checksums before anything is
    loaded; model, defense and data are loaded by the specs of `run.json`. Each example must lie in
    [0, 1] and within the budget of its clean image, each outcome must be the stored one but for
    near ties of logits (`feint.evaluation.rejudge`), and the stored result that of the rows.

    Args:
        directory: Of a finished run.
        trust: Run code that the run names: `file.py:function`, pickles and TorchScript. Whoever
            made the run chose them.
        device: Where to judge.
        batch_size: Images per forward pass; by default the run's.
        tolerance: Gap of logits up to which a flip is explained.
        fresh: Also judge on fresh draws, and compare within chance.
        on_cell: Called before each cell.

    Raises:
        DataError: There is no finished run, a file is missing or damaged (it is named), or the data
            here are not those of the run.
        ConfigError: The run names code and `trust` is not given.
        FeintError: A model or data set cannot be loaded here.

    Cost: the judge's forward passes for every cell; twice that with `fresh`.

    Example:
        >>> verify("no-such-run")
        Traceback (most recent call last):
        feint.core.errors.DataError: no-such-run holds no run (there is no run.json); name a run's \
folder
    """
    stored = open_run(directory)
    files = stored.verify()
    spec = spec_here(stored, trust=trust, device=device, batch_size=batch_size)
    resolver = Resolver(spec)
    fingerprint = resolver.samples.fingerprint
    if fingerprint != stored.info["data"]["fingerprint"]:
        raise DataError(
            f"the samples that {spec.data.spec!r} gives here are not those of {stored.directory} "
            f"({fingerprint} here, {stored.info['data']['fingerprint']} in run.json); bring the "
            "same data"
        )
    notes: dict[str, None] = {}
    cells = []
    for position, result in enumerate(stored.results):
        if on_cell is not None:
            on_cell(position, len(stored.results), result)
        for sentence in _changed(resolver, result, stored.info["cells"][position]):
            notes[sentence] = None
        cells.append(_cell(stored, resolver, result, tolerance, fresh))
    return Verification(stored, tuple(cells), files, tuple(_result(stored)), tuple(notes))


def spec_here(
    stored: StoredRun,
    *,
    trust: bool = False,
    device: str = "cpu",
    batch_size: int | None = None,
) -> RunSpec:
    """A stored run's spec for loading its models on this machine.

    Args:
        stored: The run; it may be anybody's.
        trust: Run code that it names. What the run itself said of trust does not count.
        device: Where models go.
        batch_size: Images per pass; by default the run's.

    Raises:
        ConfigError: The run names code and `trust` is not given.
    """
    spec = stored.spec
    names = {n for c in spec.cells for n in (c.model, c.source) if n}
    code = sorted(n for n in names if ".py" in n.lower() or n.lower().endswith(tuple(PICKLES)))
    if code and not trust:
        raise ConfigError(
            f"{stored.directory / 'run.json'} names {code[0]}, which is code: loading it runs "
            "whatever its author wrote; give --trust (trust=True) if you trust it"
        )
    changes = {"trust": trust, "device": device, "batch_size": batch_size or spec.batch_size}
    return RunSpec(**{**spec.full, **changes})


def _changed(resolver: Resolver, result: CellResult, known: Mapping[str, Any]) -> list[str]:
    """What the specs name, where it is not what it was."""
    found = resolver(result.cell).context(result.cell, "")
    cell = result.cell
    words = {"model": cell.model, "defense": cell.defense, "source": cell.source}
    return [
        f"{part} {words[part]} is not byte for byte what the run had ({known[part] or 'none'} "
        f"then, {found[part] or 'none'} here): other weights, or other code"
        for part in _KNOWN
        if part in known and known[part] != found[part]
    ]


def _cell(
    stored: StoredRun, resolver: Resolver, result: CellResult, tolerance: float, fresh: bool
) -> Checked:
    subject, size = resolver(result.cell), resolver.spec.batch_size
    parts: list[Rejudged] = []
    shares = []
    for unit in stored.units(result):
        found = stored.examples(result, unit.shard)
        batch = resolver.samples.read(unit.start, unit.stop)
        if found.x_adv.shape != batch.x.shape:
            raise DataError(
                f"the examples of {result.key}-{unit.shard:05d} have shape "
                f"{tuple(found.x_adv.shape)}; the samples {tuple(batch.x.shape)}"
            )
        rows: Rows = {name: v[unit.start : unit.stop] for name, v in result.rows.items()}
        parts.append(
            rejudge(result.cell, subject, batch, found, rows, batch_size=size, tolerance=tolerance)
        )
        if fresh:
            shares.append(fresh_draws(result.cell, subject, batch, found, batch_size=size))
    flipped = np.concatenate([p.flipped for p in parts])
    explained = np.concatenate([p.explained for p in parts])
    gaps = np.concatenate([p.gaps for p in parts])
    correct = np.concatenate([p.rows["correct"] for p in parts])
    drawn = np.concatenate([p.rows["draws"] for p in parts])
    again = compare_fresh(result.rows, np.concatenate(shares)) if fresh else None
    return Checked(
        result,
        rate(correct / drawn, int(drawn.max(initial=1))),
        int(flipped.sum()),
        int((flipped & ~explained).sum()),
        float(np.nanmax(gaps)) if flipped.any() else None,
        tuple(sentence for p in parts for sentence in p.problems),
        again,
    )


def _result(stored: StoredRun) -> list[str]:
    """Whether `result.json` says what the rows say."""
    path = stored.directory / "result.json"
    said = read_json(path)
    if said is None:
        return [f"{path} is missing"]
    problems = []
    if len(said.get("cells", [])) != len(stored.results):
        return [f"{path} has {len(said.get('cells', []))} cells, the run {len(stored.results)}"]
    for position, (cell, result) in enumerate(zip(said["cells"], stored.results, strict=True)):
        for name, rows in {
            "accuracy": result.accuracy,
            "accuracy_8bit": result.accuracy_8bit,
        }.items():
            told = cell[name]["value"]
            if abs(told - rows.value) > 1e-9:
                problems.append(
                    f"{path}: {name} of cell {position} is {told:.6g}, its rows give "
                    f"{rows.value:.6g}"
                )
        mine = {**result.as_dict(), "key": result.key}
        problems += [
            f"{path}: {name} of cell {position} is {cell[name]!r}, its rows give {mine[name]!r}"
            for name in _ALSO
            if cell[name] != mine[name]
        ]
    if said.get("grade") != stored.verdict.grade:
        problems.append(
            f"{path}: the grade is {said.get('grade')!r}, findings and rows give "
            f"{stored.verdict.grade!r}"
        )
    return problems
