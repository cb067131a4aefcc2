from __future__ import annotations

from feint.attacks import fgsm
from tests.contracts.attack import AttackContract


class TestFGSM(AttackContract):
    attack = staticmethod(fgsm)
