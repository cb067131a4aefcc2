"""Freed memory that is kept. Oracle: the system's own count of page faults."""

import subprocess
import sys

from feint.store.memory import hold_on_to_memory

PROGRAM = """
import resource, sys, torch
from feint.store.memory import hold_on_to_memory
if sys.argv[1] == "hold":
    assert hold_on_to_memory()

def work():
    held = [torch.ones(1 << 20) for _ in range(20)]  # 4 MiB each

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

work()
before = faults()
for _ in range(5):
    work()
print(faults() - before)
"""


def _faults(how: str) -> int:
    made = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True
    )
    return int(made.stdout)


def test_memory_that_was_freed_is_used_again() -> None:
    if not sys.platform.startswith("linux"):
        assert not hold_on_to_memory()
        return
    assert _faults("hold") * 10 < _faults("leave")
