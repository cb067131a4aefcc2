"""What the measures share: keys, passes over many variants of images, checks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from feint.core import random
from feint.core.checks import check_images, check_keys, check_labels
from feint.core.errors import DeviceError, RangeError
from feint.core.gradients import Model, call

__all__ = ["check", "logits_of", "predict_variants", "sample_keys"]


def sample_keys(seed: int | Tensor, x: Tensor) -> Tensor:
    """Keys (B,) from an integer seed (samples numbered by position) or from keys as given."""
    if isinstance(seed, Tensor):
        check_keys(seed, len(x))
        return seed.to(x.device)
    return random.keys(seed, torch.arange(len(x), device=x.device))


def check(x: Tensor, y: Tensor | None = None, batch_size: int = 1) -> None:
    """Require images, labels and a batch size that can mean something.

    Raises:
        ShapeError, DtypeError, RangeError, DeviceError: Otherwise; also for a batch of no image.
    """
    check_images(x)
    if len(x) == 0:
        raise RangeError("x has no image; expected at least one")
    if y is not None:
        check_labels(y, len(x))
        if y.device != x.device:
            raise DeviceError(f"y is on {y.device}, x on {x.device}; move one of them")
    if batch_size < 1:
        raise RangeError(f"batch_size is {batch_size}; expected at least 1")


@torch.no_grad()
def logits_of(model: Model, x: Tensor, keys: Tensor, batch_size: int) -> Tensor:
    """Logits (B, K), `batch_size` images at a time."""
    starts = range(0, len(x), batch_size)
    rows = (slice(i, i + batch_size) for i in starts)
    return torch.cat([call(model, x[at], keys[at]) for at in rows])


@torch.no_grad()
def predict_variants(
    model: Model,
    x: Tensor,
    keys: Tensor,
    count: int,
    make: Callable[[Tensor, Tensor], Tensor],
    batch_size: int,
) -> Tensor:
    """Predicted classes of `count` variants of every image, (B, count) int64.

    Every variant of an image sees that image's own key: with a random model all of them meet the
    same draw, so that a change of label is the variant's doing and not chance's.

    Args:
        model: Gives logits.
        x: Images, (B, C, H, W).
        keys: (B,).
        count: Variants per image.
        make: `(images, number)` to variants: images (n, C, H, W) and variant numbers (n,).
        batch_size: Variants per forward pass.
    """
    found = []
    for start in range(0, len(x) * count, batch_size):
        flat = torch.arange(start, min(start + batch_size, len(x) * count), device=x.device)
        row, number = flat // count, flat % count
        found.append(call(model, make(x[row], number), keys[row]).argmax(1))
    return torch.cat(found).view(len(x), count)
