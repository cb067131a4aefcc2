"""A recipe: one published table or figure as plain data, in one YAML file."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from feint.core.errors import ConfigError, DataError, UnknownNameError

__all__ = ["PAPERS", "SCALES", "Claim", "Drawing", "Recipe", "Scale", "list_recipes", "load_recipe"]

PAPERS = {
    "ace": "Park et al., ACE: Artificial Checkerboard Enhancer to induce and evade adversarial "
    "attacks, 2018 (S0)",
    "qiu": "Qiu et al., Mitigating advanced adversarial attacks with more advanced gradient "
    "obfuscation techniques, 2020 (S1)",
    "pixel_deflection": "Prakash et al., Deflecting adversarial attacks with pixel deflection, "
    "CVPR 2018 (S2)",
    "s2snet": "Folz et al., Adversarial defense based on structure-to-signal autoencoders, 2018 "
    "(S3)",
    "prm": "Hwang et al., PRM: puzzle-like pixel redistribution, workshop and blog, 2019 (S4)",
}
"""The five papers by the names that their recipes begin with, in the order of DESIGN."""
SCALES = ("smoke", "cpu", "paper")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _labels(value: object) -> object:
    """Axes as mappings from text; a list of labels stands for labels without fields."""
    if isinstance(value, list):
        return {str(label): {} for label in value}
    if isinstance(value, Mapping):
        return {str(label): {} if found is None else found for label, found in value.items()}
    return value


Axis = Annotated[dict[str, dict[str, Any]], BeforeValidator(_labels)]
"""The labels along an axis of the table, and the fields that each sets."""


class Scale(_Frozen):
    """How much of the paper's setting is used: what is smaller, and what stands in for what."""

    about: str
    """What differs from the paper at this scale; printed with every result."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Fields of `feint.store.DataSpec`; `spec: "?"` must be given with `--data`."""
    models: dict[str, str] = Field(default_factory=dict)
    """Specs of the roles `@ROLE`; `"?"` must be given with `--model ROLE=SPEC`. A role is a model,
    or text that stands in braces, `{@ROLE}`, such as a defense's weights."""
    sets: dict[str, str] = Field(default_factory=dict)
    """Data specs of the roles `@ROLE` in a point's `data: {spec: "@ROLE"}`; `"?"` must be given
    with `--data ROLE=SPEC`."""
    axes: dict[str, Axis] = Field(default_factory=dict)
    """Fields that replace those of the recipe's axes."""
    base: dict[str, Any] = Field(default_factory=dict)
    """Fields that replace those of the recipe's `base`."""
    adaptive: dict[str, Any] = Field(default_factory=dict)
    """Fields that replace those of the recipe's `adaptive`."""
    checks: str = "quick"
    """Which checks the evaluations make of themselves (see `feint.store.RunSpec`); `"none"` for a
    smoke test."""


class Claim(_Frozen):
    """A sentence of the paper, or about it, that the numbers decide."""

    say: str
    by: Literal["paper", "us"] = "paper"
    """Who says so."""
    rises: str | None = None
    """The numbers grow along this axis."""
    falls: str | None = None
    """The numbers shrink along this axis."""
    above: dict[str, list[str]] | None = None
    """The numbers with these labels are larger than those with the labels of `below`."""
    below: dict[str, list[str]] | None = None
    margin: float = 0.0
    """By how much those of `above` are the larger ones; negative: by how much they may be the
    smaller ones."""
    least: float | None = None
    """The numbers are at least so large; a share, or in the metric's unit."""
    most: float | None = None
    """The numbers are at most so large."""
    where: dict[str, list[str]] = Field(default_factory=dict)
    """Which numbers: labels by axis; all by default."""
    of: Literal["ours", "adaptive"] = "ours"

    @model_validator(mode="after")
    def _one(self) -> Claim:
        kinds = ("rises", "falls", "above", "least", "most")
        named = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(named) != 1 or (self.above is None) != (self.below is None):
            raise ValueError(
                f"a claim is one of {', '.join(kinds)} (above with below); got {named}"
            )
        return self


class Drawing(_Frozen):
    """Which figure is drawn of the result: a name of `feint.reports.reproduction.DRAWINGS`."""

    kind: str
    options: dict[str, Any] = Field(default_factory=dict)


class Recipe(_Frozen):
    """One published table or figure.

    Every combination of one label from each axis is a point of the table, described by fields:
    those of `base`, then those of the labels, axis by axis. Text in fields may name labels and
    other fields in braces: `"cifar10-{network}-ace{λ}"`, and roles: `"{@S2SNet}"`. A point with the
    field `optional` is left out, and said so, where a role that it needs is not given. The field
    `metric` says what is measured (`feint.recipes.metrics`); which further fields count depends on
    it, and the others are there to be named in braces.
    """

    name: str
    """`PAPER/TABLE`."""
    title: str
    place: str
    """Where it is in the paper."""
    about: str = ""
    """What a reader must know: how the paper or its code differ from what one would think."""
    axes: dict[str, Axis]
    """The last one runs along the columns."""
    base: dict[str, Any] = Field(default_factory=dict)
    adaptive: dict[str, Any] | None = None
    """Fields of the attacker who knows the defense, in place of a point's own; None if there is no
    such attacker. `attacks` names them; without it the whole search of the scenario `adaptive`."""
    targets: dict[str, Any] | list[Any] | None = None
    """Published numbers: nested by the labels of each axis, along the last axis as a list; null for
    what the paper does not give. None if the numbers are lost."""
    unit: Literal["percent", "share", "number"] = "percent"
    """Of `targets`."""
    images: int | None = None
    """How many images the published numbers are of; their sampling error follows from it."""
    published_interval: float = 0.0
    """Further half width around the published numbers, in their unit: how finely they are given, or
    read off a figure."""
    needs: dict[str, str] = Field(default_factory=dict)
    """What `?` in a scale stands for, in words."""
    claims: tuple[Claim, ...] = ()
    drawing: Drawing | None = None
    scales: dict[Literal["smoke", "cpu", "paper"], Scale]

    @property
    def paper(self) -> str:
        """The part of the name before the slash."""
        return self.name.partition("/")[0]

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        missing = [scale for scale in SCALES if scale not in self.scales]
        if missing:
            raise ValueError(f"there is no scale {missing[0]!r}; a recipe has smoke, cpu and paper")
        if self.paper not in PAPERS:
            raise ValueError(
                f"name is {self.name!r}; expected one of {', '.join(PAPERS)} first: the file's "
                "folder and name, or `name: PAPER/TABLE` inside of it"
            )
        for place, axes in [("", self.axes)] + [(s, c.axes) for s, c in self.scales.items()]:
            for name, labels in axes.items():
                if name not in self.axes:
                    raise ValueError(str(UnknownNameError("axis", name, self.axes)))
                for label in labels:
                    if label not in self.axes[name]:
                        raise ValueError(
                            f"scale {place}: "
                            + str(UnknownNameError(f"label of {name}", label, self.axes[name]))
                        )
        for claim in self.claims:
            for axis in (claim.rises, claim.falls):
                if axis is not None and axis not in self.axes:
                    raise ValueError(str(UnknownNameError("axis of a claim", axis, self.axes)))
            for chosen in (claim.where, claim.above or {}, claim.below or {}):
                for axis, wanted in chosen.items():
                    if axis not in self.axes:
                        raise ValueError(str(UnknownNameError("axis of a claim", axis, self.axes)))
                    for label in wanted:
                        if label not in self.axes[axis]:
                            found = UnknownNameError(f"label of {axis}", label, self.axes[axis])
                            raise ValueError(str(found))
        if self.targets is not None:
            _check_targets(self.targets, [list(labels) for labels in self.axes.values()], "targets")
        return self


def _check_targets(found: object, axes: list[list[str]], where: str) -> None:
    if found is None:
        return
    labels = axes[0]
    if isinstance(found, list):
        if len(axes) > 1 or len(found) != len(labels):
            raise ValueError(
                f"{where} is a list of {len(found)}; expected {len(labels)} along the last axis, "
                "and a mapping by labels along the others"
            )
        values = dict(zip(labels, found, strict=True))
    elif isinstance(found, Mapping):
        values = {str(label): value for label, value in found.items()}
        for label in values:
            if label not in labels:
                near = difflib.get_close_matches(label, labels, n=1)
                raise ValueError(f"{where} names {label!r}; known: {', '.join(near or labels)}")
    else:
        raise ValueError(f"{where} is {found!r}; expected a mapping by labels, or a list")
    for label, value in values.items():
        if len(axes) > 1:
            _check_targets(value, axes[1:], f"{where}.{label}")
        elif value is not None and not isinstance(value, int | float):
            raise ValueError(f"{where}.{label} is {value!r}; expected a number or null")


@lru_cache(maxsize=1)
def _shelf() -> dict[str, str]:
    """The text of every recipe in the package by its name, in the order of the papers."""
    found = {}
    root = resources.files("feint.recipes") / "papers"
    for paper in PAPERS:
        for file in sorted((root / paper).iterdir(), key=lambda f: _order(f.name)):
            if file.name.endswith(".yaml"):
                found[f"{paper}/{Path(file.name).stem}"] = file.read_text("utf-8")
    return found


def _order(name: str) -> tuple[str, int, str]:
    """Tables before figures, each by number."""
    stem = Path(name).stem
    digits = "".join(c for c in stem if c.isdigit())
    return ("0" if stem.startswith("table") else "1", int(digits or 0), stem)


def list_recipes() -> list[str]:
    """Names of the recipes in the package, paper by paper, tables first."""
    return list(_shelf())


def load_recipe(name: str) -> Recipe:
    """A recipe by name, or from a YAML file `PAPER/TABLE.yaml`.

    Raises:
        UnknownNameError: No such recipe in the package.
        DataError: The file cannot be read.
        ConfigError: The file does not describe a recipe.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"cannot read recipe {name}: {error.strerror}") from None
        stem = f"{path.parent.name}/{path.stem}"
    elif name in _shelf():
        text, stem = _shelf()[name], name
    else:
        raise UnknownNameError("recipe", name, list_recipes())
    try:
        return Recipe.model_validate({"name": stem, **yaml.safe_load(text)})
    except (yaml.YAMLError, ValidationError, TypeError) as error:
        raise ConfigError(f"recipe {name}: {_brief(error)}") from None


def _brief(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        )
    return str(error)
