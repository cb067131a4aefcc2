"""`run.json`: what a run is, with what it was computed, and how far it has come."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from feint.core.errors import ConfigError, DataError
from feint.evaluation import Finding
from feint.store.files import read_json, write_json
from feint.store.resolver import Planned, Resolver, shards
from feint.store.spec import SCHEMA, RunSpec, first_difference

__all__ = ["Record", "Status", "repair"]

Status = Literal["started", "running", "interrupted", "error", "done"]
NAME = "run.json"
_PARTS = {
    "data": "the samples",
    "model": "the model",
    "defense": "the defense",
    "source": "the source model",
    "attack": "the attack's version",
}


def repair(directory: Path, info: Mapping[str, Any]) -> str:
    """How to complete or repair a run: the command that was typed for it, again."""
    commands = [s["command"] for s in info["sessions"] if s["command"]]
    if commands:
        return f"resume it with the same command: {shlex.join(commands[-1])}"
    return f"resume it with feint.store.resume({str(directory)!r})"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass
class Record:
    """`run.json` in memory; written after changes, at most every `every` seconds while computing.

    Nothing of it decides a number: it says what the numbers are of.
    """

    directory: Path
    info: dict[str, Any]
    every: float = 2.0
    _saved: float = field(default=0.0, repr=False)

    @staticmethod
    def read(directory: Path) -> Record | None:
        """The record of a directory; None if it has none.

        Raises:
            DataError: It is damaged, or of another version; says what to do.
        """
        path = directory / NAME
        try:
            info = read_json(path)
        except DataError as error:
            raise DataError(
                f"{error}; delete it and run the same command again: units that are whole are kept"
            ) from None
        if info is None:
            return None
        if info["schema"] != SCHEMA:
            raise DataError(
                f"{path} has format {info['schema']}, this version of feint reads {SCHEMA}; "
                f"use feint {info.get('feint', 'of the time')}, or give another folder"
            )
        return Record(directory, info)

    @staticmethod
    def start(
        directory: Path, spec: RunSpec, plan: Sequence[Planned], resolver: Resolver
    ) -> Record:
        """A new record, written at once."""
        dataset = resolver.samples.dataset
        keys = {p.key: shards(p.key, len(dataset), spec.shard_size) for p in plan}
        record = Record(
            directory,
            {
                "schema": SCHEMA,
                "status": "started",
                "message": "",
                "created": _now(),
                "updated": _now(),
                "given": spec.given,
                "spec": spec.full,
                "seeds": sorted({cell.seed for cell in spec.cells}),
                "data": {
                    "text": str(dataset),
                    "fingerprint": dataset.fingerprint,
                    "samples": len(dataset),
                    "available": dataset.available,
                    "shape": list(dataset.shape),
                    "classes": None if dataset.classes is None else list(dataset.classes),
                },
                "models": resolver.loaded,
                "components": resolver.components(),
                "cells": [{"key": p.key, "examples": p.examples, **p.context} for p in plan],
                "sessions": [],
                "environments": [],
                "notes": [],
                "timing": {"units": {k: [None] * len(u) for k, u in keys.items()}, "total": 0.0},
            },
        )
        record.save()
        return record

    def check_spec(self, spec: RunSpec) -> None:
        """Refuse to go on with another spec.

        Raises:
            ConfigError: Naming the first difference.
        """
        found = first_difference(RunSpec(**self.info["spec"]).content, spec.content)
        if found:
            raise ConfigError(f"{self.directory} holds another run ({found}); give another folder")

    def check_plan(self, plan: Sequence[Planned]) -> None:
        """Refuse to go on if what the specs name is not what it was.

        Raises:
            ConfigError: Naming the cell and the part.
        """
        for position, (old, new) in enumerate(zip(self.info["cells"], plan, strict=True)):
            fresh = {"key": new.key, "examples": new.examples, **new.context}
            if old != fresh:
                changed = next((name for name in _PARTS if old[name] != fresh[name]), "key")
                what = _PARTS.get(changed, "the meaning")
                raise ConfigError(
                    f"{what} of cell {position} ({new.cell.model}, {new.cell.defense}, "
                    f"{new.cell.attack}) is not what {self.directory} was begun with "
                    f"({old[changed] or 'none'} then, {fresh[changed] or 'none'} now); "
                    "give another folder"
                )

    @property
    def finished(self) -> set[tuple[str, int]]:
        """Units that were on disk when the record was last written, as (cell, shard)."""
        units = self.info["timing"]["units"]
        return {(k, n) for k, times in units.items() for n, t in enumerate(times) if t is not None}

    def begin(self, spec: RunSpec, environment: dict[str, Any], command: Sequence[str]) -> None:
        """A process goes to work."""
        self.info["spec"], self.info["given"] = spec.full, spec.given
        self.info["status"], self.info["message"] = "running", ""
        session = {
            "begun": _now(),
            "ended": None,
            "status": "running",
            "command": list(command),
            "environment": environment,
            **{k: getattr(spec, k) for k in ("batch_size", "device", "threads", "workers")},
        }
        self.info["sessions"].append(session)
        self.save()

    def computing(self) -> None:
        """The current session is about to compute a unit: its environment has a part in the run."""
        now = self.info["sessions"][-1]["environment"]
        if now not in self.info["environments"]:
            self.info["environments"].append(now)
            self.save()

    def timed(self, key: str, shard: int, seconds: float) -> None:
        """A unit is on disk."""
        self.info["timing"]["units"][key][shard] = round(seconds, 4)
        if time.monotonic() - self._saved > self.every:
            self.save()

    def note(self, sentence: str) -> None:
        """Keep what had to be repaired."""
        self.info["notes"].append({"at": _now(), "text": sentence})
        self.save()

    def end(self, status: Status, message: str = "", seconds: float = 0.0) -> None:
        """The session is over."""
        self.info["status"], self.info["message"] = status, message
        self.info["timing"]["total"] = round(self.info["timing"]["total"] + seconds, 4)
        self.info["sessions"][-1] |= {"ended": _now(), "status": status}
        self.save()

    def save(self) -> None:
        """Write it."""
        self.info["updated"] = _now()
        write_json(self.directory / NAME, self.info)
        self._saved = time.monotonic()

    def one_environment(self) -> Finding:
        """Whether all units were computed with the same packages on the same kind of machine."""
        environments = self.info["environments"]
        if len(environments) <= 1:
            text, status = "every unit was computed with the same packages on one machine", "pass"
        else:
            changed = {first_difference(environments[0], other) or "" for other in environments[1:]}
            status = "warn"
            text = (
                f"units were computed in {len(environments)} environments ("
                f"{'; '.join(sorted(changed))}): they may differ by more than a seed would tell"
            )
        return Finding("one-environment", status, "run", text)  # type: ignore[arg-type]
