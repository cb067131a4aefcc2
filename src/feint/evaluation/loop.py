"""The evaluation loop: cells × shards, each unit computed once, in memory or on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from feint.core.errors import ConfigError, RangeError
from feint.evaluation.cell import Cell
from feint.evaluation.results import CellResult
from feint.evaluation.samples import Cache, Memory, Samples
from feint.evaluation.shard import Batch, Rows, Subject, attack_shard, judge_shard

__all__ = ["OnProgress", "Progress", "Resolver", "compute_unit", "execute"]


@dataclass(frozen=True)
class Progress:
    """Where a run stands; given to the callback before and after every unit."""

    cell: Cell
    cells: int
    position: int
    done: int
    total: int
    """Samples done and in all, over every cell."""
    cached: bool


Resolver = Callable[[Cell], Subject]
OnProgress = Callable[[Progress], None]


def execute(
    cells: Sequence[Cell],
    resolve: Resolver,
    samples: Samples,
    *,
    cache: Cache,
    shard_size: int = 100,
    batch_size: int = 128,
    on_progress: OnProgress | None = None,
) -> list[CellResult]:
    """Compute every unit that the cache does not hold, in order.

    Args:
        cells: What to compute.
        resolve: Gives a cell's objects.
        samples: The data.
        cache: Finished units; examples are shared by cells that differ only in their judge.
        shard_size: Samples per unit. A unit is what a killed run loses.
        batch_size: Images per forward pass.
        on_progress: Called around every unit.

    Raises:
        ConfigError, RangeError, UnknownNameError: A cell that cannot mean anything, before any
            work.
        GradientError: If a gradient attack gets no gradient from its view.

    Cost: For every cell, the attack's passes, and `judge_draws` forward passes per image (one if
        the pipeline is deterministic), twice where 8-bit rounding changes the image.
    """
    if len(samples) == 0:
        raise ConfigError("there are no samples to evaluate")
    for name, value in (("shard_size", shard_size), ("batch_size", batch_size)):
        if value < 1:
            raise RangeError(f"{name} is {value}; expected at least 1")
    for cell in cells:  # refuse what does not fit before any work
        resolve(cell).pipeline(cell)
        if cell.attack != "none":
            resolve(cell).attacker(cell).settings()
    if isinstance(cache, Memory):
        cache.begin(shard_size)
    address = samples.fingerprint
    starts = range(0, len(samples), shard_size)
    total, done, results = len(samples) * len(cells), 0, []
    for position, cell in enumerate(cells):
        subject = resolve(cell)
        context = subject.context(cell, address)
        result = CellResult(cell, cell.key(context), {}, cell.attack_key(context))
        parts = []
        for shard, start in enumerate(starts):
            begun = time.perf_counter()
            stop = min(start + shard_size, len(samples))
            rows = cache.rows(result.key, shard)
            cached = rows is not None
            if cached and isinstance(cache, Memory):
                _recall(result, cache, shard)
            if on_progress:
                on_progress(Progress(cell, len(cells), position, done, total, cached))
            if rows is None:
                batch = samples.read(start, stop)
                rows = compute_unit(result, subject, batch, shard, cache, batch_size)
            parts.append(rows)
            done += stop - start
            result.seconds += 0.0 if cached else time.perf_counter() - begun
            if on_progress:
                on_progress(Progress(cell, len(cells), position, done, total, cached))
        result.rows = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        results.append(result)
    return results


def _recall(result: CellResult, cache: Memory, shard: int) -> None:
    """Add the passes that a unit took when it was computed."""
    found = cache.examples(result.examples, shard)
    if found is not None:
        result.forwards += found.forwards
        result.backwards += found.backwards


def compute_unit(
    result: CellResult,
    subject: Subject,
    batch: Batch,
    shard: int,
    cache: Cache,
    batch_size: int,
) -> Rows:
    """Attack and judge one shard of a cell, and keep both in the cache.

    Args:
        result: The cell and its addresses; the passes are added to it.
        subject: The cell's objects.
        batch: The shard's samples.
        shard: Its number.
        cache: Examples that are there already are judged, not made again.
        batch_size: Images per forward pass.
    """
    found = cache.examples(result.examples, shard)
    if found is None:
        found = attack_shard(result.cell, subject, batch, batch_size)
        cache.keep_examples(result.examples, shard, found)
    result.forwards += found.forwards
    result.backwards += found.backwards
    rows = judge_shard(result.cell, subject, batch, found, batch_size)
    cache.keep_rows(result.key, shard, rows)
    return rows
