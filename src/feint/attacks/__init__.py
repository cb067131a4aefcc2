"""Attacks: flat functions `attack(model, x, y, *, …) -> x_adv`, one family per file."""

from feint.attacks.apgd import apgd
from feint.attacks.bim import bim
from feint.attacks.deepfool import deepfool
from feint.attacks.fgsm import fgsm
from feint.attacks.lbfgs import lbfgs
from feint.attacks.mi_fgsm import mi_fgsm
from feint.attacks.pgd import pgd
from feint.attacks.square import square

__all__ = [
    "apgd",
    "bim",
    "deepfool",
    "fgsm",
    "lbfgs",
    "mi_fgsm",
    "pgd",
    "square",
]
