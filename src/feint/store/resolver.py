"""From specs to objects: samples, models, defenses, and the addresses of a run's cells."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from feint import data, defenses, models
from feint.core.checks import check_eps
from feint.core.errors import ConfigError, DataError, FeintError
from feint.core.registry import ATTACKS, DEFENSES
from feint.data import Dataset
from feint.defenses import Chain, Defense
from feint.evaluation import Batch, Cell, Finding, Subject, health
from feint.evaluation.attackers import parse_attack
from feint.store.spec import RunSpec, takes_arch

__all__ = ["DatasetSamples", "Planned", "Resolver", "Unit", "shards"]

PROBE = 4
"""Images that every model is tried on before any work."""


class Unit(NamedTuple):
    """The unit of work, as plain data: one cell's shard of samples."""

    cell: str
    """The cell's address."""
    shard: int
    start: int
    stop: int


def shards(key: str, samples: int, size: int) -> list[Unit]:
    """The units of one cell."""
    starts = range(0, samples, size)
    return [Unit(key, n, start, min(start + size, samples)) for n, start in enumerate(starts)]


@dataclass(frozen=True, eq=False)
class DatasetSamples:
    """A `feint.data.Dataset` as the evaluation reads it: by range, on a device."""

    dataset: Dataset
    device: torch.device | str = "cpu"

    @property
    def fingerprint(self) -> str:
        """Content address of the samples."""
        return self.dataset.fingerprint

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, start: int, stop: int) -> Batch:
        """Samples `start … stop−1`, decoded now."""
        part = self.dataset.subset(range(start, stop))
        x, y, target, index = next(part.batches(stop - start))
        goal = None if target is None else target.to(self.device)
        return Batch(x.to(self.device), y.to(self.device), index.to(self.device), goal)


@dataclass(frozen=True)
class Planned:
    """A cell with its addresses and with what they were made of."""

    cell: Cell
    key: str
    examples: str
    context: dict[str, str]


@dataclass
class Resolver:
    """Loads what a run's specs name, each thing once; called with a cell, gives its `Subject`.

    Every model is tried on a few images when it is loaded: a wrong shape, NaN logits, training
    mode, or labels that it has no class for are errors before any work.

    Attributes:
        findings: What was found while loading, such as undeclared randomness.
        loaded: By model spec: notes, facts and card, as plain data.
    """

    spec: RunSpec
    findings: list[Finding] = field(default_factory=list)
    loaded: dict[str, dict[str, Any]] = field(default_factory=dict)
    _samples: DatasetSamples | None = None
    _models: dict[str, nn.Module] = field(default_factory=dict)
    _defenses: dict[str, Defense] = field(default_factory=dict)
    _subjects: dict[tuple[str, str, str], Subject] = field(default_factory=dict)

    @property
    def samples(self) -> DatasetSamples:
        """The run's samples."""
        if self._samples is None:
            wanted = self.spec.data.model_dump()
            self._samples = DatasetSamples(data.load(wanted.pop("spec"), **wanted), self._device())
        return self._samples

    def __call__(self, cell: Cell) -> Subject:
        """The objects that a cell names."""
        names = (cell.model, cell.defense, cell.source)
        if names not in self._subjects:
            defense = None if cell.defense == "none" else self._defense(cell.defense)
            self._subjects[names] = Subject(
                self._model(cell.model),
                defense,
                self._model(cell.source) if cell.source else None,
                versions="" if defense is None else _versions(defense),
                code={"model": _code(cell.model), "source": _code(cell.source)},
            )
        return self._subjects[names]

    def plan(self) -> list[Planned]:
        """Every cell with its addresses; refuses whatever does not fit before any work.

        Cost: one pass over the samples for their fingerprint, six forward passes of `PROBE`
        images for each model.
        """
        planned = []
        dataset = self.samples.dataset
        targets = dataset.targets
        shape = (1, *dataset.shape)
        for cell in self.spec.cells:
            check_eps(cell.eps, cell.norm, shape)
            if cell.targeted and targets is None:
                raise ConfigError(
                    f"a targeted threat needs a target for every sample; {self.spec.data.spec!r} "
                    "has none; give a list with the columns file,label,target"
                )
            if cell.targeted and targets is not None and bool((targets == dataset.labels).any()):
                place = int((targets == dataset.labels).nonzero()[0])
                raise DataError(
                    f"{dataset.where(place)} has its own label as target; expected another class "
                    "for every sample"
                )
            planned.append(self.address(cell, self.samples.fingerprint))
            if cell.attack != "none":
                self._try_settings(cell)
        return planned

    def address(self, cell: Cell, fingerprint: str) -> Planned:
        """One cell's addresses for samples of a fingerprint; refuses an attack that does not fit.

        Raises:
            ConfigError, RangeError, UnknownNameError: The cell cannot mean anything.
        """
        subject = self(cell)
        subject.pipeline(cell)
        if cell.attack != "none":
            subject.attacker(cell).settings()
        context = subject.context(cell, fingerprint)
        return Planned(cell, cell.key(context), cell.attack_key(context), context)

    def _try_settings(self, cell: Cell) -> None:
        """Run the cell's attack on no image at all: a bad value is an error now."""
        attacker, batch = self(cell).attacker(cell), self.samples.read(0, 1)
        none = torch.empty(0, dtype=torch.int64, device=batch.x.device)
        settings = {**attacker.settings(), "seed": none}
        try:
            attacker.attack.info.component(attacker.view, batch.x[:0], none, **settings)
        except FeintError:
            raise
        except (TypeError, ValueError) as error:
            raise ConfigError(f"attack {cell.attack!r} cannot take its settings: {error}") from None

    def components(self) -> dict[str, dict[str, int]]:
        """Registered versions of the attacks and defenses that the run names."""
        attacks = {parse_attack(c.attack).info.name for c in self.spec.cells if c.attack != "none"}
        parts = {part.name for defense in self._defenses.values() for part in _members(defense)}
        return {
            "attacks": {name: ATTACKS[name].version for name in sorted(attacks)},
            "defenses": {n: DEFENSES[n].version for n in sorted(parts) if n in DEFENSES},
        }

    def _device(self) -> torch.device:
        return torch.device(self.spec.device)

    def _defense(self, text: str) -> Defense:
        if text not in self._defenses:
            self._defenses[text] = defenses.parse(text).to(self._device()).eval()
        return self._defenses[text]

    def _model(self, text: str) -> nn.Module:
        if text in self._models:
            return self._models[text]
        found = models.resolve(
            text,
            arch=self.spec.arch if takes_arch(text) else None,
            trust=self.spec.trust,
            device=self.spec.device,
            input_size=self.spec.input_size,
            download=self.spec.download,
            channels_last=self.spec.channels_last,
            compile=self.spec.compile,
        )
        probe = self.samples.read(0, min(PROBE, len(self.samples)))
        logits = models.check_model(found.model, probe.x)
        self.samples.dataset.check_classes(logits.shape[1])
        model, findings = health.declare(found.model, probe.x)
        self.findings += findings
        self.loaded[text] = {
            "notes": list(found.notes),
            "facts": found.facts,
            "card": dict(found.card),
        }
        self._models[text] = model.eval()
        return self._models[text]


def _members(defense: Defense) -> tuple[Defense, ...]:
    return defense.members if isinstance(defense, Chain) else (defense,)


def _versions(defense: Defense) -> str:
    """Registered versions of a defense's parts, in order."""
    names = [part.name for part in _members(defense)]
    return "".join(f" {n}:{DEFENSES[n].version}" for n in names if n in DEFENSES)


def _code(model: str) -> str:
    """Digest of the file that a `path/file.py:function` spec names; what it imports is not seen."""
    own = model.rpartition("|")[2].strip().removeprefix("bf16:")
    path, colon, _ = own.rpartition(":")
    if not colon or not path.endswith(".py"):
        return ""
    try:
        return " " + hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


Resolve = Callable[[Cell], Subject]
