"""Build a classifier by architecture, with or without an ACE module in front."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from feint.core import random
from feint.core.errors import UnknownNameError
from feint.defenses.ace import ACE
from feint.models.architectures import ARCHITECTURES
from feint.models.normalized import Normalized

__all__ = ["build", "initialise"]


def build(architecture: str, ace: float | None = None, classes: int = 10) -> Normalized:
    """A classifier on images in [0, 1].

    Args:
        architecture: A name of `ARCHITECTURES`.
        ace: λ of an ACE module between the normalisation and the network (S0 §4.1), or none.
        classes: Number of logits.

    Returns:
        Names of its weights: `net.…`, or with ACE `net.ace.…` and `net.network.…`. The weights mean
        nothing yet; see `initialise`.

    Raises:
        UnknownNameError: No such architecture.
        RangeError: λ is negative.

    Example:
        >>> build("resnet20", ace=100.0)(torch.rand(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    if architecture not in ARCHITECTURES:
        raise UnknownNameError("architecture", architecture, ARCHITECTURES)
    with torch.random.fork_rng(devices=[]):  # torch's own initialisation leaves no trace
        network = ARCHITECTURES[architecture](classes)
        if ace is None:
            return Normalized(network)
        return Normalized(nn.Sequential(OrderedDict(ace=ACE(lam=ace), network=network)))


def initialise(model: nn.Module, seed: int) -> None:
    """Draw fresh weights, keyed by seed and parameter name: He-normal, zero biases.

    Batch normalisation starts as the identity. The draw does not depend on the order in which the
    modules were made, nor on torch's global state.
    """
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                key = random.fold(random.keys(seed, 1), name)
                parameter.copy_(random.normal(key, parameter.shape)[0] * (2 / fan_in) ** 0.5)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.fill_(1.0)
