"""Run a spec in a directory, or go on where it was left."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import torch

from feint.core.errors import ConfigError, DataError
from feint.evaluation import CellResult, Evaluation, Finding, execute, finish
from feint.evaluation.asked import chosen
from feint.evaluation.cell import digest
from feint.evaluation.loop import OnProgress, Progress, compute_unit
from feint.evaluation.verdict import Verdict, bounds, conclude
from feint.store import environment
from feint.store.beside import take_over
from feint.store.cache import DiskCache, load_rows
from feint.store.files import claim, read_json, write_json
from feint.store.record import Record
from feint.store.resolver import Planned, Resolver, Unit, shards
from feint.store.spec import SCHEMA, RunSpec
from feint.store.workers import work

__all__ = ["prepare", "resume", "run", "run_unit", "units"]

logger = logging.getLogger(__name__)


def run(
    spec: RunSpec,
    directory: str | Path,
    *,
    resume: bool = True,
    checked: bool = True,
    beside: Iterable[Path] = (),
    on_progress: OnProgress | None = None,
    command: Sequence[str] = (),
) -> Evaluation:
    """Run a spec in a directory; units that are there and whole are not computed again.

    Convention:
        The directory holds `run.json`, `samples/*.parquet` (rows), `examples/*.safetensors`,
        `findings.json` and `result.json`. Every file is written atomically and carries a checksum.
        A run that was killed and resumed ends with the rows, examples, findings and result of an
        uninterrupted one, byte for byte; only `run.json` (times, sessions, notes) differs.

    Args:
        spec: What to compute.
        directory: Made if it is not there. One process at a time.
        resume: Go on with a run that is there; otherwise it is an error.
        checked: Have the evaluation check itself. Without, for tests of everything else, the
            verdict is withheld, and neither findings nor result are written.
        beside: Directories of other runs: adversarial examples and rows that they hold under the
            addresses that this run would give its own are linked, if whole, instead of made again.
        on_progress: Called around every unit.
        command: What the user typed, kept for the report.

    Returns:
        The evaluation; `seconds` counts all sessions.

    Raises:
        ConfigError: The directory holds another run, or what the specs name has changed.
        DataError: The directory cannot be written, is in use, is no run's, or its `run.json` is
            damaged. A damaged or missing unit is no error: it is logged, noted and recomputed.
        FeintError: Whatever the specs, models and attacks raise. The run can be resumed then, as
            after Ctrl-C.

    Cost: as `feint.evaluation.evaluate`; on resuming, one reading of every file.
    """
    directory, begun = Path(directory), time.perf_counter()
    with claim(directory), _threads(spec.threads):
        record = _existing(directory, spec, resume)
        resolver = Resolver(spec)
        plan = resolver.plan()
        if record is None:
            record = Record.start(directory, spec, plan, resolver)
        record.check_plan(plan)
        record.begin(spec, environment.describe(spec.device), command)
        take_over(record, spec, plan, len(resolver.samples), beside)
        try:
            result = _run(record, spec, plan, resolver, on_progress, begun, checked)
        except KeyboardInterrupt:
            record.end("interrupted", seconds=time.perf_counter() - begun)
            raise
        except BaseException as error:
            with suppress(DataError):  # a full disk must not hide what went wrong
                seconds = time.perf_counter() - begun
                record.end("error", f"{type(error).__name__}: {error}", seconds)
            raise
        seconds = result.seconds - record.info["timing"]["total"]
        record.end("done", seconds=seconds)
    return result


def resume(
    directory: str | Path,
    *,
    on_progress: OnProgress | None = None,
    command: Sequence[str] = (),
) -> Evaluation:
    """Go on with the run in a directory by the spec that it holds; see `run`.

    Raises:
        DataError: There is no run.
    """
    record = Record.read(Path(directory))
    if record is None:
        raise DataError(f"{directory} holds no run (there is no run.json); name a run's folder")
    spec = RunSpec(**record.info["spec"])
    object.__setattr__(spec, "_given", record.info["given"])
    return run(spec, directory, on_progress=on_progress, command=command)


def prepare(spec: RunSpec, directory: str | Path) -> list[Unit]:
    """Make a run's directory without computing anything, and list its units.

    For workers elsewhere: each takes units to `run_unit`; `run` then collects what they did,
    computes what is missing, and concludes.

    Raises:
        As `run`.
    """
    directory = Path(directory)
    with claim(directory):
        record = _existing(directory, spec, resume=True)
        resolver = Resolver(spec)
        plan = resolver.plan()
        if record is None:
            record = Record.start(directory, spec, plan, resolver)
        record.check_plan(plan)
        return _units(spec, plan, len(resolver.samples))


def units(spec: RunSpec) -> list[Unit]:
    """Every unit of work, (cell's address, shard, start, stop), in the order in which `run` goes.

    Units are independent of each other. Those of cells that share adversarial examples find them
    made if they come later, and make equal ones if they come at the same time.
    """
    resolver = Resolver(spec)
    return _units(spec, resolver.plan(), len(resolver.samples))


def run_unit(spec: RunSpec, directory: str | Path, unit: Unit | Sequence[object]) -> bool:
    """Compute one unit of a prepared run, in any process that sees the directory.

    Models and data are loaded once per process. The cell's address is worked out anew from what
    this process loads, so that a worker with another model or version is refused.

    Returns:
        Whether it was computed; it was there otherwise.

    Raises:
        ConfigError: The unit is not of this run, or what the specs name is something else here.
        DataError: There is no run, or it cannot be written.
    """
    directory, unit = Path(directory), Unit(*unit)  # type: ignore[arg-type]
    resolver = _resolver(spec.model_dump_json())
    record = Record.read(directory)
    if record is None:
        raise DataError(f"{directory} holds no run; prepare it first (feint.store.prepare)")
    keys = [cell["key"] for cell in record.info["cells"]]
    if unit.cell not in keys:
        raise ConfigError(f"{directory} has no cell {unit.cell}; take units from prepare(spec, …)")
    cell = spec.cells[keys.index(unit.cell)]
    planned = resolver.address(cell, record.info["data"]["fingerprint"])
    if planned.key != unit.cell:
        raise ConfigError(
            f"cell {unit.cell} is {planned.key} here: model, code or versions of this worker are "
            "not those that the run was prepared with"
        )
    cache = DiskCache(
        directory,
        {planned.key: planned.examples},
        record.info["data"]["samples"],
        spec.shard_size,
        spec.device,
    )
    if cache.rows(planned.key, unit.shard) is not None:
        return False
    result = CellResult(cell, planned.key, {}, planned.examples)
    batch = resolver.samples.read(unit.start, unit.stop)
    compute_unit(result, resolver(cell), batch, unit.shard, cache, spec.batch_size)
    return True


@lru_cache(maxsize=1)
def _resolver(spec: str) -> Resolver:
    return Resolver(RunSpec.model_validate_json(spec))


def _existing(directory: Path, spec: RunSpec, resume: bool) -> Record | None:
    """The record of a run that may go on; None for a new one."""
    record = Record.read(directory)
    if record is not None:
        if not resume:
            raise ConfigError(
                f"{directory} holds a run already; give another folder, or leave resume=False out"
            )
        if any(directory.glob("samples/*.parquet")):
            record.check_spec(spec)
            return record
        try:
            record.check_spec(spec)
        except ConfigError:
            return None  # nothing came of the other run: nothing is lost
        return record
    ours = {"samples", "examples", "findings.json", "result.json"}
    others = [p.name for p in directory.iterdir() if p.name[0] != "." and p.name not in ours]
    if others and not any((directory / name).exists() for name in ours):
        raise DataError(
            f"{directory} is not empty and holds no run ({sorted(others)[0]} is there); "
            "give a new or an empty folder"
        )
    return None


def _run(
    record: Record,
    spec: RunSpec,
    plan: Sequence[Planned],
    resolver: Resolver,
    on_progress: OnProgress | None,
    begun: float,
    checked: bool,
) -> Evaluation:
    def damaged(sentence: str) -> None:
        logger.warning("%s; it is computed again", sentence)
        record.note(f"{sentence}; it was computed again")

    cache = DiskCache(
        record.directory,
        {p.key: p.examples for p in plan},
        len(resolver.samples),
        spec.shard_size,
        spec.device,
        record.finished,
        record.computing,
        record.timed,
        damaged,
    )
    if spec.workers:
        _share_out(record, spec, plan, cache, on_progress)
    results = execute(
        spec.cells,
        resolver,
        resolver.samples,
        cache=cache,
        shard_size=spec.shard_size,
        batch_size=spec.batch_size,
        on_progress=None if spec.workers else on_progress,
    )
    for result in results:
        count = len(record.info["timing"]["units"][result.key])
        passes = [cache.passes(result.key, shard) for shard in range(count)]
        result.forwards, result.backwards = map(sum, zip(*passes, strict=True))
        result.seconds = sum(t or 0.0 for t in record.info["timing"]["units"][result.key])
    if not checked:
        seconds = record.info["timing"]["total"] + time.perf_counter() - begun
        text = "No verdict: this evaluation was told not to check itself."
        verdict = Verdict(text, "F", True, tuple(bounds(results)))
        return Evaluation(results, list(resolver.findings), verdict, seconds)
    return _conclude(record, spec, results, resolver, begun)


def _conclude(
    record: Record,
    spec: RunSpec,
    results: list[CellResult],
    resolver: Resolver,
    begun: float,
) -> Evaluation:
    """Findings and verdict; findings that belong to exactly these rows are not made again."""
    directory, earlier = record.directory, record.info["timing"]["total"]
    extra = [*resolver.findings, record.one_environment()]
    asked = [] if not chosen(spec.checks) else [chosen(spec.checks)]
    inputs = digest([_sums(directory, results), [f.as_dict() for f in extra], *asked])
    findings = _kept_findings(record, inputs)
    if findings is None:
        made = finish(
            results,
            resolver,
            resolver.samples,
            batch_size=spec.batch_size,
            seconds=0.0,
            extra=extra,
            checks=spec.checks,
        )
        findings = made.findings
        plain = [f.as_dict() for f in findings]
        write_json(
            directory / "findings.json", {"schema": SCHEMA, "inputs": inputs, "findings": plain}
        )
    seconds = earlier + time.perf_counter() - begun
    result = Evaluation(results, findings, conclude(results, findings), seconds)
    plain_result = {k: v for k, v in result.as_dict().items() if k != "seconds"}
    write_json(directory / "result.json", {"schema": SCHEMA, **plain_result})
    return result


def _sums(directory: Path, results: Sequence[CellResult]) -> list[list[str]]:
    """Checksums of all rows (which hold those of their examples), by cell."""
    found = []
    for result in results:
        shard, rows, sums = 0, 0, []
        while rows < len(result.rows["index"]):
            _, label = load_rows(directory, result.key, shard)
            sums.append(label.sha256)
            shard, rows = shard + 1, label.stop
        found.append(sums)
    return found


def _kept_findings(record: Record, inputs: str) -> list[Finding] | None:
    try:
        kept = read_json(record.directory / "findings.json")
    except DataError as error:
        logger.warning("%s; the findings are made again", error)
        record.note(f"{error}; the findings were made again")
        return None
    if kept is None or kept["inputs"] != inputs:
        return None
    return [Finding(**found) for found in kept["findings"]]


def _units(spec: RunSpec, plan: Sequence[Planned], samples: int) -> list[Unit]:
    keys = dict.fromkeys(p.key for p in plan)  # two texts of one cell are one cell
    return [unit for key in keys for unit in shards(key, samples, spec.shard_size)]


def _share_out(
    record: Record,
    spec: RunSpec,
    plan: Sequence[Planned],
    cache: DiskCache,
    on_progress: OnProgress | None,
) -> None:
    """Have local processes compute what is missing; units that share examples stay together."""
    samples = record.info["data"]["samples"]
    cells = {p.key: p.cell for p in reversed(plan)}
    examples = {p.key: p.examples for p in plan}
    position = {p.key: n for n, p in reversed(list(enumerate(plan)))}
    missing: dict[tuple[str, int], list[Unit]] = {}
    total, done = len(plan) * samples, 0
    times = Counter(p.key for p in plan)

    def tell(unit: Unit, cached: bool) -> None:
        nonlocal done
        done += (unit.stop - unit.start) * times[unit.cell]
        if on_progress:
            on_progress(
                Progress(cells[unit.cell], len(plan), position[unit.cell], done, total, cached)
            )

    for unit in _units(spec, plan, samples):
        if cache.rows(unit.cell, unit.shard) is None:
            missing.setdefault((examples[unit.cell], unit.shard), []).append(unit)
        else:
            tell(unit, cached=True)

    def kept(unit: Unit, seconds: float) -> None:
        record.timed(unit.cell, unit.shard, seconds)
        tell(unit, cached=False)

    work(spec.model_dump_json(), record.directory, list(missing.values()), spec.workers, kept)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Torch's threads, put back afterwards."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
