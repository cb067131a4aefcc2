"""Where samples come from, and where finished units are kept while a process lives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from feint.core.errors import ConfigError
from feint.evaluation.attackers import Attacked
from feint.evaluation.fingerprint import tensor_digest
from feint.evaluation.shard import Batch, Rows

__all__ = ["Cache", "Memory", "Samples", "TensorSamples"]


class Samples(Protocol):
    """Where samples come from: anything with a length, a content address, and reading by range."""

    @property
    def fingerprint(self) -> str:
        """Content address of the selected samples, in order."""
        ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Batch:
        """Samples `start … stop−1` of the selection."""
        ...


@dataclass(frozen=True)
class TensorSamples:
    """Samples held in memory.

    Args:
        batch: All of them.
        fingerprint: Content address; by default the SHA-256 of images, labels, indices and targets.

    Raises:
        ConfigError: If an index is there twice: two samples would share their draws.
    """

    batch: Batch
    fingerprint: str = ""

    def __post_init__(self) -> None:
        b = self.batch
        if len(b.index.unique()) < len(b):
            raise ConfigError(
                "the same index is there twice; each sample's draws are keyed by its index, so "
                "give every sample its own"
            )
        if not self.fingerprint:
            address = tensor_digest(b.x, b.y, b.index, b.target)
            object.__setattr__(self, "fingerprint", address)

    def __len__(self) -> int:
        return len(self.batch)

    def read(self, start: int, stop: int) -> Batch:
        """A slice."""
        return self.batch.select(slice(start, stop))


class Cache(Protocol):
    """Where units are kept; `store` has one on disk."""

    def examples(self, key: str, shard: int) -> Attacked | None:
        """Adversarial examples of a unit, if they are there and whole."""
        ...

    def keep_examples(self, key: str, shard: int, found: Attacked) -> None:
        """Keep them."""
        ...

    def rows(self, key: str, shard: int) -> Rows | None:
        """Judged rows of a unit, if they are there and whole."""
        ...

    def keep_rows(self, key: str, shard: int, rows: Rows) -> None:
        """Keep them."""
        ...


@dataclass
class Memory:
    """A cache that lives as long as the process, for one size of shards."""

    shard_size: int | None = None
    _examples: dict[tuple[str, int], Attacked] = field(default_factory=dict)
    _rows: dict[tuple[str, int], Rows] = field(default_factory=dict)

    def begin(self, shard_size: int) -> None:
        """Forget everything if shards had another size: their numbers meant other samples."""
        if self.shard_size not in (None, shard_size):
            self._examples.clear()
            self._rows.clear()
        self.shard_size = shard_size

    def examples(self, key: str, shard: int) -> Attacked | None:
        """See `Cache`."""
        return self._examples.get((key, shard))

    def keep_examples(self, key: str, shard: int, found: Attacked) -> None:
        """See `Cache`."""
        self._examples[key, shard] = found

    def rows(self, key: str, shard: int) -> Rows | None:
        """See `Cache`."""
        return self._rows.get((key, shard))

    def keep_rows(self, key: str, shard: int, rows: Rows) -> None:
        """See `Cache`."""
        self._rows[key, shard] = rows
