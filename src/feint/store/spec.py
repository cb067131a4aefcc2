"""What a run is to compute: plain data, checked when it is made."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import to_jsonable_python

from feint.core.errors import ConfigError, UnknownNameError
from feint.data import DEFAULT
from feint.evaluation import Cell
from feint.evaluation.asked import chosen
from feint.models.checkpoint import PICKLES
from feint.training.recipe import parse_fraction

__all__ = ["SCHEMA", "DataSpec", "Published", "RunSpec", "first_difference", "takes_arch"]

SCHEMA = 1
"""Version of the run directory's files. Raise with any change that an older reader misreads."""

Count = Annotated[int, Field(ge=1)]


def takes_arch(model: str) -> bool:
    """Whether a model spec names weights in a file, which need an architecture."""
    return Path(model).suffix.lower() in (".safetensors", *PICKLES)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataSpec(_Frozen):
    """Which samples: the arguments of `feint.data.load`."""

    spec: str = DEFAULT
    samples: Count | None = None
    """How many to take, by the data set's keyed rank; all of them by default."""
    split: Literal["test", "train"] = "test"
    resize: Count | None = None
    """Side in pixels to which every image is brought before 8-bit values are fixed."""
    mode: Literal["bilinear", "nearest"] = "bilinear"
    fit: Literal["stretch", "crop"] = "stretch"
    root: str | None = None
    download: bool = False
    targets: Literal["random"] | None = None
    """Target classes for targeted threats, drawn by keys; the data set's own by default."""


class Published(_Frozen):
    """A number that someone claims for a cell, to stand beside the measured one."""

    label: str
    """What the number is, as the source calls it."""
    value: Annotated[float, Field(ge=0, le=1)]
    """A share in [0, 1]: divide a percentage by 100."""
    source: str = ""
    """Authors, year, table."""


def _cell(value: object) -> object:
    if isinstance(value, Mapping):
        known = [f.name for f in fields(Cell)]
        for key in value:
            if key not in known:
                raise ValueError(str(UnknownNameError("field of a cell", str(key), known)))
        return {key: parse_fraction(v) if key == "eps" else v for key, v in value.items()}
    return value


class RunSpec(_Frozen):
    """A run: cells on samples, and how to go about it.

    `data`, `cells`, `shard_size`, `input_size` and `arch` say what the numbers are. The others
    (batch size, device, layout, threads, workers, checks) do not: a run may be resumed with other
    ones, and the numbers differ by rounding at most.

    Args:
        cells: What to compute; `feint.evaluation.Cell`s or mappings of their fields.
        data: The samples.
        title: What a report calls it.
        shard_size: Samples per unit of work, which is what a killed run loses.
        input_size: Side in pixels to which the models resize their input.
        arch: Architecture of weights in a file.
        trust: Open pickles and TorchScript, which can run code.
        download: Fetch weights that are not in a cache.
        batch_size: Images per forward pass.
        device: `"cpu"` or `"cuda"`.
        channels_last: Models keep their weights with channels innermost; see `feint.models.load`.
        compile: Models run through `torch.compile`.
        threads: Threads of torch; by default as they are.
        workers: Local processes, of one thread each, that share the units; 0 for none.
        published: Claims by the position of their cell.
        checks: `"quick"`, `"all"`, or names of costly checks that are made, too.

    Raises:
        ConfigError: Naming every field that is wrong.

    Example:
        >>> spec = RunSpec(cells=[{"scenario": "none", "model": "bundled:cifar10-resnet20"}])
        >>> spec.data.spec, spec.shard_size, spec.given["cells"][0]["scenario"]
        ('bundled:cifar10', 100, 'none')
    """

    schema_version: Literal[1] = 1
    title: str = ""
    data: DataSpec = DataSpec()
    cells: tuple[Annotated[Cell, BeforeValidator(_cell)], ...]
    shard_size: Count = 100
    input_size: Count | None = None
    arch: str | None = None
    trust: bool = False
    download: bool = False
    batch_size: Count = 128
    device: str = "cpu"
    channels_last: bool = False
    compile: bool = False
    threads: Count | None = None
    workers: Annotated[int, Field(ge=0)] = 0
    published: dict[int, Published] = Field(default_factory=dict)
    checks: str = "quick"
    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    def __init__(self, **given: Any) -> None:
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise ConfigError(f"this is no run: {_brief(error)}") from None
        object.__setattr__(self, "_given", to_jsonable_python(copy.copy(given)))

    @field_validator("checks")
    @classmethod
    def _known(cls, checks: str) -> str:
        try:
            chosen(checks)
        except UnknownNameError as error:
            raise ValueError(str(error)) from None
        return checks

    @field_validator("cells")
    @classmethod
    def _once(cls, cells: tuple[Cell, ...]) -> tuple[Cell, ...]:
        if not cells:
            raise ValueError("there are none; expected at least one")
        for position, cell in enumerate(cells):
            if (first := cells.index(cell)) < position:
                raise ValueError(f"cell {position} is cell {first} again; leave one out")
        return cells

    @model_validator(mode="after")
    def _fits(self) -> RunSpec:
        for position in self.published:
            if not 0 <= position < len(self.cells):
                raise ValueError(
                    f"published names cell {position}; there are 0 to {len(self.cells) - 1}"
                )
        names = {name for c in self.cells for name in (c.model, c.source) if name}
        if self.arch is not None and not any(map(takes_arch, names)):
            raise ValueError(
                f"arch is {self.arch!r}, but no model is weights in a file ({', '.join(names)}); "
                "leave arch out"
            )
        return self

    @property
    def given(self) -> dict[str, Any]:
        """Exactly what was given, without defaults, as plain data."""
        return self._given

    @property
    def full(self) -> dict[str, Any]:
        """Everything, defaults included, as plain data."""
        return self.model_dump(mode="json")

    @property
    def content(self) -> dict[str, Any]:
        """What decides the numbers."""
        full = self.full
        named = {k: full[k] for k in ("cells", "shard_size", "input_size", "arch")}
        data = {k: v for k, v in full["data"].items() if k not in ("root", "download")}
        if data["targets"] is None:
            del data["targets"]  # runs of a time when there was no such choice stay the same
        return {"data": data, **named}


def first_difference(old: object, new: object, path: str = "") -> str | None:
    """Where two plain values first differ, in words; None if they do not."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*old, *new)):
            inner = f"{path}.{key}" if path else str(key)
            found = first_difference(old.get(key), new.get(key), inner)
            if found:
                return found
        return None
    if isinstance(old, list) and isinstance(new, list):
        for i, (a, b) in enumerate(zip(old, new, strict=False)):
            found = first_difference(a, b, f"{path}.{i}")
            if found:
                return found
        return None if len(old) == len(new) else f"{path}: {len(old)} there, {len(new)} given"
    return None if old == new else f"{path}: {old!r} there, {new!r} given"


def _brief(error: ValidationError) -> str:
    found = []
    for line in error.errors(include_url=False):
        where = ".".join(map(str, line["loc"]))
        text = line["msg"].removeprefix("Value error, ")
        got = "" if line["type"] in ("value_error", "missing") else f" (got {line['input']!r:.80})"
        found.append(f"{where}: {text}{got}" if where else f"{text}{got}")
    return "; ".join(found)
