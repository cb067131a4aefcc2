"""Checks that need no pass through a model: the cells of a run against each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from feint.evaluation.findings import Finding
from feint.evaluation.health.words import attack_words, knows, surrogate
from feint.evaluation.metrics import mcnemar
from feint.evaluation.results import CellResult, by_deployment
from feint.evaluation.scenarios import get_scenario
from feint.evaluation.verdict import Bound, bounds, name_of

__all__ = ["check_across"]

FALLS = 0.1
"""Accuracy that an attack which works takes from a model without a defense."""
UNNOTICED, GAIN = 0.02, 0.1
"""A defense that costs no more than the first of these cannot be expected to gain the second."""


def check_across(results: Sequence[CellResult]) -> Iterator[Finding]:
    """Checks of a run's cells against each other.

    Args:
        results: All cells of a run.
    """
    found = bounds(results)
    yield _same_samples(results)
    yield from _worst(results, found)
    for (model, defense, *_), group in by_deployment(results).items():
        name = name_of(model, defense)
        judged = [r for r in group if get_scenario(r.cell.scenario).judged == "pipeline"]
        clean = next((r for r in judged if r.cell.attack == "none"), None)
        bare = [r for r in results if (r.cell.model, r.cell.defense) == (model, "none")]
        bare_clean = next((r for r in bare if r.cell.attack == "none"), None)
        if not judged:
            continue
        yield _clean(clean, None if defense == "none" else bare_clean, name)
        yield from _knowledge(judged, name)
        if defense == "none":
            continue
        yield from _undefended(judged, bare, bare_clean, name)
        if clean is not None and bare_clean is not None and max(r.draws for r in judged) > 1:
            yield from _invariance(clean, bare_clean, found, name)


def _same_samples(results: Sequence[CellResult]) -> Finding:
    first = results[0].rows["index"]
    others = sum(not np.array_equal(r.rows["index"], first) for r in results)
    evidence = (
        f"{others} of {len(results)} cells were judged on other samples than the first (its "
        f"{len(first)}); only equal ones can be compared in pairs"
    )
    return Finding("same-samples", "fail" if others else "pass", "run", evidence)


def _worst(results: Sequence[CellResult], found: Sequence[Bound]) -> Iterator[Finding]:
    """The verdict's bound is no average, and no cell of its threat model is below it."""
    groups = by_deployment(results)
    for bound in found:
        if bound.worst is None:
            continue
        key = (bound.model, bound.defense, bound.votes, bound.combine)
        inside = [
            r
            for r in groups[key]
            if r.cell.norm == bound.norm
            and r.cell.eps <= bound.eps
            and r.cell.targeted == bound.targeted
            and r.cell.attack != "none"
            and get_scenario(r.cell.scenario).judged == "pipeline"
        ]
        least = min(inside, key=lambda r: r.accuracy.value)
        bad = least.accuracy.high < bound.worst.value
        yield Finding(
            "worst-case-per-sample",
            "fail" if bad else "pass",
            name_of(bound.model, bound.defense),
            f"the bound is {bound.worst}, the worst of {len(inside)} single attacks at "
            f"{bound.norm} {bound.eps:.4g} leaves {least.accuracy} (the bound must not lie above "
            "its interval)",
        )


def _clean(clean: CellResult | None, bare: CellResult | None, name: str) -> Finding:
    check = "clean-accuracy"
    if clean is None:
        evidence = "accuracy without an attacker was not measured: 0 cells; add the scenario none"
        return Finding(check, "warn", name, evidence)
    labels = clean.rows["label"]
    chance = float(np.bincount(labels).max() / len(labels))
    varied = len(np.unique(labels)) > 1
    low = varied and clean.accuracy.low <= chance
    evidence = f"{clean.accuracy} without an attacker"
    if bare is not None:
        same = np.array_equal(clean.rows["index"], bare.rows["index"])
        paired = f", McNemar p = {mcnemar(clean.shares, bare.shares):.2g}" if same else ""
        evidence += f", {bare.accuracy} without the defense{paired}"
    evidence += (
        f"; the most frequent label alone would give {100 * chance:.1f} % (warn if the interval "
        "reaches that); every image gets a class, none is rejected"
    )
    return Finding(check, "warn" if low else "pass", name, evidence)


def _undefended(
    judged: Sequence[CellResult],
    bare: Sequence[CellResult],
    clean: CellResult | None,
    name: str,
) -> Iterator[Finding]:
    """The attacks on the defended pipeline, on the model without its defense."""
    attacks = {
        (r.cell.attack, r.cell.norm, r.cell.eps, r.cell.targeted) for r in judged if knows(r.cell)
    }
    tried = [
        r
        for r in bare
        if knows(r.cell)
        and (r.cell.attack, r.cell.norm, r.cell.eps, r.cell.targeted) in attacks
        and r.cell.eps > 0
    ]
    if not tried or clean is None:
        return
    best = min(tried, key=lambda r: r.accuracy.value)
    taken = clean.accuracy.value - best.accuracy.value
    weak = taken < FALLS and best.accuracy.value > FALLS
    yield Finding(
        "undefended-falls",
        "warn" if weak else "pass",
        name,
        f"the model without the defense has {clean.accuracy}, and {best.accuracy} under "
        f"{attack_words(best.cell.attack)} (warn if an attack takes less than {100 * FALLS:.0f} "
        "points from it: it is too weak to say anything about the defense)",
    )


def _knowledge(judged: Sequence[CellResult], name: str) -> Iterator[Finding]:
    """Transfer, gray-box, white-box: who knows more must not break less."""
    ranks: dict[tuple[str, float, bool], dict[int, list[CellResult]]] = {}
    for result in judged:
        if knows(result.cell) or surrogate(result.cell):
            threat = (result.cell.norm, result.cell.eps, result.cell.targeted)
            ranks.setdefault(threat, {}).setdefault(_rank(result), []).append(result)
    for levels in ranks.values():
        present = sorted(levels)
        for lower, higher in pairwise(present):
            less, more = (
                min(levels[level], key=lambda r: r.accuracy.value) for level in (lower, higher)
            )
            worse = more.accuracy.value > less.accuracy.value
            chance = mcnemar(less.shares, more.shares)
            yield Finding(
                "knowledge-helps",
                "warn" if worse and chance < 0.05 else "pass",
                name,
                f"{less.cell.scenario} leaves {less.accuracy}, {more.cell.scenario}, which knows "
                f"more, {more.accuracy} (McNemar p = {chance:.2g}; warn if the second is higher "
                "with p < 0.05)",
            )


def _rank(result: CellResult) -> int:
    """How much the attacker knows of what is judged."""
    if knows(result.cell):
        return 3 if result.cell.scenario == "adaptive" else 2
    return 0 if get_scenario(result.cell.scenario).attacked == "source" else 1


def _invariance(
    clean: CellResult, bare: CellResult, found: Sequence[Bound], name: str
) -> Iterator[Finding]:
    """Gao et al.: what the model hardly notices can hardly protect it."""
    cost = bare.accuracy.value - clean.accuracy.value
    threats = {(b.norm, b.eps, b.targeted): b for b in found if b.defense == "none"}
    for bound in found:
        if (bound.model, bound.defense) != (clean.cell.model, clean.cell.defense):
            continue
        other = threats.get((bound.norm, bound.eps, bound.targeted))
        if other is None or other.model != bound.model or not (bound.worst and other.worst):
            continue
        gain = bound.worst.value - other.worst.value
        bad = cost <= UNNOTICED and gain > GAIN
        yield Finding(
            "invariance",
            "warn" if bad else "pass",
            name,
            f"the defense's draws cost {100 * cost:.1f} points without an attacker and gain "
            f"{100 * gain:.1f} in the worst case (warn if they cost at most {100 * UNNOTICED:.0f} "
            f"and gain more than {100 * GAIN:.0f}: a model that does not notice its transforms "
            "owes them no robustness; look for masked gradients)",
        )
