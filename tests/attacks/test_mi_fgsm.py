from __future__ import annotations

from typing import ClassVar

from feint.attacks import mi_fgsm
from tests.contracts.attack import AttackContract


class TestMIFGSM(AttackContract):
    attack = staticmethod(mi_fgsm)
    kwargs: ClassVar = {"steps": 4}
