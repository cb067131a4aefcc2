"""Read a run back, for reports and verification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from feint.core.errors import DataError, RangeError
from feint.evaluation import CellResult, Evaluation, Finding, Verdict
from feint.evaluation.attackers import Attacked
from feint.evaluation.cell import digest
from feint.evaluation.verdict import conclude
from feint.store.cache import examples_path, load_examples, load_rows, rows_path
from feint.store.files import read_json
from feint.store.record import Record, repair
from feint.store.resolver import Unit, shards
from feint.store.spec import Published, RunSpec

__all__ = ["StoredRun", "open_run"]


@dataclass
class StoredRun:
    """A run on disk; made by `open_run`. Needs no model and no data.

    Attributes:
        directory: Where it is.
        spec: What was computed, with defaults.
        info: All of `run.json`: given, data, models, cells, components, sessions, environments,
            notes, timing.
        results: One per cell, with rows.
        findings: Checks of the run; empty if it is not done.
        positions: Of the results among the spec's cells; all of them for a run that is done.
    """

    directory: Path
    spec: RunSpec
    info: dict[str, Any]
    results: list[CellResult]
    findings: list[Finding]
    positions: list[int]
    _held: dict[tuple[str, int], Attacked] = field(default_factory=dict, repr=False)

    @property
    def status(self) -> str:
        """`started`, `running`, `interrupted`, `error` or `done`; a killed run says `running`."""
        return str(self.info["status"])

    @cached_property
    def verdict(self) -> Verdict:
        """What follows from results and findings."""
        return conclude(self.results, self.findings)

    @property
    def evaluation(self) -> Evaluation:
        """What `run` returned."""
        seconds = float(self.info["timing"]["total"])
        return Evaluation(self.results, self.findings, self.verdict, seconds)

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return int(self.info["data"]["samples"])

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, if the data set names them."""
        return self.info["data"]["classes"]

    def published(self, result: CellResult) -> Published | None:
        """The number that someone claims for a cell."""
        return self.spec.published.get(self.spec.cells.index(result.cell))

    def units(self, result: CellResult) -> list[Unit]:
        """The units of one cell."""
        return shards(result.key, self.samples, self.spec.shard_size)

    def examples(self, result: CellResult, shard: int) -> Attacked:
        """Adversarial examples of a unit, checked, on the CPU; the shard read last is held.

        Raises:
            DataError: The file is missing or damaged.
        """
        place = (result.examples, shard)
        if place not in self._held:
            try:
                found, label = load_examples(self.directory, *place)
                expected = self.units(result)[shard]
                if (label.start, label.stop) != (expected.start, expected.stop):
                    raise DataError(
                        f"{examples_path(self.directory, *place)} holds samples {label.start} to "
                        f"{label.stop - 1}, not {expected.start} to {expected.stop - 1}"
                    )
            except DataError as error:
                raise self._damaged(error) from None
            self._held = {place: found}
        return self._held[place]

    def images(self, result: CellResult, places: Sequence[int]) -> Tensor:
        """Adversarial images of some samples, by their places in the run, in the order given.

        Returns:
            (len(places), C, H, W), float, in [0, 1]; for a cell without attack the clean images.

        Raises:
            RangeError: There is no such sample.
            DataError: As `examples`.
        """
        found: dict[int, Tensor] = {}
        for place in sorted(set(places)):
            if not 0 <= place < self.samples:
                raise RangeError(f"there is no sample {place}; expected 0 to {self.samples - 1}")
            shard, row = divmod(place, self.spec.shard_size)
            found[place] = self.examples(result, shard).x_adv[row]
        if not found:
            return torch.empty(0, *self.info["data"]["shape"])
        return torch.stack([found[place] for place in places])

    def clean_images(self, places: Sequence[int]) -> Tensor | None:
        """The samples themselves, from a cell without attack; None if the run has none."""
        clean = next((r for r in self.results if r.cell.attack == "none"), None)
        return None if clean is None else self.images(clean, places)

    def verify(self) -> int:
        """Read every file and check it against its checksum, and rows against their examples.

        Returns:
            How many files of rows and examples were checked.

        Raises:
            DataError: Naming the damaged file, and the command that repairs the run.
        """
        return len(self._content())

    def result_digest(self) -> str:
        """Digest of all rows, examples, findings and the result: equal for equal results.

        Times, hosts, sessions and notes are not in it.
        """
        return digest([self._content(), self._json("findings.json"), self._json("result.json")])

    def _content(self) -> list[list[Any]]:
        content: list[list[Any]] = []
        sums: dict[tuple[str, int], str] = {}
        try:
            for result in self.results:
                for unit in self.units(result):
                    place = (result.examples, unit.shard)
                    if place not in sums:
                        _, label = load_examples(self.directory, *place)
                        sums[place] = label.sha256
                        content.append(["examples", *place, label.sha256])
                    _, label = load_rows(self.directory, result.key, unit.shard)
                    if label.facts["examples"] != sums[place]:
                        raise DataError(
                            f"{rows_path(self.directory, result.key, unit.shard)} judges other "
                            "examples than those beside it"
                        )
                    content.append(["rows", result.key, unit.shard, label.sha256])
        except DataError as error:
            raise self._damaged(error) from None
        return content

    def _json(self, name: str) -> dict[str, Any] | None:
        try:
            return read_json(self.directory / name)
        except DataError as error:
            raise self._damaged(error) from None

    def _damaged(self, error: DataError) -> DataError:
        return DataError(f"{error}; to repair the run, {repair(self.directory, self.info)}")


def open_run(directory: str | Path, *, partial: bool = False) -> StoredRun:
    """Read a run back. Rows are read and checked now, examples when they are asked for.

    Args:
        directory: Of the run.
        partial: Also open a run that is not done: with the cells that are complete.

    Raises:
        DataError: There is no run, it is not done, or a file is missing or damaged; names the file
            and the command that repairs it.
    """
    directory = Path(directory)
    record = Record.read(directory)
    if record is None:
        raise DataError(f"{directory} holds no run (there is no run.json); name a run's folder")
    info = record.info
    spec = RunSpec(**info["spec"])
    object.__setattr__(spec, "_given", info["given"])
    stored = StoredRun(directory, spec, info, [], [], [])
    done = info["status"] == "done"
    if not done and not partial:
        units = [t for times in info["timing"]["units"].values() for t in times]
        have = sum(t is not None for t in units)
        raise DataError(
            f"{directory} is {info['status']}, with about {have} of {len(units)} units; "
            f"to finish it, {repair(directory, info)}"
        )
    for position, (cell, address) in enumerate(zip(spec.cells, info["cells"], strict=True)):
        result = CellResult(cell, address["key"], {}, address["examples"])
        try:
            found = [load_rows(directory, u.cell, u.shard) for u in stored.units(result)]
        except DataError as error:
            if partial:
                continue
            raise stored._damaged(error) from None
        parts = [rows for rows, _ in found]
        result.rows = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        result.forwards = sum(label.facts["forwards"] for _, label in found)
        result.backwards = sum(label.facts["backwards"] for _, label in found)
        result.seconds = sum(t or 0.0 for t in info["timing"]["units"][result.key])
        stored.results.append(result)
        stored.positions.append(position)
    findings = stored._json("findings.json") if done else None
    if done and findings is None:
        missing = DataError(f"{directory / 'findings.json'} is missing")
        raise stored._damaged(missing)
    stored.findings = [Finding(**f) for f in findings["findings"]] if findings else []
    return stored
