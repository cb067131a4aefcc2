from __future__ import annotations

from typing import ClassVar

from feint.attacks import bim
from tests.contracts.attack import AttackContract


class TestBIM(AttackContract):
    attack = staticmethod(bim)
    kwargs: ClassVar = {"steps": 4}
