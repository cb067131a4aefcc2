"""Known breaks: for every defense the strongest recipe that is known against it, as plain data.

A defense declares its own on its class, as `known_break`: a mapping of the fields of `Break`. For
the built-in ones the table below says it, apart from their code: a break that is found later must
not make another defense of the one that it breaks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from feint.core.errors import ConfigError, UnknownNameError
from feint.defenses.base import Defense

__all__ = ["BREAKS", "Break", "known_break"]


@dataclass(frozen=True)
class Break:
    """How a defense is broken: what an attacker who has read up on it would do.

    Parts of a chain each bring their own; the attacker takes every part's rule, the most steps and
    draws that one of them wants, and each of their losses and further attacks.
    """

    rule: str = "default"
    """Backward rule of this part; `"default"` is its recommended one."""
    draws: int = 8
    """Draws per gradient, if the pipeline is random. Fewer if all of them are fewer."""
    steps: int = 40
    losses: tuple[str, ...] = ("cross_entropy", "margin")
    attacks: tuple[str, ...] = ()
    """Further attack expressions. Those that lack the threat model's norm are left out."""
    source: str = ""
    """Who broke it, or what makes the recipe plausible."""

    def __post_init__(self) -> None:
        for name in ("draws", "steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"a break has {name} {value!r}; expected a whole number ≥ 1")
        object.__setattr__(self, "losses", tuple(self.losses))
        object.__setattr__(self, "attacks", tuple(self.attacks))
        if not self.losses:
            raise ConfigError("a break has no loss; expected at least one")


_SHIFT = "S0's own threat model leaves it out: differentiate through the shift, or over its draws"
_OG = "Athalye, Carlini, Wagner, ICML 2018"

BREAKS: dict[str, Break] = {
    "ace": Break(source=_SHIFT),
    "prm": Break(draws=16, source="S4 leaves full white-box access to future work"),
    "pixel_shift": Break(draws=9, source=_SHIFT),
    "fd": Break(
        "surrogate",
        attacks=("feature_bpda",),
        source="the identity is off by FD's own 2-pixel translation; undone, it falls at once; "
        "rounding after Shin and Song, 2017",
    ),
    "rdg": Break("exact", draws=30, source="differentiated exactly, S1's result is gone"),
    "rand": Break("exact", draws=30, source=f"EOT over 30 draws leaves 0 % at 8/255: {_OG}"),
    "pixel_deflection": Break(
        "identity", draws=10, source="Athalye, Carlini, arXiv 1804.03286: 0 % at 4/255"
    ),
    "wavelet": Break("identity", source="Athalye, Carlini, arXiv 1804.03286"),
    "s2snet": Break(
        "identity",
        attacks=("pgd(steps=40, loss='margin')",),
        source="S3's own WhiteBox+: the classifier's gradient at the network's output",
    ),
    "jpeg": Break("surrogate", source=f"Shin, Song, 2017; {_OG}: 0 %"),
    "bit_depth": Break("surrogate", source=f"{_OG}: 0 %"),
    "median": Break("exact", source=f"a selection of values: differentiable as it is; {_OG}"),
    "shield": Break("surrogate", draws=16, source="Cornelius et al., 2019: 0.1 % white-box"),
    "tv": Break("identity", draws=16, source=f"{_OG}: 0 %"),
    "quilting": Break("identity", draws=16, source=f"{_OG}: 0 %"),
    "crop_ensemble": Break("exact", draws=30, source=f"{_OG}: 0 %"),
    "region_based": Break("exact", draws=30, source="He, Li, Song, ICLR 2018: OptMargin"),
    "me_net": Break("identity", draws=40, source="Tramèr et al., NeurIPS 2020: 13 %"),
    "pixel_defend": Break("identity", source=f"{_OG}: 9 %"),
    "hgd": Break("exact", source="Athalye, Carlini, arXiv 1804.03286: 0 % at 4/255"),
    "thermometer": Break("surrogate", source=f"{_OG}: 30 % with LS-PGA"),
    "magnet": Break("exact", source="Carlini, Wagner, 2017, arXiv:1711.08478"),
    "smoothing": Break("exact", draws=16, source="Salman et al., NeurIPS 2019"),
    "diffusion": Break("exact", draws=20, source="Nie et al., ICML 2022; Lee, Kim, ICCV 2023"),
    "noise": Break("exact", draws=30, source="Gao et al., NeurIPS 2022"),
}
"""By registered name."""


def known_break(part: Defense) -> Break:
    """The declared break of one defense (of a chain, ask its members).

    What its class declares as `known_break` comes before the table; a defense that nobody declared
    a break for gets its recommended rule, both losses, and the mean over draws.

    Raises:
        ConfigError: If the class declares something else than a mapping of the fields of `Break`.
        UnknownNameError: If the defense does not declare the break's rule.
    """
    declared = getattr(type(part), "known_break", None)
    found = BREAKS.get(part.name, Break()) if declared is None else _read(part, declared)
    if found.rule != "default" and found.rule not in part.backward_rules():
        raise UnknownNameError(f"backward rule of {part.name}", found.rule, part.backward_rules())
    return found


def _read(part: Defense, declared: object) -> Break:
    if isinstance(declared, Break):
        return declared
    if not isinstance(declared, Mapping):
        raise ConfigError(
            f"{type(part).__name__}.known_break is a {type(declared).__name__}; expected a mapping "
            "such as {'rule': 'identity', 'draws': 30}"
        )
    known = [f.name for f in fields(Break)]
    for key in declared:
        if key not in known:
            raise UnknownNameError(f"field of {type(part).__name__}.known_break", str(key), known)
    return Break(**declared)
