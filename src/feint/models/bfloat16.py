"""A classifier that computes in bfloat16: `bf16:SPEC`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from feint.core.gradients import is_stochastic, takes_keys
from feint.models.facts import declared_size
from feint.models.resized import Resized

__all__ = ["Bfloat16"]


class Bfloat16(nn.Module):
    """`net` with convolutions and products in bfloat16: the classifier that such a server runs.

    What is attacked and what is judged is the same function, images and logits in float32, so that
    no verdict hangs on two precisions that disagree. It is not quite the classifier in float32: say
    so where its numbers stand (`feint.core.mixed` instead takes only an attacker's gradients in
    bfloat16, and judges in the model's own precision).

    Args:
        net: Maps images in [0, 1] to logits; if its forward takes `keys`, so does this one's.

    Convention:
        Weights stay in float32 and are rounded as they are used (autocast). A network that resizes
        its images does so before, in float32.

    Cost:
        On processors with products of bfloat16 matrices a third of the float32 network's or less;
        on others it can be slower.

    Example:
        >>> model = Bfloat16(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)))
        >>> model(torch.rand(1, 3, 2, 2)).dtype
        torch.float32

    References:
        Kalamkar et al., "A study of bfloat16 for deep learning training", 2019.
    """

    def __new__(cls, net: nn.Module | None = None) -> Bfloat16:
        """One class whose forward takes keys, one whose does not: the signature tells attacks."""
        keyed = cls is Bfloat16 and net is not None and takes_keys(net)
        return super().__new__(_KeyedBfloat16 if keyed else cls)

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        size = declared_size(net)
        if size is not None:
            self.input_size = size

    @classmethod
    def within(cls, model: nn.Module) -> nn.Module:
        """The network in bfloat16, with its resizing around it as before."""
        if isinstance(model, Resized):
            return Resized(cls(model.net), model.size, model.mode)
        return cls(model)

    @property
    def stochastic(self) -> bool:
        """What the network declares."""
        return is_stochastic(self.net)

    def _logits(self, x: Tensor, **keys: Any) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            logits: Tensor = self.net(x, **keys)
        return logits.to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images in [0, 1], in the images' type."""
        return self._logits(x)


class _KeyedBfloat16(Bfloat16):
    """`Bfloat16` around a model whose forward takes `keys`."""

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """Logits, with the draws that `keys` name."""
        return self._logits(x, keys=keys)
