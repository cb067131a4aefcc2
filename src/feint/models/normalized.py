"""Normalisation lives inside the model: images in [0, 1] in, logits out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from feint.core.errors import RangeError

__all__ = ["CIFAR10_MEAN", "CIFAR10_STD", "IMAGENET_MEAN", "IMAGENET_STD", "Normalized"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Normalized(nn.Module):
    """`net((x − mean) / std)`, so that eps is in image units everywhere.

    Args:
        net: A network on normalised input.
        mean: One value per channel.
        std: One value per channel, positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        net: nn.Module,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        if not all(s > 0 for s in std):
            raise RangeError(f"std is {tuple(std)}; expected positive values")
        self.net = net
        shape = (1, len(mean), 1, 1)
        self.register_buffer("mean", torch.tensor(mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(shape), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images in [0, 1]."""
        logits: Tensor = self.net((x - self.mean) / self.std)
        return logits

    def extra_repr(self) -> str:
        """Mean and standard deviation."""
        mean, std = ([round(float(v), 4) for v in t.flatten()] for t in (self.mean, self.std))
        return f"mean={mean}, std={std}"
