"""Attacks: flat functions `attack(model, x, y, *, …) -> x_adv`, one family per file."""

from feint.attacks.apgd import apgd
from feint.attacks.autoattack import autoattack
from feint.attacks.bim import bim
from feint.attacks.carlini_wagner import carlini_wagner
from feint.attacks.ddn import ddn
from feint.attacks.deepfool import deepfool
from feint.attacks.ead import ead
from feint.attacks.fab import fab
from feint.attacks.feature_bpda import feature_bpda
from feint.attacks.fgsm import fgsm
from feint.attacks.fmn import fmn
from feint.attacks.hopskipjump import hopskipjump
from feint.attacks.jsma import jsma
from feint.attacks.lbfgs import lbfgs
from feint.attacks.mi_fgsm import mi_fgsm
from feint.attacks.one_pixel import one_pixel
from feint.attacks.pgd import pgd
from feint.attacks.reparameterized import reparameterized
from feint.attacks.spatial import spatial
from feint.attacks.spsa import spsa
from feint.attacks.square import square
from feint.attacks.transfer import transfer
from feint.attacks.worst_of import worst_of

__all__ = [
    "apgd",
    "autoattack",
    "bim",
    "carlini_wagner",
    "ddn",
    "deepfool",
    "ead",
    "fab",
    "feature_bpda",
    "fgsm",
    "fmn",
    "hopskipjump",
    "jsma",
    "lbfgs",
    "mi_fgsm",
    "one_pixel",
    "pgd",
    "reparameterized",
    "spatial",
    "spsa",
    "square",
    "transfer",
    "worst_of",
]
