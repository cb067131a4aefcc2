"""Local processes that take units; one that is killed loses its unit, which is tried once more."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from feint.core import errors
from feint.core.errors import FeintError
from feint.store.memory import hold_on_to_memory
from feint.store.resolver import Unit

__all__ = ["work"]

logger = logging.getLogger(__name__)

OnKept = Callable[[Unit, float], None]
Group = list[Unit]


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    group: Group | None = None


def work(
    spec: str, directory: Path, groups: Sequence[Group], workers: int, on_kept: OnKept
) -> None:
    """Have `workers` processes of one thread each compute groups of units, in any order.

    Args:
        spec: The run's spec as JSON.
        directory: The prepared run.
        groups: Units that one process does one after the other.
        workers: How many processes.
        on_kept: Called with (unit, seconds) in this process when a unit is on disk.

    Raises:
        FeintError: A unit raised it, or its process was killed twice.
    """
    waiting, strikes = deque(groups), {id(group): 0 for group in groups}
    team: list[_Worker] = []
    try:
        while waiting or any(w.group for w in team):
            while waiting and len(team) < workers:
                team.append(_start(spec, directory))
            for worker in team:
                if worker.group is None and waiting:
                    worker.group = waiting.popleft()
                    with suppress(OSError):  # it is dead already: noticed below
                        worker.pipe.send([tuple(unit) for unit in worker.group])
            for pipe in wait([w.pipe for w in team]):
                worker = next(w for w in team if w.pipe is pipe)
                try:
                    message = worker.pipe.recv()
                except (EOFError, OSError):
                    team.remove(worker)
                    _lost(worker, waiting, strikes)
                    continue
                _heard(worker, message, on_kept)
    finally:
        for worker in team:
            worker.pipe.close()
            worker.process.terminate()
        for worker in team:
            worker.process.join()


def _start(spec: str, directory: Path) -> _Worker:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, spec, str(directory)), daemon=True)
    process.start()
    there.close()
    return _Worker(process, here)


def _lost(worker: _Worker, waiting: deque[Group], strikes: dict[int, int]) -> None:
    """Put a dead worker's group back, once."""
    worker.pipe.close()
    worker.process.join()
    code = worker.process.exitcode or 0
    how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
    if worker.group is None:
        return
    name = f"{worker.group[0].cell}-{worker.group[0].shard:05d}"
    strikes[id(worker.group)] += 1
    if strikes[id(worker.group)] > 1:
        raise FeintError(
            f"a worker {how} on unit {name}, for the second time; it may need more memory than "
            "there is: lower the batch size or the number of workers, and run the same command "
            "again (finished units are kept)"
        )
    logger.warning("a worker %s on unit %s; the unit is tried once more", how, name)
    waiting.appendleft(worker.group)


def _heard(worker: _Worker, message: Sequence[Any], on_kept: OnKept) -> None:
    kind, *rest = message
    if kind == "kept":
        unit, seconds = rest
        on_kept(Unit(*unit), seconds)
    elif kind == "free":
        worker.group = None
    else:
        name, text, trace = rest
        found = getattr(errors, name, None)
        if found is errors.UnknownNameError:
            found = errors.ConfigError
        if isinstance(found, type) and issubclass(found, FeintError):
            raise found(text)
        raise RuntimeError(f"a worker failed with {name}: {text}\n{trace}")


def _serve(pipe: Connection, spec: str, directory: str) -> None:
    """A worker's life: units in, words out, until the other end is gone."""
    from feint.store.runner import run_unit  # it imports this module
    from feint.store.spec import RunSpec

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    torch.set_num_threads(1)
    hold_on_to_memory()
    run = RunSpec.model_validate_json(spec)
    try:
        while True:
            for unit in pipe.recv():
                begun = time.perf_counter()
                run_unit(run, directory, unit)
                pipe.send(("kept", tuple(unit), time.perf_counter() - begun))
            pipe.send(("free",))
    except (EOFError, BrokenPipeError):
        os._exit(0)
    except BaseException as error:  # told to the parent, whatever it is
        pipe.send(("error", type(error).__name__, str(error), traceback.format_exc()))
