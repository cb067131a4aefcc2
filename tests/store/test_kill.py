"""Kill −9 at random moments. Oracle: an uninterrupted run of the same spec, bit by bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from feint.core.errors import FeintError
from feint.store import RunSpec, open_run, run

Make = Callable[..., RunSpec]


def killed(spec: RunSpec, folder: Path, kills: int) -> None:
    (folder / "spec.json").write_text(json.dumps(spec.full))
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("zygote.py")),
            str(folder / "spec.json"),
            str(folder),
            str(kills),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["kills"] == kills
    runs = [open_run(directory) for directory in told["ended"]]
    assert len(runs) >= 2
    assert len({r.result_digest() for r in runs}) == 1
    # Writes are atomic: no kill ever left anything that had to be repaired.
    assert all(r.info["notes"] == [] for r in runs)
    assert sum(len(r.info["sessions"]) for r in runs[1:]) > 1
    assert not [p for r in runs for p in r.directory.rglob("*.partial")]


def test_three_kills_end_in_the_same_bits(make: Make, tmp_path: Path) -> None:
    killed(make(shard_size=1), tmp_path, 3)


@pytest.mark.slow
def test_ten_kills_end_in_the_same_bits(make: Make, tmp_path: Path) -> None:
    attacks = ("pgd(steps=3, gradient=eot(2))", "fgsm")
    spec = make(shard_size=2, undefended=True, scenarios=("gray-box", "white-box"), attacks=attacks)
    killed(spec, tmp_path, 10)


DEADLY = """
import multiprocessing, os, signal
from pathlib import Path
from torch import nn

def model():
    flag = Path(__file__).with_name("flag")
    if multiprocessing.parent_process() is not None and flag.exists():
        if flag.read_text() == "once":
            flag.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten()).eval()
"""


def deadly(bench: Path, folder: Path, flag: str, workers: int) -> RunSpec:
    (folder / "deadly.py").write_text(DEADLY)
    (folder / "flag").write_text(flag)
    cell = {"model": f"{folder}/deadly.py:model", "eps": "16/255"}
    return RunSpec(
        cells=[
            {"scenario": "none", **cell},
            {"scenario": "white-box", "attack": "pgd(steps=2)", **cell},
        ],
        data={"spec": f"{bench}/data.npz"},
        shard_size=5,
        workers=workers,
        threads=1,
    )


def test_a_worker_that_is_killed_is_replaced_and_workers_give_the_same_bits(
    bench: Path, tmp_path: Path
) -> None:
    spec = deadly(bench, tmp_path, "once", workers=1)
    done = []
    run(spec, tmp_path / "workers", on_progress=lambda p: done.append(p.done))
    assert not (tmp_path / "flag").exists()  # it did die
    assert done == sorted(done)
    assert done[-1] == 24
    run(spec.model_copy(update={"workers": 0}), tmp_path / "alone")
    found = [open_run(tmp_path / name).result_digest() for name in ("workers", "alone")]
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_worker_that_is_killed_twice_on_a_unit_is_an_error(bench: Path, tmp_path: Path) -> None:
    spec = deadly(bench, tmp_path, "always", workers=2)
    with pytest.raises(FeintError, match=f"killed by signal {signal.SIGKILL:d} .*second time"):
        run(spec, tmp_path / "run")
    assert open_run(tmp_path / "run", partial=True).status == "error"


@pytest.mark.slow
def test_an_error_in_a_worker_is_told_as_it_is(bench: Path, tmp_path: Path) -> None:
    text = DEADLY.replace("os.kill(os.getpid(), signal.SIGKILL)", "raise KeyError('of mine')")
    spec = deadly(bench, tmp_path, "always", workers=2)
    (tmp_path / "deadly.py").write_text(text)
    with pytest.raises(FeintError, match="KeyError: 'of mine'"):
        run(spec, tmp_path / "run")
