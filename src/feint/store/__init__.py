"""Run directories: what to compute, where the results are, how to go on and how to read back."""

from feint.store.resolver import DatasetSamples, Resolver, Unit
from feint.store.runner import prepare, resume, run, run_unit, units
from feint.store.spec import DataSpec, Published, RunSpec
from feint.store.stored import StoredRun, open_run
from feint.store.verify import Verification, verify

__all__ = [
    "DataSpec",
    "DatasetSamples",
    "Published",
    "Resolver",
    "RunSpec",
    "StoredRun",
    "Unit",
    "Verification",
    "open_run",
    "prepare",
    "resume",
    "run",
    "run_unit",
    "units",
    "verify",
]
