"""A cell: one number of the table, described by plain data and addressed by its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from feint.core.errors import ConfigError, RangeError
from feint.core.norms import check_norm
from feint.evaluation.scenarios import get_scenario

__all__ = ["Cell", "digest", "fingerprint"]

SCHEMA = 1
"""Raise with any change of what the columns of a shard mean."""


def digest(value: object) -> str:
    """Twenty hex digits of the SHA-256 of canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def fingerprint(module: nn.Module | None) -> str:
    """Digest of a module's structure, parameters and buffers (those that are not saved, too)."""
    if module is None:
        return ""
    sha = hashlib.sha256(repr(module).encode())
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name in sorted(named):
        raw = named[name].detach().cpu().contiguous()
        sha.update(f"{name}{raw.dtype}{tuple(raw.shape)}".encode())
        sha.update(raw.flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:20]


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
        if not self.eps >= 0:
            raise RangeError(f"eps is {self.eps}; expected a number ≥ 0")
        if (self.attack == "none") != (scenario.attacked == "nothing"):
            raise ConfigError(
                f"scenario {self.scenario!r} with attack {self.attack!r}: 'none' goes with 'none'"
            )
        if (scenario.attacked == "source") != bool(self.source):
            raise ConfigError(
                f"scenario {self.scenario!r} "
                + ("needs a source model (--source SPEC)" if not self.source else "has no source")
            )

    def spec(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def attack_key(self, context: Mapping[str, str]) -> str:
        """Address of the adversarial examples: equal for cells that differ only in the judge.

        Args:
            context: Fingerprints and versions of what the specs name: keys `data`, `model`,
                `defense`, `source`, `attack`.
        """
        scenario = get_scenario(self.scenario)
        used = {
            "nothing": (),
            "model": ("model",),
            "pipeline": ("model", "defense"),
            "source": ("source",),
        }[scenario.attacked]
        return digest(
            {
                "schema": SCHEMA,
                "data": context["data"],
                "seed": self.seed,
                "attack": [self.attack, context["attack"]],
                "threat": [self.norm, self.eps, self.targeted],
                "attacked": {part: context[part] for part in used},
                "view": [self.backward, self.votes, self.combine] if "defense" in used else [],
                # Where another pipeline is judged, no sample stops at its first success.
                "transferred": scenario.attacked != scenario.judged,
            }
        )

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
