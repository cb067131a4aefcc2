"""Training recipes: typed, frozen, one YAML file each in `feint/training/recipes/`."""

from __future__ import annotations

import math
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from feint.core.errors import ConfigError, DataError, UnknownNameError
from feint.models.architectures import ARCHITECTURES
from feint.models.build import Initialisation

__all__ = ["Adversary", "TrainingRecipe", "list_recipes", "load_recipe"]

Positive = Annotated[float, Field(gt=0)]


class _Frozen(BaseModel):
    # Without this, λ = inf would be written as null, which means no ACE at all.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Adversary(_Frozen):
    """The inner attack of adversarial training (Madry et al. 2018): linf PGD, random start."""

    eps: Annotated[float, Field(gt=0, le=1)]
    """Budget in [0, 1] units."""
    steps: Annotated[int, Field(ge=1)]
    """Steps per batch."""
    step_size: Annotated[float, Field(gt=0, le=1)]
    """Length of a step in [0, 1] units."""
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the loss on adversarial images; the rest is on clean ones (S0's code: 0.5)."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the training over which eps grows linearly from 0."""

    @field_validator("eps", "step_size", mode="before")
    @classmethod
    def _fraction(cls, value: object) -> object:
        return parse_fraction(value)


class TrainingRecipe(_Frozen):
    """Everything that decides the weights that come out."""

    name: str
    architecture: str
    """A name of `feint.models.ARCHITECTURES`."""
    ace: float | None = None
    """λ of an ACE module in front of the network, behind the normalisation; none by default."""
    data: Literal["cifar10", "cifar100"] = "cifar10"
    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)] = 128
    peak_lr: Positive
    """Largest learning rate of the one-cycle schedule."""
    rise: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the training over which the learning rate rises."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    average: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay per step of an exponential moving average of the weights; 0 for none."""
    precision: Literal["float32", "bf16"] = "bf16"
    initialisation: Initialisation = "he"
    """How fresh weights are drawn; see `feint.models.initialise`."""
    start: str | None = None
    """Model spec of the weights to start from; by default a fresh initialisation."""
    adversary: Adversary | None = None
    seed: int = 0

    @field_validator("architecture")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in ARCHITECTURES:
            raise ValueError(str(UnknownNameError("architecture", value, ARCHITECTURES)))
        return value

    @field_validator("ace", mode="before")
    @classmethod
    def _lambda(cls, value: object) -> object:
        value = math.inf if value in ("inf", "∞") else value
        if isinstance(value, int | float) and not value >= 0:
            raise ValueError(f"ace is {value}; expected λ ≥ 0 or inf")
        return value


def parse_fraction(value: object) -> object:
    """`"8/255"` as a number; anything else as it is."""
    if isinstance(value, str):
        top, slash, bottom = value.partition("/")
        try:
            return float(top) / float(bottom) if slash else float(top)
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"{value!r} is no number; expected for example 8/255") from None
    return value


def list_recipes() -> list[str]:
    """Names of the recipes in the package."""
    folder = resources.files("feint.training") / "recipes"
    return sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".yaml"))


def load_recipe(name: str) -> TrainingRecipe:
    """A recipe by name, or from a YAML file.

    Raises:
        UnknownNameError: No such recipe in the package.
        DataError: The file cannot be read.
        ConfigError: The file does not describe a recipe.
    """
    if name.endswith((".yaml", ".yml")):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"cannot read recipe {name}: {error.strerror}") from None
    elif name in list_recipes():
        text = (resources.files("feint.training") / "recipes" / f"{name}.yaml").read_text("utf-8")
    else:
        raise UnknownNameError("training recipe", name, list_recipes())
    try:
        raw = yaml.safe_load(text)
        return TrainingRecipe.model_validate({"name": Path(name).stem, **raw})
    except (yaml.YAMLError, ValidationError, TypeError) as error:
        raise ConfigError(f"recipe {name}: {_brief(error)}") from None


def _brief(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})"
            for e in error.errors()
        )
    return str(error)
