"""From cells and findings to plain words, by written rules.

Rules:
    1. The bound of a pipeline is its per-sample worst case over the cells that judge the deployed
       pipeline (the same votes, too) within one threat model: the attacks of its norm and goal
       with its budget or less, and no attack at all. Never an average over attacks.
    2. It is an *upper* bound on robust accuracy; nothing is ever called robust.
    3. A `fail` among the findings withholds the verdict, and the text says which, and why. But what
       only doubts the attackers' strength can only mean that a bound is too high; where every bound
       of that pipeline is zero (less than half a sample stands) it counts as a `warn`.
    4. The grade is F with a `fail`; otherwise A without, B with up to two and C with more `warn`.
       What the budget of the checks did not allow is unknown, and a `warn`: one for each check,
       however many pipelines it would have looked at. So nothing that was not made leads to an A.
    5. A pipeline that no attacker met who knows it (white-box or adaptive) has no bound: its
       verdict is withheld, grade F.
    6. Every number comes with its 95 % interval, its count, and the number of attacks behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feint.evaluation.checklist import CHECKS
from feint.evaluation.findings import Finding
from feint.evaluation.metrics import Rate
from feint.evaluation.results import CellResult, by_deployment, worst
from feint.evaluation.scenarios import get_scenario

__all__ = ["INFORMED", "Bound", "Verdict", "bounds", "conclude", "eps_text", "name_of"]

INFORMED = ("white-box", "adaptive")
"""Scenarios whose attacker has everything but the draws themselves: a bound may rest on them."""
_OTHERS = ("model", "source")
"""What an attacker attacks who does not know of the defense."""


@dataclass(frozen=True)
class Bound:
    """A pipeline's clean accuracy and its per-sample worst case within one threat model."""

    model: str
    defense: str
    norm: str
    eps: float
    targeted: bool
    clean: Rate | None
    worst: Rate | None
    """None if no white-box attacker was tried."""
    gray: Rate | None
    """Worst case over attackers who do not know of the defense: what is usually published."""
    attacks: int
    votes: int = 1
    combine: str = "mean_probability"


@dataclass(frozen=True)
class Verdict:
    """The conclusion of a run."""

    text: str
    grade: str
    withheld: bool
    bounds: tuple[Bound, ...]
    failed: tuple[str, ...] = ()
    """The checks that withhold it."""


def name_of(model: str, defense: str) -> str:
    """A pipeline in words."""
    return model if defense == "none" else f"{model} + {defense}"


def eps_text(eps: float) -> str:
    """8/255 where it is one below 1, a plain number otherwise."""
    levels = eps * 255
    near = round(levels)
    return f"{near}/255" if 0 < near < 255 and abs(levels - near) < 1e-6 else f"{eps:g}"


def bounds(results: Sequence[CellResult]) -> list[Bound]:
    """One bound for each deployed pipeline and threat model, in order of appearance."""
    found = []
    for (model, defense, votes, combine), group in by_deployment(results).items():
        judged = [r for r in group if get_scenario(r.cell.scenario).judged == "pipeline"]
        clean = [r for r in judged if r.cell.attack == "none"]
        threats = dict.fromkeys(
            (r.cell.norm, r.cell.eps, r.cell.targeted) for r in judged if r.cell.attack != "none"
        )
        for norm, eps, targeted in threats:
            attacked = [r for r in judged if r.cell.attack != "none" and _within(r, norm, eps)]
            attacked = [r for r in attacked if r.cell.targeted == targeted]
            gray = [r for r in attacked if get_scenario(r.cell.scenario).attacked in _OTHERS]
            knowing = any(r.cell.scenario in INFORMED for r in attacked)
            found.append(
                Bound(
                    model,
                    defense,
                    norm,
                    eps,
                    targeted,
                    clean[0].accuracy if clean else None,
                    worst([*clean[:1], *attacked]) if knowing else None,
                    worst(gray) if gray else None,
                    len(attacked),
                    votes,
                    combine,
                )
            )
    return found


def _within(result: CellResult, norm: str, eps: float) -> bool:
    """Whether what the cell's attacker may do, an attacker of this threat model may do, too."""
    return result.cell.norm == norm and result.cell.eps <= eps


def _sentence(bound: Bound) -> str:
    threat = f"{bound.norm} {eps_text(bound.eps)}" + (", targeted" if bound.targeted else "")
    name = name_of(bound.model, bound.defense)
    if bound.votes > 1:
        name += f" ({bound.votes} votes, {bound.combine})"
    if bound.worst is None:
        return f"{name}: no attacker who knows the defense was tried, so there is no bound."
    text = f"{name}: upper bound on robust accuracy {bound.worst} at {threat}"
    if bound.clean is not None:
        text += f", clean accuracy {bound.clean}"
    if bound.gray is not None:
        text += f"; against attackers who do not know of the defense {bound.gray}"
    tried = "1 attack" if bound.attacks == 1 else f"{bound.attacks} attacks"
    return text + f" (worst case of {tried} per sample, n = {bound.worst.n})."


def _reason(finding: Finding) -> str:
    return f"{finding.check} failed because, for {finding.subject}, {finding.evidence}."


def _fell(finding: Finding, found: Sequence[Bound]) -> bool:
    """Whether a doubt about the attackers' strength is idle: nothing of its pipeline stands."""
    check = CHECKS.get(finding.check)
    if check is None or not check.strength:
        return False
    own = [b for b in found if f"{finding.subject},".startswith(f"{name_of(b.model, b.defense)},")]
    return bool(own) and all(b.worst is not None and b.worst.value * b.worst.n < 0.5 for b in own)


def conclude(results: Sequence[CellResult], findings: Sequence[Finding]) -> Verdict:
    """Apply the rules above."""
    found = bounds(results)
    failed: dict[str, Finding] = {}
    idle: dict[str, Finding] = {}
    for finding in findings:
        if finding.status == "fail":
            (idle if _fell(finding, found) else failed).setdefault(finding.check, finding)
    unbounded = [b for b in found if b.worst is None]
    warned = sum(f.status == "warn" and f.made for f in findings) + len(idle)
    warned += len({f.check for f in findings if not f.made})
    text = "\n".join(map(_sentence, found)) or "No deployed pipeline was attacked: no verdict."
    withheld = bool(failed or unbounded or not found)
    if idle:
        why = "\n  ".join(map(_reason, idle.values()))
        text = f"{text}\nNothing stands, so that this can have made no bound too high: {why}"
    if failed:
        why = "\n  ".join(map(_reason, failed.values()))
        text = f"Not trustworthy: {why}\n{text}"
    grade = "F" if withheld else "A" if warned == 0 else "B" if warned <= 2 else "C"
    return Verdict(text, grade, withheld, tuple(found), tuple(failed))
