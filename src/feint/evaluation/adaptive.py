"""The adaptive attacker: a defense's declared break, and a search for one of our own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from feint.core import spec
from feint.core.errors import UnknownNameError
from feint.core.registry import ATTACKS
from feint.defenses.base import Defense
from feint.defenses.chain import Chain
from feint.evaluation.attackers import EOT_DRAWS, parse_attack
from feint.evaluation.breaks import known_break

__all__ = ["Candidate", "break_rules", "candidates", "rule_options"]

MOST_RULES = 6
"""Backward rules that the search tries at most, one part's at a time."""
RESTARTS = 3
"""Starts of the search's attack from several points."""
_SHAPE = (1, 3, 32, 32)


@dataclass(frozen=True)
class Candidate:
    """One attack of the adaptive attacker: plain data, that a cell can hold."""

    backward: str
    """A rule, one per part as in `"aligned + exact"`, or `"default"`."""
    attack: str
    origin: str
    """`"known break"` with its source, or what the search varies."""


def members(defense: Defense | None) -> tuple[Defense, ...]:
    """The parts of a defense in order; none without one."""
    if defense is None:
        return ()
    return defense.members if isinstance(defense, Chain) else (defense,)


def rule_options(defense: Defense | None) -> list[str]:
    """Backward rules that a cell can name: the recommended ones, then each other, part by part.

    Parts of the same name (FD thrice) take a rule together. Empty if a part declares no rule at
    all: nothing stands in for it, and only attacks on scores or decisions are left.
    """
    parts = members(defense)
    if not all(part.backward_rules() or part.best_rule for part in parts):
        return []
    options = ["default"]
    for name in dict.fromkeys(part.name for part in parts):
        first = next(part for part in parts if part.name == name)
        for rule in first.backward_rules():
            if rule != first.recommended_rule and _declared(parts, name, rule):
                chosen = {i: rule for i, part in enumerate(parts) if part.name == name}
                options.append(_text(parts, chosen))
    return options


def break_rules(defense: Defense) -> str:
    """The backward rules of all parts' declared breaks, as a cell writes them."""
    parts = members(defense)
    return _text(parts, {i: known_break(part).rule for i, part in enumerate(parts)})


def candidates(
    defense: Defense | None,
    *,
    norm: str = "linf",
    targeted: bool = False,
    steps: int = 40,
    shape: tuple[int, ...] = _SHAPE,
) -> list[Candidate]:
    """Everything that the adaptive attacker tries; the worst per sample counts.

    First the declared breaks of the defense's parts (`feint.evaluation.breaks`), together. Then a
    search over backward rules, losses, numbers of draws at an equal budget of gradients, restarts
    and kinds of attack. Against a part that declares no rule, gradients are estimated from scores.

    Args:
        defense: What stands in front of the model, or none.
        norm: The threat model's norm.
        targeted: Whether labels are targets.
        steps: Steps of the search's attacks; breaks bring their own, at least so many.
        shape: Shape of a batch, on which the number of possible draws may depend.

    Raises:
        UnknownNameError: A declared break names a rule that its defense does not have.
        ConfigError: A declared break is none.
    """
    options = rule_options(defense)
    draws = _support(defense, shape)
    stochastic = defense is not None and defense.stochastic
    # All draws adversarial at once is the end of it, if these are all the draws that there are.
    stop = "stop='success'" if stochastic and draws is not None else ""
    found: list[Candidate] = []

    def add(backward: str, attack: str, origin: str) -> None:
        if spec.calls(spec.parse(attack))[0].name not in ATTACKS:
            return
        info = parse_attack(attack).info
        known = norm in info.norms and (not targeted or "targeted" in info.parameters)
        same = any((c.backward, c.attack) == (backward, attack) for c in found)
        if known and not same:
            found.append(Candidate(backward, attack, origin))

    def ascent(
        loss: str, name: str = "pgd", count: int = 0, length: int = steps, restarts: int = 1
    ) -> str:
        """An attack in this norm; `count` draws per gradient instead of the usual number."""
        if norm == "l0":
            name, restarts = "fmn", 1
        own: dict[str, object] = {}
        # What is the default anyway is left out: equal texts share their examples.
        if name not in ATTACKS or ATTACKS[name].parameters["steps"].default != length:
            own["steps"] = length
        if norm != "l0" and loss != "cross_entropy":
            own["loss"] = f"'{loss}'"
        if restarts > 1:
            own["restarts"] = restarts
        if not options:
            base = "spsa(32)"
            own["gradient"] = f"eot({EOT_DRAWS}, base={base})" if stochastic else base
        elif stochastic and count and count != EOT_DRAWS:
            own["gradient"] = f"eot({count})"
        words = [f"{key}={value}" for key, value in own.items()]
        if stop and name != "fmn" and count != 1:
            words.append(stop)
        return f"{name}({', '.join(words)})" if words else name

    _breaks(defense, options, draws, steps, ascent, add)
    for rule in options[:MOST_RULES] or ["default"]:
        which = "the recommended rules" if rule == "default" else f"the rules {rule}"
        add(rule, ascent("margin"), f"search: {which}")
    add("default", ascent("cross_entropy"), "search: cross-entropy")
    add("default", ascent("cross_entropy", "apgd"), "search: step sizes that adapt")
    if stochastic:
        if options:
            length = steps * (draws or EOT_DRAWS)
            single = ascent("margin", count=1, length=length)
            add("default", single, "search: one draw, more steps")
            if draws is None:
                many = ascent("margin", count=4 * EOT_DRAWS, length=max(1, steps // 4))
                add("default", many, "search: more draws")
    else:
        add("default", ascent("margin", "apgd", restarts=RESTARTS), "search: restarts")
        if options and norm != "l0":
            add(
                "default",
                f"autoattack(steps={steps}, targets=3, queries=100)",
                "search: attacks of other kinds",
            )
    others = {"l2": "ddn(steps=100)", "l1": "ead(steps=50, search_steps=4)", "l0": "jsma"}
    if options and norm in others:
        add("default", others[norm], "search: the nearest adversarial image")
    return found


def _breaks(defense, options, draws, steps, ascent, add) -> None:  # type: ignore[no-untyped-def]
    """The declared breaks of all parts, put together."""
    parts = members(defense)
    known = [known_break(part) for part in parts]
    if not known:
        return
    rules = break_rules(defense) if options else "default"
    count = max(b.draws for b in known)
    count = count if draws is None else min(count, max(draws, EOT_DRAWS))
    length = max(steps, *(b.steps for b in known))
    names = ", ".join(dict.fromkeys(part.name for part in parts))
    origin = f"known break of {names}: " + "; ".join(dict.fromkeys(b.source for b in known))
    for loss in _unique(b.losses for b in known):
        add(rules, ascent(loss, count=count, length=length), origin)
    for attack in _unique(b.attacks for b in known) if options else ():
        add(rules, attack, origin)


def _unique(groups: Iterable[Iterable[str]]) -> list[str]:
    return list(dict.fromkeys(item for group in groups for item in group))


def _declared(parts: tuple[Defense, ...], name: str, rule: str) -> bool:
    """Whether every part of that name stands in with the rule; an instance may lack "exact"."""
    try:
        for part in parts:
            if part.name == name:
                part.stand_in(rule)
    except UnknownNameError:
        return False
    return True


def _text(parts: tuple[Defense, ...], chosen: dict[int, str]) -> str:
    """Rules of all parts as a cell writes them; `"default"` where they are the recommended ones."""
    rules = [
        "default" if chosen.get(i, "default") == part.recommended_rule else chosen.get(i, "default")
        for i, part in enumerate(parts)
    ]
    if all(rule == "default" for rule in rules):
        return "default"
    return rules[0] if len(rules) == 1 else " + ".join(rules)


def _support(defense: Defense | None, shape: tuple[int, ...]) -> int | None:
    """How many equally likely draws the defense has; None if many or unknown."""
    options = None if defense is None else defense.support(torch.Size(shape))
    return None if options is None else len(options)
