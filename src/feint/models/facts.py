"""What a model is, as far as it can be seen: size, classes, input size, a fingerprint, a check."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.checks import check_images
from feint.core.errors import ModelError
from feint.core.gradients import call, is_stochastic
from feint.models.resized import Resized

__all__ = ["check_model", "class_count", "declared_size", "describe", "fingerprint"]


def declared_size(model: nn.Module) -> tuple[int, int] | None:
    """The input size that a model declares, (height, width), or None.

    Read from the attribute `input_size` (a side, (H, W) or (C, H, W)), or from timm's `default_cfg`
    and `pretrained_cfg`. A model without any is taken to accept every size.
    """
    if isinstance(model, Resized):
        return model.size
    found = getattr(model, "input_size", None)
    for attribute in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, attribute, None)
        if found is None and isinstance(config, dict):
            found = config.get("input_size")
    if isinstance(found, int):
        found = (found, found)
    if isinstance(found, tuple | list) and len(found) in (2, 3):
        height, width = found[-2:]
        if isinstance(height, int) and isinstance(width, int) and min(height, width) > 0:
            return height, width
    return None


def class_count(model: nn.Module) -> int | None:
    """The number of classes, from `num_classes` or the last linear layer, or None."""
    declared = getattr(model, "num_classes", None)
    if isinstance(declared, int) and declared > 0:
        return declared
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return linear[-1].out_features if linear else None


def describe(model: nn.Module) -> dict[str, Any]:
    """What can be said of a model without running it.

    Returns:
        `type`, `parameters` (a count), `classes` and `input_size` (None where they cannot be
        inferred), `stochastic` (as declared), `training` (whether it is in training mode).

    Example:
        >>> describe(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)))["parameters"]
        26
    """
    size = declared_size(model)
    inner = model
    while isinstance(inner, Resized):
        inner = inner.net
    return {
        "type": type(inner).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "classes": class_count(model),
        "input_size": None if size is None else list(size),
        "stochastic": is_stochastic(model),
        "training": model.training,
    }


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of what a model is made of: its printed structure, parameters and buffers.

    Buffers that are not saved (mean and standard deviation) count too. Code in a `forward` that no
    weight or printed option reflects does not.
    """
    digest = hashlib.sha256(repr(model).encode())
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in sorted(named):
        value = named[name].detach().cpu().contiguous()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def check_model(model: nn.Module, x: Tensor) -> Tensor:
    """One forward pass that shows whether the model keeps the contract; its logits.

    Args:
        model: Maps images in [0, 1] to logits.
        x: A few of the images that it will see, on its device.

    Returns:
        Logits (B, K).

    Raises:
        ShapeError, DtypeError, RangeError: `x` is no batch of images.
        ModelError: The model is in training mode, fails on these images, or its output is not
            (B, K) finite logits with K ≥ 2.
    """
    check_images(x)
    if model.training:
        raise ModelError("the model is in training mode; call model.eval() first")
    try:
        logits = call(model, x, random.keys(0, len(x)).to(x.device))
    except ModelError:
        raise
    except Exception as error:  # whatever a user's module raises on an input it was not made for
        size = declared_size(model)
        raise ModelError(
            f"the model fails on images {tuple(x.shape)}: {type(error).__name__}: {error}; "
            + ("give its input size (--input-size SIDE)" if size is None else f"it takes {size}")
        ) from error
    if logits.shape[1] < 2:
        raise ModelError(f"the model gives {logits.shape[1]} class; expected at least 2 logits")
    bad = int((~logits.isfinite()).any(1).sum())
    if bad:
        raise ModelError(f"the model gives NaN or infinite logits for {bad} of {len(x)} images")
    return logits
