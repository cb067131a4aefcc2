"""Defenses: one `Defense` per file, chains of them, and the expressions that people type."""

from feint.defenses.ace import ACE
from feint.defenses.base import Defense, Params, View
from feint.defenses.chain import Chain, parse

__all__ = [
    "ACE",
    "Chain",
    "Defense",
    "Params",
    "View",
    "parse",
]
