from __future__ import annotations

from typing import ClassVar

from feint.attacks import pgd
from tests.contracts.attack import AttackContract


class TestPGD(AttackContract):
    attack = staticmethod(pgd)
    kwargs: ClassVar = {"steps": 5}
    random = True
