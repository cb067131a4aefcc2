"""Build a classifier by architecture, with or without an ACE module in front."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from feint.core.errors import UnknownNameError
from feint.core.weights import Initialisation, initialise
from feint.defenses.ace import ACE
from feint.models.architectures import ARCHITECTURES
from feint.models.normalized import Normalized

__all__ = ["Initialisation", "build", "initialise"]


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
