"""The evaluation loop: cells × shards, each unit computed once, in memory or on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from feint.core.checks import check_images, check_labels
from feint.core.errors import ConfigError
from feint.defenses.base import Defense
from feint.evaluation import health
from feint.evaluation.attackers import Attacked
from feint.evaluation.cell import Cell, digest
from feint.evaluation.findings import Finding
from feint.evaluation.pipeline import Combine
from feint.evaluation.results import CellResult
from feint.evaluation.shard import Batch, Rows, Subject, attack_shard, judge_shard
from feint.evaluation.verdict import Verdict, conclude

__all__ = [
    "Cache",
    "Evaluation",
    "Memory",
    "Progress",
    "Resolver",
    "Samples",
    "TensorSamples",
    "compute_unit",
    "evaluate",
    "execute",
    "expand",
    "finish",
]


class Samples(Protocol):
    """Where samples come from: anything with a length, a content address, and reading by range."""

    @property
    def fingerprint(self) -> str:
        """Content address of the selected samples, in order."""
        ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Batch:
        """Samples `start … stop−1` of the selection."""
        ...


@dataclass(frozen=True)
class TensorSamples:
    """Samples held in memory."""

    batch: Batch
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if not self.fingerprint:
            sums = [float(self.batch.x.double().sum()), *self.batch.y.tolist()]
            object.__setattr__(
                self, "fingerprint", digest([sums, self.batch.index.tolist(), len(self.batch)])
            )

    def __len__(self) -> int:
        return len(self.batch)

    def read(self, start: int, stop: int) -> Batch:
        """A slice."""
        b = self.batch
        target = None if b.target is None else b.target[start:stop]
        return Batch(b.x[start:stop], b.y[start:stop], b.index[start:stop], target)


class Cache(Protocol):
    """Where units are kept; `store` has one on disk."""

    def examples(self, key: str, shard: int) -> Attacked | None:
        """Adversarial examples of a unit, if they are there and whole."""
        ...

    def keep_examples(self, key: str, shard: int, found: Attacked) -> None:
        """Keep them."""
        ...

    def rows(self, key: str, shard: int) -> Rows | None:
        """Judged rows of a unit, if they are there and whole."""
        ...

    def keep_rows(self, key: str, shard: int, rows: Rows) -> None:
        """Keep them."""
        ...


@dataclass
class Memory:
    """A cache that lives as long as the process."""

    _examples: dict[tuple[str, int], Attacked] = field(default_factory=dict)
    _rows: dict[tuple[str, int], Rows] = field(default_factory=dict)

    def examples(self, key: str, shard: int) -> Attacked | None:
        """See `Cache`."""
        return self._examples.get((key, shard))

    def keep_examples(self, key: str, shard: int, found: Attacked) -> None:
        """See `Cache`."""
        self._examples[key, shard] = found

    def rows(self, key: str, shard: int) -> Rows | None:
        """See `Cache`."""
        return self._rows.get((key, shard))

    def keep_rows(self, key: str, shard: int, rows: Rows) -> None:
        """See `Cache`."""
        self._rows[key, shard] = rows


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
    """
    if len(samples) == 0:
        raise ConfigError("there are no samples to evaluate")
    starts = range(0, len(samples), shard_size)
    total, done, results = len(samples) * len(cells), 0, []
    for position, cell in enumerate(cells):
        subject = resolve(cell)
        if cell.attack != "none":
            subject.attacker(cell).settings()  # refuse what does not fit before any work
        context = subject.context(cell, samples.fingerprint)
        result = CellResult(cell, cell.key(context), {}, cell.attack_key(context))
        parts = []
        for shard, start in enumerate(starts):
            begun = time.perf_counter()
            stop = min(start + shard_size, len(samples))
            rows = cache.rows(result.key, shard)
            cached = rows is not None
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


def expand(
    base: Cell,
    attacks: Iterable[str],
    scenarios: Iterable[str],
    *,
    source: str = "",
    undefended: bool = True,
) -> list[Cell]:
    """Cells of one pipeline: clean accuracy, then every attack in every scenario.

    Args:
        base: Model, defense, threat, judge and seed; its scenario and attack do not count.
        attacks: Attack expressions.
        scenarios: Scenario names; `"none"` is always there.
        source: Spec of the model that `"transfer"` attacks.
        undefended: Also attack and judge the bare model, which says what the attacks are worth.
    """
    attacks = list(attacks)
    clean = replace(base, scenario="none", attack="none", source="")
    bare = replace(clean, defense="none", votes=1)
    cells = [clean]
    if undefended and base.defense != "none":
        cells = [bare, *(replace(bare, scenario="white-box", attack=a) for a in attacks), clean]
    for scenario in scenarios:
        if scenario == "none" or (scenario in ("gray-box", "removal") and base.defense == "none"):
            continue
        used = source if scenario == "transfer" else ""
        cells += [replace(clean, scenario=scenario, attack=a, source=used) for a in attacks]
    return list(dict.fromkeys(cells))


@dataclass
class Evaluation:
    """An evaluation's cells, its findings about itself, and the verdict that follows."""

    results: list[CellResult]
    findings: list[Finding]
    verdict: Verdict
    seconds: float

    def as_dict(self) -> dict[str, object]:
        """Plain data: the command line's `--json`."""
        return {
            "verdict": self.verdict.text,
            "grade": self.verdict.grade,
            "cells": [r.as_dict() for r in self.results],
            "findings": [f.as_dict() for f in self.findings],
            "seconds": round(self.seconds, 2),
        }


def finish(
    results: list[CellResult],
    resolve: Resolver,
    samples: Samples,
    *,
    batch_size: int,
    seconds: float,
    extra: Sequence[Finding] = (),
) -> Evaluation:
    """Check the results, and conclude."""
    findings = [*extra, *health.check(results, resolve, samples, batch_size=batch_size)]
    return Evaluation(results, findings, conclude(results, findings), seconds)


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    defense: Defense | None = None,
    attacks: Sequence[str] = ("pgd",),
    scenarios: Sequence[str] = ("none", "gray-box", "white-box"),
    norm: str = "linf",
    eps: float = 8 / 255,
    target: Tensor | None = None,
    index: Tensor | None = None,
    source: nn.Module | None = None,
    backward: str = "default",
    votes: int = 1,
    combine: Combine = "mean_probability",
    judge_draws: int = 32,
    seed: int = 0,
    batch_size: int = 128,
    cache: Cache | None = None,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Evaluate a model with a defense against attackers, and grade the evaluation itself.

    Args:
        model: Maps images in [0, 1] to logits.
        x: Images, (N, C, H, W), in [0, 1].
        y: True labels, (N,).
        defense: What stands in front of the model, or none.
        attacks: Attack expressions, such as `"pgd(steps=100)"`.
        scenarios: Names of `feint.evaluation.SCENARIOS`.
        norm: The threat model's norm.
        eps: The threat model's budget, in image units.
        target: Targets, (N,), for a targeted threat.
        index: Indices of the samples in their data set, which key every draw; by default 0 … N−1.
        source: Another model, for `"transfer"`.
        backward: Backward rule for the defense; by default its own choice.
        votes: Draws per prediction of the deployed pipeline.
        combine: How votes are combined.
        judge_draws: Held-out draws per sample for a stochastic pipeline.
        seed: Seed of every draw.
        batch_size: Images per forward pass.
        cache: Finished units; by default in memory.
        on_progress: Called around every unit of work.

    Returns:
        Cells with per-sample rows, findings and the verdict.

    Raises:
        ConfigError, RangeError, ShapeError, DtypeError: On bad arguments.
        GradientError: If a gradient attack gets no gradient from its view.

    Cost: For every cell, the attack's passes, and `judge_draws` forward passes per image.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        >>> x, y = torch.rand(8, 3, 2, 2), torch.zeros(8, dtype=torch.int64)
        >>> result = evaluate(model, x, y, attacks=["pgd(steps=5)"], eps=0.5)
        >>> [c.cell.scenario for c in result.results]
        ['none', 'white-box']
    """
    begun = time.perf_counter()
    check_images(x)
    check_labels(y, len(x))
    index = torch.arange(len(x)) if index is None else index
    samples = TensorSamples(Batch(x, y, index, target))
    base = Cell(
        "none",
        model=type(model).__name__,
        defense="none" if defense is None else str(defense),
        backward=backward,
        norm=norm,
        eps=eps,
        targeted=target is not None,
        votes=votes,
        combine=combine,
        judge_draws=judge_draws,
        seed=seed,
    )
    model, noted = health.declare(model, x[:8])
    shared = Subject(model, defense, source)
    bare = Subject(model, None, source)

    def resolve(cell: Cell) -> Subject:
        return bare if cell.defense == "none" else shared

    results = execute(
        expand(base, attacks, scenarios, source="" if source is None else type(source).__name__),
        resolve,
        samples,
        cache=Memory() if cache is None else cache,
        batch_size=batch_size,
        on_progress=on_progress,
    )
    seconds = time.perf_counter() - begun
    return finish(results, resolve, samples, batch_size=batch_size, seconds=seconds, extra=noted)
