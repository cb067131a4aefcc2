"""Take over what runs beside this one hold already.

An address says model, data, attack, judge, versions and draws, so that equal addresses hold equal
bytes, whichever run made them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

from feint.core.errors import DataError
from feint.store.cache import examples_path, load_examples, load_rows, rows_path
from feint.store.files import write_atomic
from feint.store.record import Record
from feint.store.resolver import Planned
from feint.store.spec import RunSpec

__all__ = ["take_over"]


def take_over(
    record: Record, spec: RunSpec, plan: Sequence[Planned], samples: int, beside: Iterable[Path]
) -> None:
    """Link files of other runs that are whole: they hold what this run would make itself.

    What a unit took there counts here, too.

    Args:
        record: Of the run that takes over; its directory exists.
        spec: Of the same run.
        plan: Its cells with their addresses.
        samples: How many samples it has.
        beside: Directories of other runs, of any spec.
    """
    directory, count = record.directory, -(-samples // spec.shard_size)
    for other in map(Path, beside):
        times = _times(other)
        for planned, shard in product(plan, range(count)):
            images, rows = (planned.examples, shard), (planned.key, shard)
            if not examples_path(other, *images).exists():
                continue
            try:
                _, label = load_examples(other, *images)
                _link(examples_path(other, *images), examples_path(directory, *images))
                _, judged = load_rows(other, *rows)
                _, own = load_examples(directory, *images)
            except DataError:
                continue  # what is damaged or not there is made anew
            if judged.facts["examples"] == label.sha256 == own.sha256:
                _link(rows_path(other, *rows), rows_path(directory, *rows))
                if rows in times:
                    record.timed(*rows, times[rows])


def _times(directory: Path) -> dict[tuple[str, int], float]:
    """Seconds that a run's units took; none if its record cannot be read."""
    try:
        found = Record.read(directory)
    except DataError:
        found = None
    units = {} if found is None else found.info["timing"]["units"]
    return {(k, n): t for k, row in units.items() for n, t in enumerate(row) if t is not None}


def _link(there: Path, here: Path) -> None:
    """The same file in another folder, unless there is one."""
    if here.exists():
        return
    here.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(there, here)
    except OSError:  # another disk, or one without links
        write_atomic(here, there.read_bytes())
