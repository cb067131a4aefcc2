"""Attacks: flat functions `attack(model, x, y, *, …) -> x_adv`, one family per file."""

from feint.attacks.apgd import apgd
from feint.attacks.bim import bim
from feint.attacks.fgsm import fgsm
from feint.attacks.mi_fgsm import mi_fgsm
from feint.attacks.pgd import pgd

__all__ = [
    "apgd",
    "bim",
    "fgsm",
    "mi_fgsm",
    "pgd",
]
