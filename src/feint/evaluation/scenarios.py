"""Scenarios: what the attacker attacks, and what is judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from feint.core.errors import UnknownNameError

__all__ = ["SCENARIOS", "Scenario", "get_scenario"]

Attacked = Literal["nothing", "model", "pipeline", "source", "parts"]
"""`"parts"`: gradients from the pipeline without its non-differentiable parts, every round tried
against the whole pipeline."""
Judged = Literal["pipeline", "model"]
Asks = Literal["anything", "gradient", "score", "decision"]


@dataclass(frozen=True)
class Scenario:
    """Two fields and a sentence: an accuracy means nothing without them."""

    name: str
    attacked: Attacked
    judged: Judged
    knowledge: str
    """What the attacker knows, in words that go into the report."""
    asks: Asks = "anything"
    """What the attacker may ask of what is attacked."""

    @property
    def transferred(self) -> bool:
        """Whether examples are made on something else than what is judged."""
        return self.attacked not in (self.judged, "parts")


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
            "decision",
            "pipeline",
            "pipeline",
            "the attacker may query the deployed pipeline and sees the class it decides for",
            asks="decision",
        ),
        Scenario(
            "score",
            "pipeline",
            "pipeline",
            "the attacker may query the deployed pipeline and sees its scores",
            asks="score",
        ),
        Scenario(
            "semi-brute-force",
            "parts",
            "pipeline",
            "the attacker has the weights and the defense, takes gradients through its "
            "differentiable parts only, and tries every round against the whole",
            asks="gradient",
        ),
        Scenario(
            "white-box",
            "pipeline",
            "pipeline",
            "the attacker has the weights, the defense and the distribution of its draws, "
            "not the draws themselves",
        ),
        Scenario(
            "adaptive",
            "pipeline",
            "pipeline",
            "the attacker has weights, defense and the distribution of its draws, knows its "
            "published breaks, and searches rules, losses, draws and restarts for its weakness",
        ),
    )
}


def get_scenario(name: str) -> Scenario:
    """A scenario by name; an unknown one names the nearest."""
    if name not in SCENARIOS:
        raise UnknownNameError("scenario", name, SCENARIOS)
    return SCENARIOS[name]
