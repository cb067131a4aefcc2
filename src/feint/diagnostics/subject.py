"""What is diagnosed, with which settings, and what measures share of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from feint.attacks import pgd
from feint.core import random
from feint.core.gradients import GradientEstimator, backprop, eot, is_stochastic
from feint.core.losses import adversarial
from feint.diagnostics._common import logits_of, sample_keys
from feint.diagnostics.gradients import heatmap, input_gradients
from feint.diagnostics.masked import Attack
from feint.diagnostics.masks import connected_pixels
from feint.diagnostics.overlap import gradient_overlap

__all__ = ["Bench", "Options", "Subject", "usual_attack"]

EOT_DRAWS = 8
PIXELS = 1600
"""Images of more pixels have P_attack measured in a window in their middle."""


@dataclass(frozen=True)
class Subject:
    """One classifier to diagnose.

    Attributes:
        name: What figures call it; different for every subject.
        bare: The classifier alone: its architecture decides Ω and C.
        model: As deployed, with its defense: what predicts.
        view: As attacked: the same predictions, differentiable. `Pipeline.view()`.
    """

    name: str
    bare: nn.Module
    model: nn.Module
    view: nn.Module


@dataclass(frozen=True)
class Options:
    """Settings of every measure.

    Attributes:
        seed: Seed of every draw.
        eps: Linf budget of the attack behind perturbation maps, in image units.
        attack: Called as `attack(view, x, y, seed=keys)`, and with `mask=`; by default
            `usual_attack(eps, …)`.
        share: p of G(p).
        overlap: Preset of `gradient_overlap`.
        stride: Of the set C, for models that have no checkerboard module.
        pixel_images: Images for P_attack, the first ones.
        window: Side of the window of P_attack; by default the whole image, or 16 if it is large.
        map_images: Images for label maps: the first ones that all subjects classify rightly.
        points: Points along each axis of a label map, odd.
        reach: Half the side of a label map, l2 in image units; by default 0.058·√(C·H·W), which is
            S0's ±100 for its 224×224 images.
        batch_size: Images per pass.
    """

    seed: int = 0
    eps: float = 8 / 255
    attack: Attack | None = None
    share: float = 0.3
    overlap: str = "repo"
    stride: int = 2
    pixel_images: int = 6
    window: int | None = None
    map_images: int = 1
    points: int = 25
    reach: float | None = None
    batch_size: int = 128


def usual_attack(eps: float, shape: torch.Size, estimator: GradientEstimator = backprop) -> Attack:
    """S0's own PGD in fewer and longer steps: the normalised gradient, clipped to linf.

    The sign of the gradient would move every pixel by eps, however small its gradient, and hide
    where a model is sensitive.

    Args:
        eps: Linf budget.
        shape: Of a batch, (B, C, H, W).
        estimator: `eot(…)` for random models.
    """
    return partial(
        pgd,
        eps=eps,
        steps=20,
        step_size=0.25 * math.sqrt(math.prod(shape[1:]) / 3072),
        direction="gradient",
        random_start=False,
        stop="never",
        gradient=estimator,
    )


@dataclass(frozen=True)
class Bench:
    """A subject with images and settings; what several measures need is computed once.

    Attributes:
        subject: What is diagnosed.
        x: Images.
        y: Labels.
        keys: (B,).
        options: Settings.
        others: Every bench of the diagnosis by the subject's name, this one among them.
        chosen: Rows of the images for label maps.
    """

    subject: Subject
    x: Tensor
    y: Tensor
    keys: Tensor
    options: Options
    others: dict[str, Bench] = field(default_factory=dict)
    chosen: list[int] = field(default_factory=list)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return int(self.x.shape[-2]), int(self.x.shape[-1])

    @cached_property
    def estimator(self) -> GradientEstimator:
        """Backpropagation, averaged over draws where the view is random."""
        return eot(EOT_DRAWS) if is_stochastic(self.subject.view) else backprop

    @cached_property
    def attack(self) -> Attack:
        """The attack of the settings, or the usual one."""
        if self.options.attack is not None:
            return self.options.attack
        return usual_attack(self.options.eps, self.x.shape, self.estimator)

    @cached_property
    def connected(self) -> Tensor:
        """C, bool (H, W)."""
        found = connected_pixels(self.subject.bare, *self.size, stride=self.options.stride)
        return found.to(self.x.device)

    @cached_property
    def overlap(self) -> Tensor:
        """Ω of the bare classifier, float64 (H, W)."""
        c, h, w = (int(n) for n in self.x.shape[1:])
        return gradient_overlap(self.subject.bare, (c, h, w), preset=self.options.overlap)

    def gradients_for(self, y: Tensor) -> Tensor:
        """Input gradients towards labels, like `x`."""
        return input_gradients(
            self.subject.view,
            self.x,
            y,
            gradient=self.estimator,
            seed=self.keys,
            batch_size=self.options.batch_size,
        )

    @cached_property
    def gradients(self) -> Tensor:
        """Input gradients of the true labels' loss."""
        return self.gradients_for(self.y)

    @cached_property
    def robustness(self) -> Tensor:
        """R, float64 (H, W)."""
        return heatmap(self.gradients, reduce="mean")

    @cached_property
    def logits(self) -> Tensor:
        """Of the deployed model on the clean images."""
        return logits_of(self.subject.model, self.x, self.keys, self.options.batch_size)

    @cached_property
    def right(self) -> Tensor:
        """Whether each clean image is classified rightly: bool (B,)."""
        return ~adversarial(self.logits, self.y)

    @cached_property
    def x_adv(self) -> Tensor:
        """The images attacked through the view."""
        size = self.options.batch_size
        rows = [slice(i, i + size) for i in range(0, len(self.x), size)]
        return torch.cat(
            [self.attack(self.subject.view, self.x[r], self.y[r], seed=self.keys[r]) for r in rows]
        )

    @property
    def judge_keys(self) -> Tensor:
        """Keys of a draw that the attack did not see."""
        return random.fold(sample_keys(self.keys, self.x), "judge")
