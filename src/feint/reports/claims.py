"""What was published about a defense, to stand beside what a run measured of it.

These numbers are about other models, data and budgets than a run's, unless it happens to use the
same: a report shows them as context, with what they are about, and never calls a number of the run
their reproduction. A claim about a run's own cells is a `Claim` of the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from feint.core import spec
from feint.core.errors import FeintError

__all__ = ["PUBLISHED", "Published", "published"]


@dataclass(frozen=True)
class Published:
    """A number that a paper gives for a defense.

    Attributes:
        low: The accuracy, in [0, 1].
        high: The other end, where the paper gives a range.
        scenario: Scenario that it is about.
        about: Attack, model and data, in words: what tells it from other claims first.
        source: Where it stands.
        share_of: Whose clean accuracy it is a share of: the `"bare"` or the `"defended"`
            classifier's; empty for an accuracy.
    """

    low: float
    high: float
    scenario: str
    about: str
    source: str
    share_of: Literal["", "bare", "defended"] = ""


_S1 = ", 50 rounds; targeted, rms 0.05, Inception-v3 on ImageNet"

PUBLISHED: dict[tuple[str, ...], tuple[Published, ...]] = {
    ("pixel_shift",): (
        Published(
            0.983,
            0.983,
            "gray-box",
            "PGD; ResNet-18 with ACE λ=100",
            "S0, Table 3",
            share_of="bare",
        ),
    ),
    ("fd",): (Published(0.45, 0.45, "white-box", "BPDA" + _S1, "S1, Fig. 3 a"),),
    ("fd", "rdg"): (
        Published(0.71, 0.71, "white-box", "BPDA" + _S1, "S1, Fig. 3 a"),
        Published(0.58, 0.58, "white-box", "BPDA+EOT" + _S1, "S1, Fig. 3 c"),
        Published(0.38, 0.38, "semi-brute-force", "RDG's gradient" + _S1, "S1, Fig. 3 e"),
    ),
    ("fd", "rand"): (
        Published(0.71, 0.71, "white-box", "BPDA" + _S1, "S1, Fig. 3 a"),
        Published(0.52, 0.52, "white-box", "BPDA+EOT" + _S1, "S1, Fig. 3 c"),
        Published(0.24, 0.24, "semi-brute-force", "Rand's gradient" + _S1, "S1, Fig. 3 e"),
    ),
    ("fd", "fd", "fd", "rdg"): (
        Published(0.65, 0.65, "semi-brute-force", "RDG's gradient" + _S1, "S1, Fig. 3 e"),
    ),
    ("pixel_deflection", "wavelet"): (
        Published(0.81, 0.98, "gray-box", "six attacks; ImageNet", "S2, Table 1"),
    ),
    ("s2snet",): (
        Published(
            0.896, 0.896, "removal", "BIM; ResNet-50 on ImageNet", "S3, App. A", share_of="bare"
        ),
    ),
    ("prm",): (
        Published(
            1.0,
            1.0,
            "gray-box",
            "'almost no effect'; five attacks, ImageNet",
            "S4",
            share_of="defended",
        ),
    ),
    ("pixel_defend",): (
        Published(
            0.70, 0.70, "gray-box", "the strongest of its attacks; CIFAR-10", "Song et al., 2018"
        ),
    ),
}
"""By the names of a chain's parts, in order. Each number is one that a defense's docstring or a
recipe gives, too: what could not be traced to its source is nowhere."""


def published(defense: str) -> tuple[Published, ...]:
    """What was published about a defense expression; empty if nothing is on record.

    Example:
        >>> [claim.low for claim in published("fd + rdg(delta=0.15)")]
        [0.71, 0.58, 0.38]
    """
    return PUBLISHED.get(_names(defense), ())


def _names(defense: str) -> tuple[str, ...]:
    try:
        return _parts(spec.parse(defense))
    except FeintError:
        return ()


def _parts(expression: spec.Expression) -> tuple[str, ...]:
    if isinstance(expression, spec.Sum):
        return tuple(name for term in expression.terms for name in _parts(term))
    if isinstance(expression, spec.Repeat):
        return (expression.call.name,) * expression.count
    return (expression.name,)
