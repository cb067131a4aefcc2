"""What the training of a defense minimises: one function per objective, registered by name.

An objective gets an `Example` (the defense, the classifier behind it, a batch) and returns the loss
per sample and, where it computes them, logits, from which the training accuracy is counted. A new
one is a function with a decorator; recipes then name it:

    @objective("my-loss", needs_classifier=False)
    def my_loss(example: Example) -> Outcome:
        return per_sample_loss, None
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feint.core.errors import ConfigError, UnknownNameError
from feint.defenses.base import Params

__all__ = ["OBJECTIVES", "Example", "Objective", "Outcome", "objective"]

Outcome = tuple[Tensor, Tensor | None]
"""Loss (B,), and logits (B, K) or None."""


@dataclass(frozen=True)
class Example:
    """What an objective sees of one batch."""

    defense: Any
    """A learned defense: `learn(x, params)`, `transform(x, params)`, and what else an objective
    asks of it."""
    classifier: nn.Module | None
    """In eval mode, without gradients of its parameters."""
    x: Tensor
    """Clean images in [0, 1], as shown."""
    given: Tensor
    """What the defense gets: `x`, corrupted or attacked."""
    y: Tensor
    """Labels."""
    params: Params
    """The defense's draw for this batch."""
    layer: str | None = None
    """The classifier's module that `guided` compares."""


@dataclass(frozen=True)
class Objective:
    """A registered objective."""

    function: Callable[[Example], Outcome]
    needs_classifier: bool
    requires: str
    """The method of the defense that it calls."""


OBJECTIVES: dict[str, Objective] = {}


def objective(
    name: str, *, needs_classifier: bool = False, requires: str = "learn"
) -> Callable[[Callable[[Example], Outcome]], Callable[[Example], Outcome]]:
    """Register an objective under the name that recipes use."""

    def register(function: Callable[[Example], Outcome]) -> Callable[[Example], Outcome]:
        OBJECTIVES[name] = Objective(function, needs_classifier, requires)
        return function

    return register


@objective("reconstruct")
def reconstruct(example: Example) -> Outcome:
    """Mean squared error between `learn(given)` and the clean image.

    In the space of the defense's own normalisation (its buffer `std`) where it has one, as ACE and
    S2SNet are trained; otherwise in image units.
    """
    off = example.defense.learn(example.given, example.params).float() - example.x
    std = getattr(example.defense, "std", None)
    if std is not None:
        off = off / std
    return off.square().flatten(1).mean(1), None


@objective("through-classifier", needs_classifier=True, requires="transform")
def through_classifier(example: Example) -> Outcome:
    """Cross-entropy of the classifier behind the deployed defense."""
    logits = _classifier(example)(example.defense.transform(example.given, example.params)).float()
    return F.cross_entropy(logits, example.y, reduction="none"), logits


@objective("guided", needs_classifier=True, requires="transform")
def guided(example: Example) -> Outcome:
    """Mean absolute difference of the classifier's features: defended against clean.

    The features are the logits, or the output of the module that the recipe's `layer` names.

    References:
        Liao et al., "Defense against adversarial attacks using high-level representation guided
        denoiser", CVPR 2018, arXiv 1712.02976, §3.3.
    """
    classifier = _classifier(example)
    with torch.no_grad():
        aim, _ = _features(classifier, example.x, example.layer)
    defended = example.defense.transform(example.given, example.params)
    found, logits = _features(classifier, defended, example.layer)
    return (found - aim).abs().flatten(1).mean(1), logits


@objective("likelihood", requires="log_likelihood")
def likelihood(example: Example) -> Outcome:
    """Bits per value: −log₂ of `defense.log_likelihood(given)`, (B,) in nats, over its values."""
    nats = example.defense.log_likelihood(example.given).float()
    return -nats / (math.log(2) * example.given[0].numel()), None


def _classifier(example: Example) -> nn.Module:
    if example.classifier is None:
        raise ConfigError("this objective needs a classifier; name one in the recipe")
    return example.classifier


def _features(classifier: nn.Module, x: Tensor, layer: str | None) -> tuple[Tensor, Tensor]:
    """The output of a module of the classifier, and the logits."""
    if layer is None:
        logits = classifier(x).float()
        return logits, logits
    modules = dict(classifier.named_modules())
    if layer not in modules:
        raise UnknownNameError("layer of the classifier", layer, modules)
    caught: list[Tensor] = []
    handle = modules[layer].register_forward_hook(lambda _m, _i, out: caught.append(out))
    try:
        logits = classifier(x).float()
    finally:
        handle.remove()
    if not caught:
        raise ConfigError(f"the classifier does not call its layer {layer!r}; name another one")
    return caught[0].float(), logits
