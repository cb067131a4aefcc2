"""A dataset: 8-bit RGB images, decoded when asked for, each known by its index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from feint.core import random
from feint.core.errors import DataError, RangeError, ShapeError
from feint.core.quantise import from_uint8
from feint.data.resize import Resize
from feint.data.sources import ArraySource, Source

__all__ = ["Batch", "Dataset"]

_CHUNK = 64  # images hashed at a time


class Batch(NamedTuple):
    """Some samples of a dataset."""

    x: Tensor
    """(B, 3, H, W) float32 in [0, 1]: the 8-bit values over 255."""
    y: Tensor
    """(B,) int64 labels."""
    target: Tensor | None
    """(B,) int64 target classes, if the dataset names them."""
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index, which nobody needs here
    """(B,) int64: what the samples are called, and what their random draws hang on."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images of one size, in a fixed order; made by `feint.data.load`.

    Attributes:
        name: The spec it was loaded by.
        source: Where the pixels come from.
        positions: (N,) places in the source.
        index: (N,) int64: each sample's identity. Random draws are keyed by it.
        labels: (N,) int64.
        targets: (N,) int64 target classes, or None.
        classes: Names of the classes, if known.
        resize: How the images are resized, if they are.
        available: How many samples the source has in all.

    Raises:
        ShapeError: The images differ in size and no resize was given.
        DataError: There is no image, or a header cannot be read.
    """

    name: str
    source: Source
    positions: tuple[int, ...]
    index: Tensor
    labels: Tensor
    targets: Tensor | None = None
    classes: tuple[str, ...] | None = None
    resize: Resize | None = None
    available: int = 0

    def __post_init__(self) -> None:
        if not self.positions:
            raise DataError(f"{self.name} holds no image; expected at least one")
        if not self.available:
            object.__setattr__(self, "available", len(self.positions))
        if self.classes is not None:
            self.check_classes(len(self.classes))

    def __len__(self) -> int:
        return len(self.positions)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(3, H, W), the same for every sample."""
        if self.resize is not None:
            return 3, self.resize.side, self.resize.side
        if isinstance(self.source, ArraySource):
            return 3, *self.source.size(0)
        first = self.source.size(self.positions[0])
        for position in self.positions[1:]:
            size = self.source.size(position)
            if size != first:
                raise ShapeError(
                    f"{self.source.where(self.positions[0])} has {first[0]}×{first[1]} pixels, "
                    f"{self.source.where(position)} {size[0]}×{size[1]}; expected one size; "
                    "give resize=SIDE (--resize SIDE)"
                )
        return 3, *first

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what the samples are: pixels, labels, targets and indices, in order.

        The same images from a folder, a list or an array have the same fingerprint. Every image is
        decoded once for it, so a damaged file is found here and not in the middle of a run.
        """
        head = {"format": 1, "samples": len(self), "shape": self.shape}
        digest = hashlib.sha256(json.dumps(head).encode())
        columns = [self.index, self.labels] + ([] if self.targets is None else [self.targets])
        digest.update(torch.stack(columns, 1).numpy().astype("<i8").tobytes())
        for start in range(0, len(self), _CHUNK):
            part = self._many(range(start, min(start + _CHUNK, len(self))))
            digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def where(self, place: int) -> str:
        """What to call a sample in a message: its file, with the row of the list."""
        return self.source.where(self.positions[place])

    def images(self) -> Tensor:
        """All images at once, uint8 (N, 3, H, W): for training, or if they fit in memory."""
        return self._many(range(len(self)))

    def batches(self, size: int) -> Iterator[Batch]:
        """The samples in order, `size` at a time; the last batch may be smaller.

        Raises:
            RangeError: `size` is below 1.
            DataError: An image cannot be decoded.
        """
        if size < 1:
            raise RangeError(f"batch size is {size}; expected at least 1")
        for start in range(0, len(self), size):
            places = range(start, min(start + size, len(self)))
            part = slice(start, places.stop)
            yield Batch(
                from_uint8(self._many(places)),
                self.labels[part],
                None if self.targets is None else self.targets[part],
                self.index[part],
            )

    def subset(self, places: Sequence[int]) -> Dataset:
        """Some of the samples by their places in this dataset, in the order given."""
        wanted = torch.as_tensor(places, dtype=torch.int64)
        return replace(
            self,
            positions=tuple(self.positions[place] for place in places),
            index=self.index[wanted],
            labels=self.labels[wanted],
            targets=None if self.targets is None else self.targets[wanted],
        )

    def take(self, samples: int) -> Dataset:
        """The `samples` first samples in the order of a keyed hash of their indices.

        The order depends on nothing but the indices, so it is the same on every machine, the first
        100 are the first 100 of the first 200, and it is a simple random sample of the source.

        Raises:
            RangeError: Fewer than 1, or more than there are.
        """
        if not 1 <= samples <= len(self):
            raise RangeError(f"samples is {samples}; expected 1 to {len(self)}, all of {self.name}")
        words = random.words(random.fold(random.keys(0, self.index), "samples"), 2)
        rank = (words[:, 0] << 31) | (words[:, 1] >> 1)
        return self.subset(rank.argsort(stable=True)[:samples].tolist())

    def with_random_targets(self) -> Dataset:
        """The same samples, each with a target class drawn uniformly from all but its own.

        The draw depends on the sample's index alone. There are as many classes as the dataset
        names, or else as many as its largest label tells.

        Raises:
            DataError: There are fewer than two classes.
        """
        count = len(self.classes) if self.classes else int(self.labels.max()) + 1
        if count < 2:
            raise DataError(f"{self.name} has {count} class; a target needs another one")
        keys = random.fold(random.keys(0, self.index), "targets")
        return replace(
            self, targets=(self.labels + random.integers(keys, 1, count)).remainder(count)
        )

    def check_classes(self, count: int) -> None:
        """Require every label and target to be below `count`, the number of the model's logits.

        Raises:
            DataError: Names the first sample that breaks it.
        """
        for kind, values in (("label", self.labels), ("target", self.targets)):
            if values is None:
                continue
            wrong = ((values < 0) | (values >= count)).nonzero()
            if len(wrong):
                place = int(wrong[0])
                raise DataError(
                    f"{self.where(place)} has {kind} {int(values[place])}; expected 0 to "
                    f"{count - 1}, for {count} classes ({len(wrong)} such samples); give a model "
                    "for these classes, or correct the labels"
                )

    def _many(self, places: range) -> Tensor:
        if isinstance(self.source, ArraySource) and self.resize is None:
            return self.source.pixels[torch.tensor(self.positions[places.start : places.stop])]
        return torch.stack([self._image(place) for place in places])

    def _image(self, place: int) -> Tensor:
        position = self.positions[place]
        image = self.source.image(position)
        if self.resize is not None:
            image = self.resize(image)
        if tuple(image.shape) != self.shape:
            raise ShapeError(
                f"{self.source.where(position)} decodes to {tuple(image.shape)}, its header says "
                f"{self.shape}; give resize=SIDE (--resize SIDE), or save the file anew"
            )
        return image

    def __str__(self) -> str:
        channels, height, width = self.shape
        chosen = f" of {self.available}" if self.available != len(self) else ""
        text = f"{self.name}: {len(self)}{chosen} images, {channels}×{height}×{width}"
        return text if self.resize is None else f"{text}, {self.resize}"
