"""A classifier with a fixed module in front, as one model: what a gray-box attacker has of ACE."""

from __future__ import annotations

from torch import Tensor, nn

from feint.core import random
from feint.core.gradients import call, is_stochastic
from feint.defenses.base import Defense

__all__ = ["Fronted"]


class Fronted(nn.Module):
    """`net(front(x))`: a defense that counts as part of the model.

    S0 and S4 attack a classifier that contains ACE or PRM and judge it behind a shift: the model is
    `ace(form='unet') | torchvision:resnet50`, the defense `pixel_shift`.

    Args:
        front: A defense.
        net: A classifier on images.

    Convention:
        The front sees images at the size that the classifier takes: a size that `net` declares is
        this model's, too, and `feint.models.load` resizes in front of both.

    Cost: That of both.

    Example:
        >>> import torch
        >>> from feint.defenses import parse
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
        >>> Fronted(parse("bit_depth(bits=3)"), net)(torch.rand(1, 3, 2, 2)).shape
        torch.Size([1, 2])
    """

    def __init__(self, front: Defense, net: nn.Module) -> None:
        super().__init__()
        self.front, self.net = front, net

    @property
    def stochastic(self) -> bool:
        """Whether the front or the network declares itself random."""
        return self.front.stochastic or is_stochastic(self.net)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """Logits of images in [0, 1]."""
        own = None if keys is None else random.fold(keys, "front")
        # nn.Module's own call: hooks fire, the checks of the public door are not repeated.
        x = nn.Module.__call__(self.front, x, own)
        return call(self.net, x, None if keys is None else random.fold(keys, "net"))
