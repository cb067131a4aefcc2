"""Batch augmentation whose every choice is keyed by sample and epoch."""

from __future__ import annotations

import torch
from torch import Tensor

from feint.core import random

__all__ = ["crop_and_flip", "cut_and_flip"]


def crop_and_flip(x: Tensor, keys: Tensor, pad: int = 4) -> Tensor:
    """Random crop after reflect-padding by `pad`, then a random horizontal flip.

    Args:
        x: (B, C, H, W), any dtype.
        keys: (B,) int64.
        pad: Pixels on each side.

    Returns:
        Same shape and dtype as `x`.
    """
    height, width = x.shape[-2:]
    offset = random.integers(keys, 0, 2 * pad + 1, (2,)) - pad
    rows = _reflect(torch.arange(height) + offset[:, :1], height)
    columns = torch.arange(width).expand(len(x), -1)
    columns = torch.where(_flipped(keys), columns.flip(1), columns)
    return _picked(x, rows, _reflect(columns + offset[:, 1:], width))


def cut_and_flip(x: Tensor, keys: Tensor, side: int) -> Tensor:
    """A random square of the image, then a random horizontal flip.

    Args:
        x: (B, C, H, W), any dtype.
        keys: (B,) int64.
        side: Of the square, in pixels; at most H and W.

    Returns:
        (B, C, side, side), dtype of `x`.
    """
    height, width = x.shape[-2:]
    top = random.integers(random.fold(keys, "top"), 0, height - side + 1)
    left = random.integers(random.fold(keys, "left"), 0, width - side + 1)
    steps = torch.arange(side)
    along = torch.where(_flipped(keys), steps.flip(0), steps)
    return _picked(x, top[:, None] + steps, left[:, None] + along)


def _flipped(keys: Tensor) -> Tensor:
    return random.integers(random.fold(keys, "flip"), 0, 2).bool()[:, None]


def _picked(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Each image's own rows and columns, (B, h) and (B, w)."""
    picked = torch.arange(len(x))[:, None, None]
    # Advanced indices around the channel slice put the channels last.
    return x[picked, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _reflect(position: Tensor, size: int) -> Tensor:
    position = position.abs()
    return torch.where(position >= size, 2 * (size - 1) - position, position)
