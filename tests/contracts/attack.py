"""What every attack guarantees: one class that each attack's test class inherits.

    class TestPGD(AttackContract):
        attack = staticmethod(pgd)
        kwargs = {"steps": 5}
        random = True

A test that asks for a keyword, a goal or a kind of knowledge that the attack does not have is not
part of that attack's contract: it is removed when the class is made, and not skipped at run time.
Which keywords an attack must have is checked in `tests/test_registry_meta.py`.
"""

from __future__ import annotations

from tests.contracts.attack_batch import BatchContract
from tests.contracts.attack_harness import EPS, HostSyncs, needs
from tests.contracts.attack_options import OptionsContract
from tests.contracts.attack_steps import StepsContract

__all__ = ["EPS", "AttackContract", "HostSyncs", "needs"]


class AttackContract(BatchContract, StepsContract, OptionsContract):
    """Guarantees of DESIGN §3, each as a test. Subclasses set `attack` and, if needed, the rest."""
