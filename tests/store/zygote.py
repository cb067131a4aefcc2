"""Run a spec again and again, each time in a fork that is killed with signal 9.

A process of its own: it imports the library once and computes nothing itself, so that a fork is a
clean start. Prints one JSON line: the real kills, and the directories of the runs that ended.

Usage: python zygote.py SPEC.json FOLDER KILLS
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from feint.core import random
from feint.store import RunSpec, environment, run

torch.set_num_threads(1)
environment.git = lambda: None
spec = RunSpec(**json.loads(Path(sys.argv[1]).read_text()))
folder, wanted = Path(sys.argv[2]), int(sys.argv[3])


def forked(directory: Path) -> int:
    """A child that runs the spec in a directory."""
    child = os.fork()
    if child == 0:
        try:
            run(spec, directory)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


begun = time.monotonic()
_, status = os.waitpid(forked(folder / "0"), 0)
whole = time.monotonic() - begun
assert status == 0, status

ended, kills, attempts, moments = [str(folder / "0")], 0, 0, []
while kills < wanted or str(folder / str(len(ended))) not in ended:
    directory = folder / str(len(ended))
    child = forked(directory)
    if kills < wanted:
        share = float(random.uniform(random.fold(random.keys(9, 1), "kill", attempts), ())[0])
        attempts += 1
        time.sleep(whole * (0.1 + 0.5 * share))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            kills += 1
            units = len(list(directory.glob("samples/*.parquet")))
            moments.append([round(share, 3), units])
            continue
    else:
        _, status = os.waitpid(child, 0)
    assert status == 0, status
    ended.append(str(directory))
    if kills >= wanted:
        break
sys.stdout.write(json.dumps({"kills": kills, "ended": ended, "moments": moments}) + "\n")
