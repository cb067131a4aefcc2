"""Train a learned defense by a recipe with `kind: defense`.

The recipe names the defense with its structure, an objective, and, where the objective, the
adversary or the measurement needs one, the classifier behind it:

    kind: defense
    defense: s2snet(width=16, stages=3)   # any subclass of Learned; `weights` is set here
    objective: through-classifier         # reconstruct, guided, likelihood, … (objectives.py)
    classifier: bundled:cifar10-resnet20  # frozen, in eval mode
    parts: [network.decode]               # what learns; by default the whole network
    start: cifar10-segnet                 # weights to begin with; by default fresh ones
    corrupt: noise(scale=0.1)             # spoils the input (denoising autoencoders)
    adversary: {eps: 8/255, steps: 2, step_size: 5/255}  # or attack the bare classifier (HGD)
    epochs: 4
    peak_lr: 1.0e-3
    store: float16

`feint train RECIPE` and `feint.training.run.train(recipe, data=…, out=…)` run it: checkpoints that
resume bit by bit, a log line per epoch, then `NAME.safetensors` with its card `NAME.json`, which
the defense opens as `weights='NAME.safetensors'`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import feint.models
from feint.core import random, spec
from feint.core.errors import ConfigError, ShapeError, UnknownNameError
from feint.core.quantise import from_uint8
from feint.core.registry import DEFENSES
from feint.core.weights import fill, initialise, read_safetensors
from feint.defenses._learned import UNTRAINED, Learned, read_meta, weights_path
from feint.defenses.base import Defense
from feint.defenses.chain import parse
from feint.training.augment import crop_and_flip, cut_and_flip
from feint.training.fit import EpochReport, Trainer, check_data, judged_at_once, run
from feint.training.objectives import OBJECTIVES, Example
from feint.training.recipe import DefenseRecipe

__all__ = ["begin", "defended_accuracy", "fit_defense", "load_classifier", "measured"]


def begin(recipe: DefenseRecipe) -> Learned:
    """The recipe's defense with the weights that its training starts from.

    Raises:
        ConfigError: No single learned defense; `weights` among its keywords; weights to start from
            of another family or structure; an objective that the defense cannot serve.
        UnknownNameError: An unknown defense, keyword or part.
        DataError: Weights to start from that are missing or damaged.
    """
    call = spec.parse(recipe.defense)
    if not isinstance(call, spec.Call):
        raise ConfigError(f"recipe {recipe.name}: defense is {recipe.defense!r}; expected one name")
    if "weights" in call.keywords:
        raise ConfigError(f"recipe {recipe.name}: leave weights to `start`")
    DEFENSES[call.name].check({"weights": UNTRAINED, **call.keywords})
    defense = parse(spec.format_call(call.name, {**call.keywords, "weights": UNTRAINED}))
    if not isinstance(defense, Learned) or "network" not in dict(defense.named_children()):
        raise ConfigError(f"recipe {recipe.name}: {call.name} has no weights to train")
    objective = OBJECTIVES[recipe.objective]
    if not hasattr(defense, objective.requires):
        raise ConfigError(
            f"recipe {recipe.name}: objective {recipe.objective!r} needs a defense with "
            f"{objective.requires}(…), which {call.name} lacks"
        )
    if objective.needs_classifier and recipe.classifier is None:
        raise ConfigError(f"recipe {recipe.name}: objective {recipe.objective!r} needs classifier")
    if recipe.adversary is not None and recipe.classifier is None:
        raise ConfigError(f"recipe {recipe.name}: the adversary attacks classifier; name one")
    for part in recipe.parts:
        known = dict(defense.named_modules())
        if part not in known:
            raise UnknownNameError(f"part of {call.name}", part, [n for n in known if n])
    if recipe.start is None:
        initialise(defense.network, recipe.seed, recipe.initialisation)
    else:
        state, meta = read_safetensors(weights_path(recipe.start))
        family = read_meta(meta, recipe.start).get("family")
        if family != defense.family:
            raise ConfigError(
                f"recipe {recipe.name}: start {recipe.start!r} has weights of the family "
                f"{family!r}; expected {defense.family!r}"
            )
        fill(defense.network, state, recipe.start, f"the recipe's {recipe.defense}")
    return defense


def load_classifier(recipe: DefenseRecipe, device: torch.device | str) -> nn.Module | None:
    """The recipe's classifier: in eval mode, without gradients of its parameters."""
    if recipe.classifier is None:
        return None
    return feint.models.load(recipe.classifier, device=device).requires_grad_(False)


@dataclass
class _DefenseTrainer(Trainer[DefenseRecipe]):
    model: Learned
    classifier: nn.Module | None = None
    spoil: Defense | None = None

    def __post_init__(self) -> None:
        self.model.requires_grad_(False)
        for part in self._learning():
            part.requires_grad_(True)
        super().__post_init__()

    def _learning(self) -> list[nn.Module]:
        modules = dict(self.model.named_modules())
        return [modules[name] for name in self.recipe.parts or ("network",)]

    def _optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if self.recipe.optimizer == "sgd":
            return super()._optimizer(groups)
        betas = (self.recipe.momentum, 0.999)
        return torch.optim.AdamW(groups, lr=self.recipe.peak_lr, betas=betas)

    def _augmented(self, images: Tensor, keys: Tensor) -> Tensor:
        r = self.recipe
        if r.augment == "none":
            return images
        if r.crop is None:
            return crop_and_flip(images, keys)
        return cut_and_flip(images, keys, r.crop)

    def _step(self, index: Tensor, progress: float) -> tuple[Tensor, Tensor | None]:
        r = self.recipe
        x, y, keys = self._shown(index)
        batches = [(self._spoiled(x, keys), 1.0)]
        if r.adversary is not None and self.classifier is not None:
            x_adv = self._attacked(self.classifier, x, y, keys, progress)
            share = r.adversary.share
            batches = [(x_adv, share)] + ([(batches[0][0], 1 - share)] if share < 1 else [])
        self.model.eval()
        for part in self._learning():
            part.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), device=self.device)
        hits: Tensor | None = torch.zeros((), device=self.device)
        for given, weight in batches:
            params = self.model.sample(given, random.fold(keys, "draw").to(self.device))
            example = Example(self.model, self.classifier, x, given, y, params, r.layer)
            with self._autocast():
                losses, logits = OBJECTIVES[r.objective].function(example)
            loss = weight * losses.mean()
            loss.backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.detach()
            if logits is None or hits is None:
                hits = None
            else:
                hits = hits + weight * (logits.detach().argmax(1) == y).sum()
        self.optimizer.step()
        if r.average:
            self._update_average()
        return loss_sum, hits

    def _spoiled(self, x: Tensor, keys: Tensor) -> Tensor:
        if self.spoil is None:
            return x
        with torch.no_grad():
            spoiled: Tensor = self.spoil(x, random.fold(keys, "corrupt").to(x.device))
        return spoiled


def fit_defense(
    defense: Learned,
    recipe: DefenseRecipe,
    images: Tensor,
    labels: Tensor,
    *,
    classifier: nn.Module | None = None,
    folder: Path | None = None,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[EpochReport], None] | None = None,
) -> Learned:
    """Train a defense in place by a recipe and return it frozen, in eval mode.

    Args:
        defense: As `begin` makes it.
        recipe: What to do; its `start` and `classifier` are the caller's business.
        images: (N, 3, H, W) uint8, on the CPU.
        labels: (N,) int64, on the CPU.
        classifier: The one that the recipe names, frozen, on the device.
        folder: For checkpoint and log, as in `feint.training.fit`.
        device: Where to train.
        on_epoch: Called after every epoch.

    Raises:
        As `feint.training.fit`.

    Cost:
        One forward and backward pass of the network per image and epoch, and of the classifier
        where the objective asks it; with an adversary of k steps, k passes of the classifier more.
    """
    check_data(images, labels)
    if recipe.crop is not None and recipe.crop > min(images.shape[-2:]):
        raise ShapeError(
            f"images have shape {tuple(images.shape)}; expected sides of at least crop, "
            f"{recipe.crop}; give the recipe a side, or a smaller crop"
        )
    spoil = None if recipe.corrupt is None else parse(recipe.corrupt)
    where = torch.device(device)
    trainer = _DefenseTrainer(
        defense, recipe, images, labels, where, classifier=classifier, spoil=spoil
    )
    run(trainer, folder, on_epoch)
    defense.to(memory_format=torch.contiguous_format).requires_grad_(False)  # type: ignore[call-overload]
    if recipe.store == "float16":
        defense.network.half().float()
    return defense.eval()


@torch.no_grad()
def defended_accuracy(
    defense: Defense,
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    batch_size: int | None = None,
) -> dict[str, int]:
    """How many 8-bit images are classified as labelled: `clean` behind the defense, `undefended`.

    A random defense draws once per image, by keys of seed 0.
    """
    batch_size = batch_size or judged_at_once(images)
    hits = {"clean": 0, "undefended": 0}
    for start in range(0, len(images), batch_size):
        x, keys, device = _batch(images, start, batch_size, classifier)
        y = labels[start : start + batch_size].to(device)
        hits["clean"] += int((classifier(defense(x, keys)).argmax(1) == y).sum())
        hits["undefended"] += int((classifier(x).argmax(1) == y).sum())
    return hits


@torch.no_grad()
def measured(defense: Learned, images: Tensor, batch_size: int | None = None) -> dict[str, float]:
    """What can be said without a classifier, for the card.

    Returns:
        `reconstruction_rms`: root of the mean squared difference between images and `learn`; and
        `bits_per_value` for a defense that has `log_likelihood`.
    """
    batch_size = batch_size or judged_at_once(images)
    squares = nats = 0.0
    for start in range(0, len(images), batch_size):
        x, keys, _ = _batch(images, start, batch_size, defense.network)
        if hasattr(defense, "log_likelihood"):
            log_likelihood: Any = defense.log_likelihood
            nats += float(log_likelihood(x).double().sum())
        else:
            made = defense.learn(x, defense.sample(x, keys))
            squares += float((made - x).double().square().sum())
    if hasattr(defense, "log_likelihood"):
        return {"bits_per_value": -nats / math.log(2) / images.numel()}
    return {"reconstruction_rms": (squares / images.numel()) ** 0.5}


def _batch(
    images: Tensor, start: int, size: int, module: nn.Module
) -> tuple[Tensor, Tensor, torch.device]:
    """Images in [0, 1] and their keys, where the module is."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    x = from_uint8(images[start : start + size].to(device))
    return x, random.keys(0, torch.arange(start, start + len(x))).to(device), device
