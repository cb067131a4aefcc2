"""Build a classifier by architecture, with or without an ACE module in front."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.errors import ConfigError, UnknownNameError
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


Initialisation = Literal["he", "xavier"]


def initialise(model: nn.Module, seed: int, scheme: Initialisation = "he") -> None:
    """Draw fresh weights, keyed by seed and parameter name.

    Batch normalisation starts as the identity. The draw does not depend on the order in which the
    modules were made, nor on torch's global state.

    Args:
        model: Its parameters are overwritten.
        seed: Any integer.
        scheme: `"he"` is He-normal with zero biases. `"xavier"` is that of S0's code: Xavier-normal
            convolutions and linear layers with zero biases, transposed convolutions uniform within
            ±1/√fan, as torch makes them. ACE starts a third as strong with it as with `"he"`.

    Raises:
        ConfigError: If the scheme is unknown.
    """
    if scheme not in get_args(Initialisation):
        raise ConfigError(f"initialisation is {scheme!r}; expected 'he' or 'xavier'")
    for path, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            key = random.fold(random.keys(seed, 1), f"{path}.{own}" if path else own)
            with torch.no_grad():
                if scheme == "xavier" and isinstance(module, nn.ConvTranspose2d):
                    bound = module.weight[0].numel() ** -0.5
                    parameter.copy_(random.uniform(key, parameter.shape, -bound, bound)[0])
                elif parameter.ndim > 1:
                    spread = _spread(parameter, scheme)
                    parameter.copy_(random.normal(key, parameter.shape)[0] * spread)
                else:
                    parameter.fill_(0.0 if own == "bias" else 1.0)


def _spread(weight: Tensor, scheme: str) -> float:
    """Standard deviation of a weight's fresh values."""
    fan_in = weight[0].numel()
    if scheme == "he":
        return (2 / fan_in) ** 0.5
    fan_out = weight.numel() // weight.shape[1]
    return (2 / (fan_in + fan_out)) ** 0.5
