"""Classifiers: architectures, normalisation inside the model, loaders by spec, bundled weights."""

from __future__ import annotations

from feint.models.architectures import ARCHITECTURES
from feint.models.bfloat16 import Bfloat16
from feint.models.build import build, initialise
from feint.models.bundle import bundled, card, save_bundle
from feint.models.facts import check_model, describe, fingerprint
from feint.models.fronted import Fronted
from feint.models.normalized import Normalized
from feint.models.resized import Resized
from feint.models.specs import DEFAULT, Loaded, load, resolve

__all__ = [
    "ARCHITECTURES",
    "DEFAULT",
    "Bfloat16",
    "Fronted",
    "Loaded",
    "Normalized",
    "Resized",
    "build",
    "bundled",
    "card",
    "check_model",
    "describe",
    "fingerprint",
    "initialise",
    "load",
    "resolve",
    "save_bundle",
]
