"""Train a classifier or a defense by a recipe: data in, weights and a card out."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest
from torch import nn

import feint.data
from feint import __version__
from feint.core.errors import ConfigError
from feint.core.weights import fill, read_safetensors
from feint.data import Dataset
from feint.data.resize import Fit
from feint.defenses._learned import weights_path
from feint.models.build import build, initialise
from feint.models.bundle import bundled_path, save_bundle, save_weights
from feint.training.defense import (
    begin,
    defended_accuracy,
    fit_defense,
    load_classifier,
    measured,
)
from feint.training.fit import EpochReport, accuracy, fit
from feint.training.recipe import DefenseRecipe, TrainingRecipe, load_recipe

__all__ = ["train"]


def train(
    recipe: str | TrainingRecipe | DefenseRecipe,
    *,
    out: str | Path,
    data: str | None = None,
    classifier: str | None = None,
    root: str | Path | None = None,
    download: bool = False,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[EpochReport], None] | None = None,
) -> dict[str, Any]:
    """Train a classifier or a defense by a recipe, and measure it on the whole test set in float32.

    A run that was stopped continues from its last epoch and ends with the same weights.

    Args:
        recipe: Name of a recipe in the package, a YAML file, or a recipe.
        out: Folder for `checkpoint.safetensors`, `log.jsonl`, and in the end `NAME.safetensors`
            with its card `NAME.json`, which `feint.models.load` reads; NAME is the recipe's.
        data: Data spec with a training and a test part, or any if the recipe holds some images out;
            by default the recipe's.
        classifier: Model spec of the classifier behind a defense; by default the recipe's.
        root: Where CIFAR is; see `feint.data.load`.
        download: Fetch CIFAR if it is missing.
        device: Where to train.
        on_epoch: Called after every epoch.

    Returns:
        The card: architecture (or the defense's family and structure), recipe, data with
        fingerprints, seed, versions, accuracy (count and 95 % Wilson interval), SHA-256 of the
        weights; and `path`, the weights file. A defense's accuracy is that of the classifier which
        the recipe names, behind the defense (`clean`) and alone (`undefended`), and
        `reconstruction_rms` is the distance of what it learned to make from the image.

    Raises:
        UnknownNameError, ConfigError: A recipe, data or start that cannot be.
        DataError: Data missing or damaged; a damaged checkpoint; a folder that cannot be written.
        ModelError: The loss is not finite.

    Cost:
        That of `feint.training.fit`, and one forward pass per test image.

    References:
        Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    plan = with_classifier(load_recipe(recipe) if isinstance(recipe, str) else recipe, classifier)
    out = Path(out)
    if isinstance(plan, DefenseRecipe):
        begin(plan)  # what cannot be is refused before the data are read
    spec = plan.data if data is None else data
    if spec == "?":
        raise ConfigError(
            f"recipe {plan.name} leaves the images open; give data (--data), such as "
            "imagefolder:DIR or LIST.csv"
        )
    parts = _parts(plan, spec, root, download)
    job = _Job(out, spec, parts, device, on_epoch)
    if isinstance(plan, DefenseRecipe):
        card, path = _defense(plan, job)
    else:
        card, path = _classifier(plan, job)
    return {**card, "path": str(path)}


def with_classifier(
    plan: TrainingRecipe | DefenseRecipe, classifier: str | None
) -> TrainingRecipe | DefenseRecipe:
    """The recipe with the classifier that is to stand behind its defense, if one is given.

    Raises:
        ConfigError: A classifier for a recipe that trains one; none for one that leaves it open.
    """
    if classifier is not None:
        if not isinstance(plan, DefenseRecipe):
            raise ConfigError(f"recipe {plan.name} trains a classifier; leave classifier out")
        return plan.model_copy(update={"classifier": classifier})
    if isinstance(plan, DefenseRecipe) and plan.classifier == "?":
        raise ConfigError(
            f"recipe {plan.name} leaves the classifier open; give classifier (--classifier), such "
            "as torchvision:resnet50 or FILE.py:FUNCTION"
        )
    return plan


def _parts(
    plan: TrainingRecipe | DefenseRecipe, spec: str, root: str | Path | None, download: bool
) -> dict[str, Dataset]:
    """The images to train on and those to measure with."""
    side = held_out = samples = None
    if isinstance(plan, DefenseRecipe):
        side, held_out, samples = plan.side, plan.held_out, plan.samples
    fit: Fit = "stretch" if side is None else "crop"

    def part(split: str) -> Dataset:
        return feint.data.load(
            spec, split=split, resize=side, fit=fit, root=root, download=download
        )

    if held_out is None:
        parts = {split: part(split) for split in ("train", "test")}
        if samples is not None:
            parts["train"] = parts["train"].take(samples)
        return parts
    whole = part("test")
    if held_out >= len(whole):
        raise ConfigError(
            f"{spec} has {len(whole)} images; recipe {plan.name} holds {held_out} out and needs "
            "more to train on"
        )
    ranked = whole.take(len(whole))
    end = len(whole) if samples is None else min(len(whole), held_out + samples)
    return {
        "train": ranked.subset(range(held_out, end)),
        "test": ranked.subset(range(held_out)),
    }


@dataclass(frozen=True)
class _Job:
    """What a training gets besides its recipe."""

    out: Path
    spec: str
    parts: dict[str, Dataset]
    device: torch.device | str
    on_epoch: Callable[[EpochReport], None] | None

    def common(self, plan: TrainingRecipe | DefenseRecipe) -> dict[str, Any]:
        """The entries of every card."""
        return {
            "data": {
                "spec": _name(self.spec),
                **{
                    k: {"images": len(v), "fingerprint": v.fingerprint}
                    for k, v in self.parts.items()
                },
            },
            "seed": plan.seed,
            "versions": {
                "feint": __version__,
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "torchvision", "numpy")},
            },
            "device": str(torch.device(self.device)),
        }


def _classifier(plan: TrainingRecipe, job: _Job) -> tuple[dict[str, Any], Path]:
    classes = _classes(job.parts)
    model = build(plan.architecture, plan.ace, classes)
    initialise(model, plan.seed, plan.initialisation)
    start = _begin_from(model, plan)
    learned, test = job.parts["train"], job.parts["test"]
    fit(
        model,
        plan,
        learned.images(),
        learned.labels,
        folder=job.out,
        device=job.device,
        on_epoch=job.on_epoch,
    )
    share = accuracy(model, test.images(), test.labels)
    common = job.common(plan)
    card = {
        "name": plan.name,
        "architecture": plan.architecture,
        "ace": _finite(plan.ace),
        "classes": classes,
        "input_size": list(learned.shape[1:]),
        "accuracy": {"clean": _rate(round(share * len(test)), len(test))},
        "data": common.pop("data"),
        "recipe": {
            **plan.model_dump(mode="json"),
            "ace": _finite(plan.ace),
            "start": None if plan.start is None else _name(plan.start),
        },
        "start": start,
        **common,
    }
    path = job.out / f"{plan.name}.safetensors"
    return save_bundle(model, path, card), path


def _defense(plan: DefenseRecipe, job: _Job) -> tuple[dict[str, Any], Path]:
    defense = begin(plan)
    classifier = load_classifier(plan, job.device)
    learned, test = job.parts["train"], job.parts["test"]
    fit_defense(
        defense,
        plan,
        learned.images(),
        learned.labels,
        classifier=classifier,
        folder=job.out,
        device=job.device,
        on_epoch=job.on_epoch,
    )
    shown = slice(0, plan.judged)
    labels = test.labels[shown]
    hits = (
        {}
        if classifier is None
        else defended_accuracy(defense, classifier, test.images()[shown], labels)
    )
    size = list(learned.shape[1:])
    common = job.common(plan)
    started = None if plan.start is None else weights_path(plan.start)
    card = {
        "name": plan.name,
        "family": defense.family,
        "structure": defense.structure,
        "input_size": size,
        "accuracy": {k: _rate(v, len(labels)) for k, v in hits.items()},
        **measured(defense, test.images()),
        "data": common.pop("data"),
        "recipe": {
            **plan.model_dump(mode="json"),
            "start": None if plan.start is None else _name(plan.start),
            "classifier": None if plan.classifier is None else _name(plan.classifier),
        },
        "start": None
        if started is None
        else {
            "spec": _name(str(plan.start)),
            "sha256": hashlib.sha256(started.read_bytes()).hexdigest(),
        },
        **common,
        "parameters": sum(p.numel() for p in defense.network.parameters()),
    }
    state = defense.network.state_dict()
    if plan.store == "float16":
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    path = job.out / f"{plan.name}.safetensors"
    return save_weights(path, state, defense.metadata(input_size=size), card), path


def _classes(parts: dict[str, Dataset]) -> int:
    known = parts["train"].classes
    if known is not None:
        return len(known)
    return max(2, 1 + max(int(part.labels.max()) for part in parts.values()))


def _begin_from(model: nn.Module, plan: TrainingRecipe) -> dict[str, str] | None:
    """Fill the model with the weights that the recipe starts from; what they were."""
    if plan.start is None:
        return None
    scheme, colon, name = plan.start.partition(":")
    if colon and scheme == "bundled":
        path = bundled_path(name)
    elif plan.start.endswith(".safetensors"):
        path = Path(plan.start)
    else:
        raise ConfigError(
            f"recipe {plan.name}: start is {plan.start!r}; expected bundled:NAME or "
            "NAME.safetensors"
        )
    state, _ = read_safetensors(path)
    fill(model, state, plan.start, f"the recipe's {plan.architecture}, ace={plan.ace}")
    return {"spec": _name(plan.start), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _name(spec: str) -> str:
    """A spec without the folders of this machine."""
    return spec if spec.startswith("bundled:") else Path(spec).name


def _finite(lam: float | None) -> float | str | None:
    """λ for JSON, which has no infinity."""
    return "inf" if lam == float("inf") else lam


def _rate(hits: int, count: int) -> dict[str, float | int]:
    interval = binomtest(hits, count).proportion_ci(0.95, "wilson")
    return {
        "value": hits / count,
        "low": float(interval.low),
        "high": float(interval.high),
        "hits": hits,
        "n": count,
    }
