"""Scenarios: what the attacker attacks, and what is judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from feint.core.errors import UnknownNameError

__all__ = ["SCENARIOS", "Scenario", "get_scenario"]

Attacked = Literal["nothing", "model", "pipeline", "source"]
Judged = Literal["pipeline", "model"]


@dataclass(frozen=True)
class Scenario:
    """Two fields and a sentence: an accuracy means nothing without them."""

    name: str
    attacked: Attacked
    judged: Judged
    knowledge: str
    """What the attacker knows, in words that go into the report."""


SCENARIOS = {
    s.name: s
    for s in (
        Scenario("none", "nothing", "pipeline", "there is no attacker"),
        Scenario(
            "gray-box",
            "model",
            "pipeline",
            "the attacker has the model's weights and does not know of the defense in front of it",
        ),
        Scenario(
            "removal",
            "pipeline",
            "model",
            "the attacker has model and defense; the defense is taken away before the judgement",
        ),
        Scenario(
            "transfer",
            "source",
            "pipeline",
            "the attacker has another model only and transfers what he finds",
        ),
        Scenario(
            "white-box",
            "pipeline",
            "pipeline",
            "the attacker has the weights, the defense and the distribution of its draws, "
            "not the draws themselves",
        ),
    )
}


def get_scenario(name: str) -> Scenario:
    """A scenario by name; an unknown one names the nearest."""
    if name not in SCENARIOS:
        raise UnknownNameError("scenario", name, SCENARIOS)
    return SCENARIOS[name]
