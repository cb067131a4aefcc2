"""Cells in words that a reader understands, and what kind of attacker a cell has."""

from __future__ import annotations

from feint.core import spec
from feint.evaluation.attackers import EOT_DRAWS, ParsedAttack, parse_attack
from feint.evaluation.cell import Cell
from feint.evaluation.scenarios import get_scenario
from feint.evaluation.verdict import INFORMED, eps_text, name_of

__all__ = ["attack_words", "card", "cell_words", "knows", "steps_of", "surrogate"]

_UNITS = ("eps", "step_size")


def knows(cell: Cell) -> bool:
    """Whether the cell's attacker has the pipeline that is judged, weights and all."""
    return cell.scenario in INFORMED


def surrogate(cell: Cell) -> bool:
    """Whether the deployed pipeline is judged on what another model was attacked for."""
    scenario = get_scenario(cell.scenario)
    return scenario.judged == "pipeline" and scenario.attacked in ("model", "source")


def steps_of(parsed: ParsedAttack) -> int | None:
    """The attack's number of steps, if it has one."""
    found = parsed.effective("steps") if "steps" in parsed.info.parameters else None
    return found if isinstance(found, int) else None


def _setting(key: str, value: object) -> str:
    if key in ("steps", "restarts", "queries"):
        return f"{value} {key}"
    if key == "loss":
        return f"{value} loss"
    if key == "preset":
        return f"as in {value}"
    if key == "gradient":
        return f"gradient {value}"
    if key in _UNITS and isinstance(value, (int, float)):
        return f"{'step' if key == 'step_size' else key} {eps_text(value)}"
    text = spec.format_value(value) if not isinstance(value, spec.Call) else str(value)
    return f"{key.replace('_', ' ')} {text.strip(chr(39))}"


def attack_words(text: str) -> str:
    """An attack expression in words: `"pgd, 100 steps, margin loss"`."""
    typed = spec.parse(text)
    if not isinstance(typed, spec.Call):
        return text
    order = ("preset", "steps", "queries", "step_size", "restarts", "loss", "gradient")
    keywords = typed.keywords
    keys = [k for k in order if k in keywords] + [k for k in keywords if k not in order]
    return ", ".join([typed.name, *(_setting(k, keywords[k]) for k in keys)])


def cell_words(cell: Cell) -> str:
    """A cell in words: pipeline, scenario, attack and budget."""
    parts = [name_of(cell.model, cell.defense), cell.scenario]
    if cell.attack != "none":
        parts += [attack_words(cell.attack), f"{cell.norm} {eps_text(cell.eps)}"]
    if cell.source:
        parts.append(f"from {cell.source}")
    if cell.backward != "default":
        parts.append(f"backward {cell.backward}")
    return ", ".join(parts) + (", targeted" if cell.targeted else "")


def card(cell: Cell, stochastic: bool) -> str:
    """The threat model of a cell's attacker in words."""
    parsed = parse_attack(cell.attack)
    goal = "a class of the attacker's choice" if cell.targeted else "any wrong class"
    limit = next(
        (
            f"{parsed.effective(key)} {key}"
            for key in ("queries", "steps")
            if key in parsed.info.parameters
        ),
        "one call",
    )
    draws = "nothing is random"
    if stochastic:
        draws = (
            "the attacker averages over draws of his own, not those of the judge"
            if knows(cell)
            else "the attacker does not see the draws"
        )
        if knows(cell) and not parsed.fixes("gradient") and parsed.needs_gradient:
            draws += f" ({EOT_DRAWS} per gradient)"
    return (
        f"goal: {goal}; knowledge: {get_scenario(cell.scenario).knowledge}; he uses "
        f"{parsed.info.knowledge}s; budget: {cell.norm} {eps_text(cell.eps)}; "
        f"effort: {limit} per start; randomness: {draws}"
    )
