"""The threat-model card: what an attacker wants, knows, changes and sees, and what nobody tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from feint.core import spec
from feint.core.errors import FeintError
from feint.evaluation import SCENARIOS, Cell, CellResult
from feint.evaluation.attackers import EOT_DRAWS, ParsedAttack, parse_attack
from feint.reports import words
from feint.reports.data import ReportData, threats
from feint.reports.layout import knowledge

__all__ = ["Settings", "attackers", "card", "uncovered"]

_GOALS = {
    False: "any wrong label (untargeted)",
    True: "the label that the attacker chose (targeted)",
}
_NORMS = ("linf", "l2", "l1", "l0")


@dataclass(frozen=True)
class Settings:
    """How one kind of attacker went about it, as text; empty where a setting means nothing."""

    scenario: str
    attack: str
    steps: str
    restarts: str
    draws: str
    """Draws that each gradient averages over, or what estimates it."""
    loss: str
    rule: str
    """Backward rule of the defense."""


def attackers(data: ReportData) -> list[Settings]:
    """Every attack of the table with its effective settings, presets and defaults included."""
    random = {r.cell.defense: r.draws > 1 for r in data.results if r.draws > 1}
    found = [
        _settings(r.cell, random.get(r.cell.defense, False))
        for r in data.results
        if r.cell.attack != "none"
    ]
    return list(dict.fromkeys(found))


def _settings(cell: Cell, random: bool) -> Settings:
    plain = Settings(cell.scenario, words.attack_words(cell), "", "", "", "", "")
    try:
        parsed = parse_attack(cell.attack)
    except FeintError:
        return plain  # of another version of Feint, or of a plug-in that is not installed
    through = SCENARIOS[cell.scenario].attacked == "pipeline" and parsed.needs_gradient
    rule = "" if not through or cell.defense == "none" else cell.backward
    return Settings(
        cell.scenario,
        plain.attack,
        _number(parsed, "steps"),
        _number(parsed, "restarts"),
        _draws(cell, parsed, random),
        _text(parsed, "loss"),
        "each part's own" if rule == "default" else rule,
    )


def _number(parsed: ParsedAttack, key: str) -> str:
    return str(parsed.effective(key)) if key in parsed.info.parameters else ""


def _text(parsed: ParsedAttack, key: str) -> str:
    value = parsed.effective(key) if key in parsed.info.parameters else None
    return value.replace("_", " ") if isinstance(value, str) else ""


def _draws(cell: Cell, parsed: ParsedAttack, random: bool) -> str:
    typed = spec.parse(cell.attack)
    named = typed.keywords.get("gradient") if isinstance(typed, spec.Call) else None
    if named is not None:
        return spec.format_value(named)
    if not random or SCENARIOS[cell.scenario].attacked not in ("pipeline", "parts"):
        return ""
    return f"eot({EOT_DRAWS})" if "gradient" in parsed.info.parameters else ""


def card(data: ReportData) -> list[tuple[str, list[str]]]:
    """The card's entries: a name and its lines."""
    cells = [r.cell for r in data.results]
    attacked = [c for c in cells if c.attack != "none"]
    used = [s for s in SCENARIOS if s in {c.scenario for c in attacked}]
    draws = sorted({r.draws for r in data.results if r.draws > 1})
    votes = sorted({(c.votes, c.combine) for c in cells if c.votes > 1})
    rules = list(dict.fromkeys(c.backward for c in attacked))
    random = (
        "The attacker knows the distribution of the pipeline's draws and may average over draws of "
        "his own; the draws that judge are others, held out."
        if draws
        else "Nothing in these pipelines is random."
    )
    judged = (
        f"{' or '.join(map(str, draws))} fresh draws per image where the pipeline is random, one "
        "forward pass where it is not"
        if draws
        else "one forward pass per image"
    )
    return [
        ("Goal", [_GOALS[t] for t in dict.fromkeys(c.targeted for c in attacked)] or ["none"]),
        (
            "Budget",
            [
                f"{norm} at most {words.budget(norm, eps)} ({eps:.6g} of a [0, 1] image), and "
                "every pixel in [0, 1]"
                for norm, eps, _ in dict.fromkeys(threats(data.results))
            ]
            or ["none"],
        ),
        ("Controls", ["the whole image, once, at test time; nothing of training or of the model"]),
        ("Randomness", [random]),
        ("Judge", [judged]),
        ("Votes", [f"{n} draws per prediction, by {how}" for n, how in votes] or ["none"]),
        (
            "Backward rules",
            ["each defense's own choice" if r == "default" else r for r in rules] or ["none"],
        ),
        ("Queries and gradients", ["not limited but by each attack's own settings, counted"]),
        ("Seeds", [", ".join(map(str, dict.fromkeys(c.seed for c in cells))) or "none"]),
        ("Data", _samples(data)),
        ("Knowledge", [f"{s}: {knowledge(s)}" for s in used] or ["there is no attacker"]),
    ]


def _samples(data: ReportData) -> list[str]:
    """Which samples, and by what rule they were taken."""
    known = data.metadata.get("data")
    counts = sorted({len(r.rows["index"]) for r in data.results})
    if not isinstance(known, Mapping):
        return [f"{' or '.join(map(str, counts)) or 'no'} images"]
    lines = [str(known.get("text", ""))]
    taken, available = known.get("samples"), known.get("available")
    if taken == available:
        lines.append("all of them")
    else:
        lines.append(
            f"taken: the first {taken} in the order of a keyed hash of the samples' indices, which "
            "no model and no label has a part in; fewer are always a subset of more"
        )
    return [line for line in lines if line]


def uncovered(data: ReportData) -> list[str]:
    """What the run says nothing about: rungs that were not run, other threats, other data."""
    attacked = [r.cell for r in data.results if r.cell.attack != "none"]
    defended = [c for c in attacked if c.defense != "none"]
    run = {c.scenario for c in attacked}
    skipped = [] if defended else ["gray-box", "removal", "semi-brute-force"]
    missing = [s for s in SCENARIOS if s != "none" and s not in run and s not in skipped]
    lines = [f"not run: {name} ({knowledge(name)})" for name in missing]
    norms = {c.norm for c in attacked}
    other = [n for n in _NORMS if n not in norms]
    if other:
        lines.append(f"other norms: {', '.join(other)}; larger budgets")
    goals = {c.targeted for c in attacked}
    if len(goals) == 1:
        lines.append("targeted attacks" if goals == {False} else "untargeted attacks")
    lines += [
        "rotations, patches, changes of color or weather, and anything else that no norm bounds",
        "training data, model theft, side channels, and shifts of the data without an attacker",
        f"images beyond {_counted(data.results)}: the intervals speak of images like these",
        "attacks that nobody has thought of: every number is an upper bound",
    ]
    return lines


def _counted(results: Sequence[CellResult]) -> str:
    most = max((len(r.rows["index"]) for r in results), default=0)
    return f"these {most}"
