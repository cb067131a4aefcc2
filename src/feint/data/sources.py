"""Where the pixels come from: an array in memory, or files that are decoded when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from feint.data.images import image_size, read_image

__all__ = ["ArraySource", "FileSource", "Source"]


class Source(Protocol):
    """Where the pixels come from."""

    def image(self, position: int) -> Tensor:
        """The image at a position, uint8 (3, H, W)."""
        ...

    def size(self, position: int) -> tuple[int, int]:
        """Its height and width, without decoding it where that can be helped."""
        ...

    def where(self, position: int) -> str:
        """What an error message calls it: file, row."""
        ...


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images in memory: (N, 3, H, W) uint8."""

    pixels: Tensor
    name: str

    def image(self, position: int) -> Tensor:
        """One row of the array."""
        return self.pixels[position]

    def size(self, position: int) -> tuple[int, int]:
        """The size that all rows share."""
        return self.pixels.shape[2], self.pixels.shape[3]

    def where(self, position: int) -> str:
        """Array and row."""
        return f"{self.name}[{position}]"


@dataclass(frozen=True, eq=False)
class FileSource:
    """Images in files, with the name by which a message calls each."""

    paths: Sequence[Path]
    names: Sequence[str]

    def image(self, position: int) -> Tensor:
        """The decoded file."""
        return read_image(self.paths[position], name=self.names[position])

    def size(self, position: int) -> tuple[int, int]:
        """Size from the file's header."""
        return image_size(self.paths[position], name=self.names[position])

    def where(self, position: int) -> str:
        """The file, with its row if it comes from a list."""
        return self.names[position]
