"""A cell: one number of the table, described by plain data and addressed by its content."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from feint.core import spec as specs
from feint.core.errors import ConfigError, RangeError
from feint.core.norms import check_norm
from feint.evaluation.fingerprint import digest, fingerprint
from feint.evaluation.scenarios import get_scenario

__all__ = ["Cell", "digest", "fingerprint"]

SCHEMA = 1
"""Raise with any change of what the columns of a shard mean."""


@dataclass(frozen=True)
class Cell:
    """Everything that decides one cell, but for the samples and the objects that specs name.

    The budget `eps` is the threat model's: an attack may use less, never more.
    """

    scenario: str
    model: str
    defense: str = "none"
    attack: str = "none"
    source: str = ""
    backward: str = "default"
    norm: str = "linf"
    eps: float = 8 / 255
    targeted: bool = False
    votes: int = 1
    combine: str = "mean_probability"
    judge_draws: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        scenario = get_scenario(self.scenario)
        check_norm(self.norm)
        # 1 and 1.0, or a number of numpy's, are the same cell.
        object.__setattr__(self, "eps", float(self.eps))
        if not 0 <= self.eps < math.inf:
            raise RangeError(f"eps is {self.eps}; expected a finite number ≥ 0")
        for name, least in (("votes", 1), ("judge_draws", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise RangeError(f"{name} is {value!r}; expected a whole number ≥ {least}")
        if (self.attack == "none") != (scenario.attacked == "nothing"):
            raise ConfigError(
                f"scenario {self.scenario!r} with attack {self.attack!r}: 'none' goes with 'none'"
            )
        if (scenario.attacked == "source") != bool(self.source):
            raise ConfigError(
                f"scenario {self.scenario!r} "
                + ("needs a source model (--source SPEC)" if not self.source else "has no source")
            )

    @property
    def rules(self) -> str | list[str | None] | None:
        """`backward` as defenses take it: None is their own choice, a list has one per part."""
        if self.backward == "default":
            return None
        if "+" not in self.backward:
            return self.backward
        named = [rule.strip() for rule in self.backward.split("+")]
        return [None if rule == "default" else rule for rule in named]

    def spec(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def attack_key(self, context: Mapping[str, str]) -> str:
        """Address of the adversarial examples: equal for cells that differ only in the judge.

        Args:
            context: Fingerprints and versions of what the specs name: keys `data`, `model`,
                `defense`, `source`, `attack` (its version, and when samples stop).
        """
        # A pipeline without a defense is the bare model that a gray-box attacker has.
        bare = self.defense == "none" and self.votes == 1
        attacked = get_scenario(self.scenario).attacked
        used = {
            "nothing": (),
            "model": ("model",),
            "pipeline": ("model",) if bare else ("model", "defense"),
            "source": ("source",),
            "parts": ("model", "defense"),
        }[attacked]
        content = {
            "schema": SCHEMA,
            "data": context["data"],
            "seed": self.seed,
            "attack": [str(specs.parse(self.attack)), context["attack"]],
            # Without an attacker nothing but the target matters of the threat.
            "threat": [self.norm, self.eps, self.targeted] if used else [self.targeted],
            "attacked": {part: context[part] for part in used},
            "view": [self.backward, self.votes, self.combine] if "defense" in used else [],
        }
        if attacked == "parts":  # the same objects, attacked in another way
            content["how"] = attacked
        return digest(content)

    def key(self, context: Mapping[str, str]) -> str:
        """Address of the cell: the examples and how they are judged."""
        judged = get_scenario(self.scenario).judged
        with_defense = judged == "pipeline"
        return digest(
            {
                "examples": self.attack_key(context),
                "scenario": self.scenario,
                "model": context["model"],
                "defense": context["defense"] if with_defense else "",
                "judge": [self.judge_draws, *((self.votes, self.combine) if with_defense else ())],
            }
        )
