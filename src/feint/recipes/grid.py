"""The points of a recipe's table at a scale: labels, fields, published numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from feint.core.errors import ConfigError, UnknownNameError
from feint.models import bundled
from feint.recipes.schema import Recipe, Scale
from feint.training.recipe import content_digest, list_recipes, load_recipe

__all__ = ["Point", "adaptive_fields", "points", "resolve_model"]

_MODELS = ("model", "source")


@dataclass(frozen=True)
class Point:
    """One number of a table."""

    labels: tuple[str, ...]
    """One of each axis."""
    fields: dict[str, Any] = field(hash=False)
    published: float | None = None
    """In the metric's unit: of shares in [0, 1]."""
    lacks: str = ""
    """What must be given before the point can be measured; empty if nothing is missing."""


class _Missing(ConfigError):
    """A role that must be given, and was not."""


class _Known(dict[str, Any]):
    """Labels and fields by name, and roles as `@ROLE`."""

    def __init__(self, known: Mapping[str, Any], role: Callable[[str], str]) -> None:
        super().__init__(known)
        self.role = role

    def __missing__(self, key: str) -> str:
        if not key.startswith("@"):
            raise KeyError(key)
        return self.role(key[1:])


def points(
    recipe: Recipe,
    scale: Scale,
    given: Mapping[str, str],
    sets: Mapping[str, str] | None = None,
) -> list[Point]:
    """Every point, along the last axis first.

    Args:
        recipe: The recipe.
        scale: One of its scales.
        given: Model specs by role, which win over the scale's.
        sets: Data specs by role, which win over the scale's.

    Raises:
        ConfigError: A field in braces that is not there; a role that must be given, and was not.
    """
    for role in given:
        if role not in scale.models:
            raise UnknownNameError(f"model role of {recipe.name}", role, scale.models)
    for role in sets or {}:
        if role not in scale.sets:
            raise UnknownNameError(f"data role of {recipe.name}", role, scale.sets)
    axes = {
        name: {
            label: {**own, **scale.axes.get(name, {}).get(label, {})}
            for label, own in found.items()
        }
        for name, found in recipe.axes.items()
    }
    found = []
    for labels in itertools.product(*axes.values()):
        fields: dict[str, Any] = {**recipe.base, **scale.base}
        for name, label in zip(axes, labels, strict=True):
            fields.update(axes[name][label])
        published, named, lacks = (
            _published(recipe, labels),
            dict(zip(axes, labels, strict=True)),
            "",
        )
        try:
            fields = _resolved(fields, named, recipe, scale, given, sets or {})
        except _Missing as error:
            if not fields.get("optional"):
                raise
            lacks = str(error)
        found.append(Point(labels, fields, published, lacks))
    return found


def _resolved(
    fields: dict[str, Any],
    labels: Mapping[str, str],
    recipe: Recipe,
    scale: Scale,
    given: Mapping[str, str],
    sets: Mapping[str, str],
) -> dict[str, Any]:
    """Fields with braces filled, and models and data by their specs."""

    def role(name: str) -> str:
        return _role(name, recipe, scale.models, given, "model")

    fields = _filled(fields, labels, recipe.name, role)
    for key in _MODELS:
        if key in fields:
            fields[key] = resolve_model(str(fields[key]), recipe, scale, given)
    own = fields.get("data")
    if own and str(own.get("spec", "")).startswith("@"):
        spec = _role(str(own["spec"])[1:], recipe, scale.sets, sets, "data")
        fields["data"] = {**own, "spec": spec}
    return fields


def _role(
    name: str, recipe: Recipe, known: Mapping[str, str], given: Mapping[str, str], kind: str
) -> str:
    """What stands for a role: what the user gave, or the scale's.

    Raises:
        ConfigError: It must be given.
        UnknownNameError: No such role.
    """
    if name not in known:
        raise UnknownNameError(f"{kind} role of {recipe.name}", name, known)
    text = given.get(name, known[name])
    if text == "?":
        usual = "a classifier, images in [0, 1] in, logits out"
        what = recipe.needs.get(name, usual if kind == "model" else "images with labels")
        raise _Missing(f"{recipe.name} needs {name} ({what}); give it with --{kind} '{name}=SPEC'")
    return text


def adaptive_fields(recipe: Recipe, scale: Scale, point: Point) -> dict[str, Any] | None:
    """The fields of the attacker who knows the defense; None if the recipe has none for the point.

    A point may opt out, or set fields of its own, with the field `adaptive`.
    """
    own = point.fields.get("adaptive", {})
    if recipe.adaptive is None or own is None or own is False:
        return None
    changes = {**recipe.adaptive, **scale.adaptive, **own}
    return {**point.fields, **changes}


def resolve_model(text: str, recipe: Recipe, scale: Scale, given: Mapping[str, str]) -> str:
    """A model spec: of a role, of a bundled model, or of what a training recipe makes.

    `@ROLE` is what the user gave for the role, or the scale's. A name alone, `cifar10-toy`, is a
    bundled model if there is one, and otherwise that of the training recipe of this name.

    Raises:
        ConfigError: A role that must be given.
        UnknownNameError: No such role, or name.
    """
    front, bar, last = text.rpartition("|")
    if bar:  # a defense as part of the model
        return f"{front.strip()} | {resolve_model(last.strip(), recipe, scale, given)}"
    if text.startswith("@"):
        text = _role(text[1:], recipe, scale.models, given, "model")
    if any(mark in text for mark in (":", "/", "|")) or text.endswith(".safetensors"):
        return text
    plain = text.removesuffix("-ace0")  # λ = 0 is the classifier without ACE
    for name in (text, plain):
        if name in bundled():
            return f"bundled:{name}"
    if text in list_recipes():
        return f"trained:{text}@{content_digest(load_recipe(text))}"
    raise UnknownNameError("model", text, [*bundled(), *list_recipes()])


def _filled(
    fields: dict[str, Any], labels: Mapping[str, str], name: str, role: Callable[[str], str]
) -> dict[str, Any]:
    """Fields with what stands in braces in their texts, again as long as these name others.

    Raises:
        ConfigError: Something in braces that is not there; fields that name each other in a circle.
    """
    unfilled: list[str] = []

    def fill(value: object, known: Mapping[str, Any]) -> Any:
        if isinstance(value, str) and "{" in value:
            unfilled.append(value)
            try:
                return value.format_map(_Known(known, role))
            except (_Missing, UnknownNameError):
                raise
            except (KeyError, ValueError, IndexError) as error:
                raise ConfigError(
                    f"recipe {name}: {value!r} cannot be filled ({error}); known: "
                    f"{', '.join(map(str, known))}"
                ) from None
        if isinstance(value, Mapping):
            return {key: fill(inner, known) for key, inner in value.items()}
        if isinstance(value, list):
            return [fill(inner, known) for inner in value]
        return value

    for _ in range(len(fields) + 1):  # as long as a chain can be
        unfilled.clear()
        known = {**labels, **fields}
        fields = {key: fill(value, known) for key, value in fields.items()}
        if not unfilled:
            return fields
    raise ConfigError(f"recipe {name}: fields name each other in a circle: {unfilled}")


def _published(recipe: Recipe, labels: tuple[str, ...]) -> float | None:
    found: Any = recipe.targets
    for label, axis in zip(labels, recipe.axes.values(), strict=True):
        if isinstance(found, list):
            found = dict(zip(axis, found, strict=True)).get(label)
        elif isinstance(found, Mapping):
            found = {str(k): v for k, v in found.items()}.get(label)
    if found is None:
        return None
    return float(found) / 100 if recipe.unit == "percent" else float(found)
