"""The training loop: a one-cycle schedule, keyed augmentation, adversaries, resume.

Everything random is keyed by the recipe's seed, the sample's index and the epoch, so a run that
was stopped and resumed ends with the weights of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from feint.attacks.pgd import pgd
from feint.core import random
from feint.core.checks import check_labels
from feint.core.errors import ConfigError, DataError, DtypeError, ModelError, ShapeError
from feint.core.quantise import from_uint8
from feint.training.augment import crop_and_flip
from feint.training.recipe import Schedule, TrainingRecipe

__all__ = ["EpochReport", "Trainer", "accuracy", "check_data", "fit", "judged_at_once", "run"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EpochReport:
    """What one epoch came to, given to the progress callback and appended to the log."""

    epoch: int
    epochs: int
    loss: float
    accuracy: float | None
    """Share of training images classified as labelled, as they were shown (augmented, attacked);
    None where nothing is classified."""
    lr: float
    seconds: float


def one_cycle(progress: float, peak: float, rise: float) -> float:
    """Learning rate after a share `progress` of the training: up along a line, down along a cosine.

    References:
        Smith & Topin, "Super-convergence", 2017.
    """
    if progress < rise:
        return peak * (0.04 + 0.96 * progress / rise)
    fall = (progress - rise) / (1 - rise)
    return peak * 0.5 * (1 + math.cos(math.pi * fall)) + 1e-5 * peak


_SAVED_AS = {"momentum_buffer": "momentum"}
"""Names of an optimizer's buffers in checkpoints where they differ from torch's."""

R = TypeVar("R", bound=Schedule)


@dataclass
class Trainer(Generic[R]):
    """A model on its way: one epoch at a time, with its whole state in named tensors."""

    model: nn.Module
    recipe: R
    images: Tensor
    labels: Tensor
    device: torch.device
    buffers: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    epoch: int = 0
    data: str = ""
    """SHA-256 of images and labels, so that a checkpoint is not continued on others."""

    def __post_init__(self) -> None:
        digest = hashlib.sha256(self.images.contiguous().numpy().data)
        digest.update(self.labels.contiguous().numpy().data)
        self.data = digest.hexdigest()
        self.model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        learned = [p for p in self.model.parameters() if p.requires_grad]
        decayed = [p for p in learned if p.ndim > 1]
        plain = [p for p in learned if p.ndim <= 1]
        self.optimizer = self._optimizer(
            [
                {"params": decayed, "weight_decay": self.recipe.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ]
        )
        self.steps_per_epoch = len(self.images) // self.recipe.batch_size
        if not self.steps_per_epoch:
            raise ConfigError(
                f"{len(self.images)} images give no batch of {self.recipe.batch_size}"
            )

    def _optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        r = self.recipe
        return torch.optim.SGD(groups, lr=r.peak_lr, momentum=r.momentum, nesterov=True)

    def run_epoch(self) -> tuple[float, float | None]:
        """One pass over the data in a keyed order; mean loss and accuracy as shown."""
        r = self.recipe
        epoch_key = random.fold(random.keys(r.seed, 1), "order", self.epoch)
        order = random.permutation(epoch_key, len(self.images))[0]
        loss_sum = torch.zeros((), device=self.device)
        hits: Tensor | None = torch.zeros((), device=self.device)
        for step in range(self.steps_per_epoch):
            index = order[step * r.batch_size : (step + 1) * r.batch_size]
            progress = (self.epoch + step / self.steps_per_epoch) / r.epochs
            for group in self.optimizer.param_groups:
                group["lr"] = one_cycle(progress, r.peak_lr, r.rise)
            loss, hit = self._step(index, progress)
            loss_sum = loss_sum + loss
            hits = None if hits is None or hit is None else hits + hit
        self.epoch += 1
        total = self.steps_per_epoch * r.batch_size
        mean = float(loss_sum) / self.steps_per_epoch
        if not math.isfinite(mean):
            raise ModelError(
                f"the loss is {mean} in epoch {self.epoch}; lower peak_lr ({r.peak_lr:g}) or use "
                "precision: float32"
            )
        return mean, None if hits is None else float(hits) / total

    def _shown(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images as they are shown, labels and keys of a batch."""
        keys = random.fold(random.keys(self.recipe.seed, index), "augment", self.epoch)
        x = from_uint8(self._augmented(self.images[index], keys)).to(self.device)
        x = x.contiguous(memory_format=torch.channels_last)
        return x, self.labels[index].to(self.device), keys

    def _augmented(self, images: Tensor, keys: Tensor) -> Tensor:
        return crop_and_flip(images, keys)

    def _step(self, index: Tensor, progress: float) -> tuple[Tensor, Tensor | None]:
        """One step of the optimizer: the loss, and how many images were classified as labelled."""
        raise TypeError(f"{type(self).__name__} must define _step(index, progress)")

    def _attacked(
        self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, progress: float
    ) -> Tensor:
        """What the recipe's adversary makes of `x` for `model`, which is in eval mode."""
        a = self.recipe.adversary
        if a is None:
            raise ConfigError("this recipe names no adversary")
        scale = min(1.0, progress / a.warmup) if a.warmup else 1.0
        with self._autocast():
            return pgd(
                model,
                x,
                y,
                eps=a.eps * scale,
                steps=a.steps,
                step_size=a.step_size * scale,
                random_start=True,
                stop="never",
                seed=random.fold(keys, "attack"),
            )

    def _autocast(self) -> torch.autocast:
        enabled = self.recipe.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _update_average(self) -> None:
        done = self.epoch * self.steps_per_epoch
        decay = min(self.recipe.average, (1 + done) / (10 + done))
        for name, value in self.model.state_dict().items():
            if name not in self.average:
                self.average[name] = value.clone()
            elif value.is_floating_point():
                self.average[name].lerp_(value, 1 - decay)
            else:
                self.average[name].copy_(value)

    def state(self) -> dict[str, Tensor]:
        """Weights, momentum and average, as flat named tensors."""
        out = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, buffer in self.optimizer.state.get(parameter, {}).items():
                if isinstance(buffer, Tensor):
                    out[f"{_SAVED_AS.get(key, key)}/{name}"] = buffer
        out |= {f"average/{k}": v for k, v in self.average.items()}
        return {k: v.detach().cpu().contiguous() for k, v in out.items()}

    def load(self, state: dict[str, Tensor], epoch: int) -> None:
        """Continue after `epoch` epochs."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        self.model.load_state_dict(part("model/"))
        for key in ("momentum_buffer", "exp_avg", "exp_avg_sq", "step"):
            saved = part(f"{_SAVED_AS.get(key, key)}/")
            for name, parameter in self.model.named_parameters():
                if name in saved:
                    like = torch.zeros(()) if key == "step" else torch.empty_like(parameter)
                    self.optimizer.state[parameter][key] = like.copy_(saved[name])
        self.average = {k: v.to(self.device) for k, v in part("average/").items()}
        self.epoch = epoch


class _ClassifierTrainer(Trainer[TrainingRecipe]):
    def _step(self, index: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        r = self.recipe
        x, y, keys = self._shown(index)
        batches = [(x, 1.0)]
        if r.adversary is not None:
            self.model.eval()  # the attack must not move the batch statistics
            x_adv = self._attacked(self.model, x, y, keys, progress)
            share = r.adversary.share
            batches = [(x_adv, share)] + ([(x, 1 - share)] if share < 1 else [])
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), device=self.device)
        hits = torch.zeros((), device=self.device)
        for batch, weight in batches:
            with self._autocast():
                logits = self.model(batch).float()
            loss = weight * F.cross_entropy(logits, y, label_smoothing=r.label_smoothing)
            loss.backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.detach()
            hits += weight * (logits.detach().argmax(1) == y).sum()
        self.optimizer.step()
        if r.average:
            self._update_average()
        return loss_sum, hits


def fit(
    model: nn.Module,
    recipe: TrainingRecipe,
    images: Tensor,
    labels: Tensor,
    *,
    folder: Path | None = None,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[EpochReport], None] | None = None,
) -> nn.Module:
    """Train `model` in place by a recipe and return it in eval mode.

    Args:
        model: Maps images in [0, 1] to logits.
        recipe: What to do; its `start` is the caller's business.
        images: (N, 3, H, W) uint8, on the CPU.
        labels: (N,) int64, on the CPU.
        folder: Where the checkpoint and the log go after every epoch; a checkpoint found there is
            resumed if it was made by the same recipe from the same data, and refused otherwise.
        device: Where to train.
        on_epoch: Called after every epoch.

    Raises:
        ShapeError, DtypeError, RangeError: Images or labels of another kind.
        ConfigError: The folder holds the checkpoint of another recipe or of other data; fewer
            images than a batch.
        DataError: The checkpoint is damaged, or the folder cannot be written.
        ModelError: The loss is not finite.

    Cost:
        One forward and backward pass per image and epoch; with an adversary of k steps, k + 1
        forward and k backward passes more.
    """
    check_data(images, labels)
    trainer = _ClassifierTrainer(model, recipe, images, labels, torch.device(device))
    run(trainer, folder, on_epoch)
    return model.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload, no-any-return]


def check_data(images: Tensor, labels: Tensor) -> None:
    """Require 8-bit images (N, C, H, W) and one label each."""
    if images.dtype != torch.uint8:
        raise DtypeError(f"images have dtype {images.dtype}; expected uint8")
    if images.ndim != 4:
        raise ShapeError(f"images have shape {tuple(images.shape)}; expected (N, 3, H, W)")
    check_labels(labels, len(images), name="labels")


def run(
    trainer: Trainer[Any],
    folder: Path | None = None,
    on_epoch: Callable[[EpochReport], None] | None = None,
) -> None:
    """Resume what is in the folder, train to the recipe's end, load the average if there is one.

    Errors as in `fit`.
    """
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot make the folder {folder}: {error.strerror}") from None
        _resume(trainer, folder)
    while trainer.epoch < trainer.recipe.epochs:
        start = time.perf_counter()
        loss, hit = trainer.run_epoch()
        report = EpochReport(
            trainer.epoch,
            trainer.recipe.epochs,
            loss,
            hit,
            trainer.optimizer.param_groups[0]["lr"],
            time.perf_counter() - start,
        )
        if folder is not None:
            _checkpoint(trainer, folder, report)
        if on_epoch is not None:
            on_epoch(report)
    if trainer.average:
        trainer.model.load_state_dict(trainer.average)


def _checkpoint(trainer: Trainer[Any], folder: Path, report: EpochReport) -> None:
    meta = {
        "recipe": trainer.recipe.model_dump_json(),
        "data": trainer.data,
        "epoch": str(trainer.epoch),
    }
    partial = folder / "checkpoint.partial"
    try:
        save_file(trainer.state(), partial, meta)
        with partial.open("rb") as handle:
            os.fsync(handle.fileno())
        partial.replace(folder / "checkpoint.safetensors")
        with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(vars(report)) + "\n")
    except (SafetensorError, OSError) as error:
        raise DataError(f"cannot write the checkpoint in {folder}: {error}") from None


def _resume(trainer: Trainer[Any], folder: Path) -> None:
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return
    try:
        with safe_open(path, "pt") as file:
            meta: dict[str, Any] = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"checkpoint {path} is damaged ({error}); delete it to start anew"
        ) from None
    try:  # a setting that is younger than the checkpoint had its default value then
        made_by = type(trainer.recipe).model_validate_json(meta.get("recipe", ""))
    except ValidationError:
        made_by = None
    if made_by != trainer.recipe:
        raise ConfigError(
            f"{path} was made by another recipe; give another output folder, or delete it"
        )
    if meta.get("data", trainer.data) != trainer.data:
        raise ConfigError(
            f"{path} was made from other images or labels; give another output folder, or delete it"
        )
    try:
        trainer.load(state, int(meta["epoch"]))
    except (KeyError, ValueError, RuntimeError) as error:
        brief = str(error).partition("\n")[0]
        raise DataError(
            f"checkpoint {path} does not fit its recipe ({brief}); delete it to start anew"
        ) from None
    logger.info("resumed after epoch %d", trainer.epoch)


def judged_at_once(images: Tensor) -> int:
    """Images in a forward pass: 500 of CIFAR's, and of larger ones as many as are their pixels."""
    return max(1, 500 * 32 * 32 // max(1, images.shape[-2] * images.shape[-1]))


@torch.no_grad()
def accuracy(
    model: nn.Module, images: Tensor, labels: Tensor, batch_size: int | None = None
) -> float:
    """Share of 8-bit images classified as labelled, in float32, on the model's device."""
    batch_size = batch_size or judged_at_once(images)
    hits = 0
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for start in range(0, len(images), batch_size):
        x = from_uint8(images[start : start + batch_size].to(device))
        y = labels[start : start + batch_size].to(device)
        hits += int((model(x).argmax(1) == y).sum())
    return hits / len(images)
