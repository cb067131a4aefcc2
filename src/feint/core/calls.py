"""Asking a model: with keys if it takes them, and nothing but logits for an answer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from feint.core.errors import ModelError
from feint.core.pieces import keep_freed_memory

__all__ = ["Model", "call", "is_stochastic", "takes_keys"]

Model = Callable[..., Tensor]
"""Anything that maps images (B, C, H, W) to logits (B, K); with `keys=` if it is stochastic."""


def is_stochastic(model: object) -> bool:
    """What the model declares: its attribute `stochastic`, false if it has none."""
    return bool(getattr(model, "stochastic", False))


@lru_cache(maxsize=256)
def _type_takes_keys(function: object) -> bool:
    try:
        return "keys" in inspect.signature(function).parameters  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


def takes_keys(model: Model) -> bool:
    """Whether the model's forward has a parameter `keys`."""
    target = type(model).forward if isinstance(model, nn.Module) else model
    try:
        return _type_takes_keys(target)
    except TypeError:  # unhashable callable
        return "keys" in inspect.signature(target).parameters


def call(model: Model, x: Tensor, keys: Tensor | None = None) -> Tensor:
    """Logits of `x`, with keys if the model takes them.

    Raises:
        ModelError: If the logits are not (B, K).
    """
    keep_freed_memory()
    logits = model(x, keys=keys) if takes_keys(model) else model(x)
    if isinstance(logits, Tensor) and logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"the model gave {got} for a batch of {len(x)}; expected logits ({len(x)}, classes)"
        )
    return logits
