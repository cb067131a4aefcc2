"""Weights of a module: read from safetensors, filled in strictly, or drawn fresh from keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from feint.core import random
from feint.core.errors import ConfigError, DataError, ModelError

__all__ = ["Initialisation", "fill", "initialise", "read_safetensors"]

Initialisation = Literal["he", "xavier"]


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        DataError: The file is missing or damaged.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; expected a safetensors checkpoint")
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is truncated or no safetensors file ({error})") from None


def fill(model: nn.Module, state: Mapping[str, Tensor], path: str, what: str) -> nn.Module:
    """Load weights strictly: every name, every shape; numbers are converted to the model's dtype.

    Args:
        model: Its parameters and buffers are overwritten.
        state: Tensors by name.
        path: Where they come from, for messages.
        what: What the model is, for messages.

    Raises:
        ConfigError: Weights of another architecture; the first of each kind of difference is named.
        ModelError: A weight is NaN or infinite.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    extra = [name for name in state if name not in own]
    other = [n for n in own if n in state and own[n].shape != state[n].shape]
    if missing or extra or other:
        said = []
        if missing:
            said.append(f"{len(missing)} weights missing, first {missing[0]!r}")
        if extra:
            said.append(f"{len(extra)} unexpected, first {extra[0]!r}")
        if other:
            name = other[0]
            shapes = f"{tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
            said.append(f"{len(other)} of another shape, first {name!r}: {shapes}")
        raise ConfigError(
            f"{path} is a checkpoint for another architecture than {what}: {'; '.join(said)}; "
            "give the architecture it was trained with"
        )
    bad = [n for n, v in state.items() if v.is_floating_point() and not bool(v.isfinite().all())]
    if bad:
        raise ModelError(f"{path} has NaN or infinite weights, first {bad[0]!r}; train it anew")
    model.load_state_dict(dict(state))
    return model


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
