"""Training recipes: typed, frozen, one YAML file each in `feint/training/recipes/`."""

from __future__ import annotations

import hashlib
import math
import re
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from feint.core.errors import ConfigError, DataError, UnknownNameError
from feint.models.architectures import ARCHITECTURES
from feint.models.build import Initialisation
from feint.training.objectives import OBJECTIVES

__all__ = [
    "Adversary",
    "DefenseRecipe",
    "Schedule",
    "TrainingRecipe",
    "content_digest",
    "list_recipes",
    "load_recipe",
]

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


class Schedule(_Frozen):
    """What every recipe decides: data, length, optimisation, randomness."""

    name: str
    data: Literal["cifar10", "cifar100", "?"] = "cifar10"
    """What to train on; `"?"` is for whoever trains to say."""
    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)] = 128
    peak_lr: Positive
    """Largest learning rate of the one-cycle schedule."""
    rise: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the training over which the learning rate rises."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of SGD; the first of Adam's two decays."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    average: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay per step of an exponential moving average of the weights; 0 for none."""
    precision: Literal["float32", "bf16"] = "bf16"
    initialisation: Initialisation = "he"
    """How fresh weights are drawn; see `feint.models.initialise`."""
    start: str | None = None
    """Weights to start from; by default a fresh initialisation."""
    adversary: Adversary | None = None
    seed: int = 0


class TrainingRecipe(Schedule):
    """Everything that decides the weights of a classifier; `start` is a model spec."""

    architecture: str
    """A name of `feint.models.ARCHITECTURES`."""
    ace: float | None = None
    """λ of an ACE module in front of the network, behind the normalisation; none by default."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0

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


class DefenseRecipe(Schedule):
    """Everything that decides the weights of a defense; see `feint.training.defense`.

    `start` is a name of bundled defense weights or a `.safetensors` file of the same family.
    """

    kind: Literal["defense"] = "defense"
    defense: str
    """One learned defense with its structure, such as `s2snet(width=16, stages=3)`; its weights
    are this recipe's business."""
    objective: str
    """A name of `feint.training.objectives.OBJECTIVES`."""
    classifier: str | None = None
    """Model spec of the classifier behind the defense: it guides the objectives that need one, is
    attacked by the adversary, and the clean accuracy behind the defense is measured with it. `"?"`
    is for whoever trains to say."""
    side: Annotated[int, Field(ge=1)] | None = None
    """Side in pixels of the square that is taken from the middle of every image, brought to that
    size; by default images are as they are."""
    crop: Annotated[int, Field(ge=1)] | None = None
    """Side of a random part of an image that training shows; the whole by default."""
    samples: Annotated[int, Field(ge=1)] | None = None
    """How many images to train on, in the order of a keyed hash; all by default."""
    held_out: Annotated[int, Field(ge=1)] | None = None
    """For data without a training and a test part: how many images, the first in that order, are
    not trained on but measured with. `feint reproduce` evaluates on the first of the same order."""
    layer: str | None = None
    """For `guided`: qualified name of the classifier's module whose output is compared; by default
    the logits."""
    parts: tuple[str, ...] = ()
    """Submodules of the defense that learn, such as `network.decode`; all the others are frozen in
    eval mode. By default the whole network learns."""
    corrupt: str | None = None
    """A defense expression on images that spoils the input in training, `noise(scale=0.1)`."""
    augment: Literal["crop-flip", "none"] = "crop-flip"
    """How images are shown: cropped after reflect-padding by four pixels (with `crop`: a part of
    that size, from anywhere) and flipped, or as is."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam with decoupled weight decay (0.9, 0.999), or SGD with Nesterov's momentum."""
    judged: Annotated[int, Field(ge=1)] | None = None
    """How many test images, the first ones, the accuracy behind the defense is measured on, for
    defenses that take seconds per image; all by default."""
    store: Literal["float32", "float16"] = "float32"
    """Precision of the weights file; everything on the card is measured with these weights."""

    @model_validator(mode="after")
    def _parts(self) -> DefenseRecipe:
        if self.crop is not None and self.side is not None and self.crop > self.side:
            raise ValueError(f"crop is {self.crop}; expected at most side, {self.side}")
        if self.crop is not None and self.augment == "none":
            raise ValueError("crop is for augment: crop-flip; leave one of them out")
        return self

    @field_validator("objective")
    @classmethod
    def _objective(cls, value: str) -> str:
        if value not in OBJECTIVES:
            raise ValueError(str(UnknownNameError("objective", value, OBJECTIVES)))
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
    """Names of the recipes in the package; a family, such as ACE's models for each λ, one by one.

    A family is a file whose name has a key in braces, `cifar10-toy-ace{ace}.yaml`, and whose entry
    `family` lists that key's values; `"{ace}"` in it stands for the member's.
    """
    return sorted(_shelf())


def content_digest(recipe: TrainingRecipe | DefenseRecipe) -> str:
    """Twelve digits that stand for everything that a recipe says."""
    return hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()[:12]


@lru_cache(maxsize=1)
def _shelf() -> dict[str, str]:
    """The text of every recipe in the package, by name."""
    found = {}
    for file in (resources.files("feint.training") / "recipes").iterdir():
        if not file.name.endswith(".yaml"):
            continue
        stem, text = Path(file.name).stem, file.read_text("utf-8")
        keys = re.findall(r"\{(\w+)\}", stem)
        if not keys:
            found[stem] = text
            continue
        (key,) = keys
        for value in yaml.safe_load(text)["family"]:
            found[stem.replace(f"{{{key}}}", str(value))] = text.replace(f"{{{key}}}", str(value))
    return found


def load_recipe(name: str) -> TrainingRecipe | DefenseRecipe:
    """A recipe by name, or from a YAML file; `kind: defense` in it makes a `DefenseRecipe`.

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
    elif name in _shelf():
        text = _shelf()[name]
    else:
        raise UnknownNameError("training recipe", name, list_recipes())
    try:
        stem = Path(name).stem if name.endswith((".yaml", ".yml")) else name
        raw = {"name": stem, **yaml.safe_load(text)}
        raw.pop("family", None)
        kind = raw.get("kind", "classifier")
        if kind not in ("classifier", "defense"):
            raise ConfigError(f"recipe {name}: kind is {kind!r}; expected classifier or defense")
        if kind == "defense":
            return DefenseRecipe.model_validate(raw)
        return TrainingRecipe.model_validate({k: v for k, v in raw.items() if k != "kind"})
    except (yaml.YAMLError, ValidationError, TypeError) as error:
        raise ConfigError(f"recipe {name}: {_brief(error)}") from None


def _brief(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})"
            for e in error.errors()
        )
    return str(error)
