"""Checks of one cell's rows: did the attack do anything, within the rules, and for good."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import stats

from feint.evaluation.attackers import parse_attack
from feint.evaluation.findings import Finding, Status
from feint.evaluation.health.coin import coin_control
from feint.evaluation.health.words import card, cell_words, knows, steps_of, surrogate
from feint.evaluation.results import CellResult

__all__ = ["check_cell"]


def check_cell(
    result: CellResult, stochastic: bool | None = None, answered: bool = False
) -> Iterator[Finding]:
    """Checks of one cell's rows; a cell without attacker has none but of its judge.

    Args:
        result: The cell.
        stochastic: Whether what is judged is random; by default, whether it was judged on several
            draws.
        answered: Whether an attacker who knows the same pipeline was tried, too.
    """
    cell = result.cell
    stochastic = result.draws > 1 if stochastic is None else stochastic
    name = cell_words(cell)
    if stochastic:
        yield _judged(result, name)
    if cell.attack == "none":
        return
    yield _moves(result, name)
    yield _budget(result, name)
    yield _rounded(result, name)
    yield _card(result, stochastic, name)
    if surrogate(cell):
        yield _transfer(result, answered, name)
    if not knows(cell):
        return  # what the attacker saw was not what is judged
    if stochastic:
        yield _luck(result, name)
        yield _votes(result, name)
    else:
        yield _silent(result, name)
    if "steps" in parse_attack(cell.attack).info.parameters:
        yield _settled(result, name)
        yield _rounds(result, name)


def _judged(result: CellResult, name: str) -> Finding:
    rows, accuracy = result.rows, result.accuracy
    coin, right = coin_control(result.cell.judge_draws)
    fair = coin.low <= right <= coin.high
    single = int(rows["draws"].min()) < 2
    evidence = (
        f"judged on {int(rows['draws'].min())} held-out draws per sample, accuracy {accuracy}; a "
        f"coin that is right with probability {right:g} comes out at {coin} (must hold it)"
    )
    status: Status = "fail" if single or not fair else "pass"
    return Finding("judged-on-fresh-draws", status, name, evidence)


def _card(result: CellResult, stochastic: bool, name: str) -> Finding:
    status: Status = "warn" if result.cell.eps == 0 else "pass"
    return Finding("threat-model-card", status, name, card(result.cell, stochastic))


def _transfer(result: CellResult, answered: bool, name: str) -> Finding:
    hit = result.rows["first_hit"] >= 0
    held = hit & (result.shares > 0.5)
    share = float(held.sum() / max(1, hit.sum()))
    bad = share > 0.5 and not answered
    evidence = (
        f"the surrogate fell on {int(hit.sum())} samples; on {100 * share:.0f} % of them the "
        "deployed pipeline did not (warn above 50 % if no attacker who knows it was tried)"
    )
    return Finding("transfer-failure", "warn" if bad else "pass", name, evidence)


def _silent(result: CellResult, name: str) -> Finding:
    check, rows = "silent-success", result.rows
    if parse_attack(result.cell.attack).info.goal == "minimal":
        evidence = "a minimal attack may see a success beyond the budget: nothing is hidden by that"
        return Finding(check, "pass", name, evidence)
    seen = rows["first_hit"] >= 0
    goal = rows["target_hits"] > 0 if result.cell.targeted else result.shares <= 0.5
    silent = int((seen & ~goal).sum())
    share = silent / len(seen)
    return Finding(
        check,
        "fail" if share > 0.02 else "warn" if silent else "pass",
        name,
        f"the attack saw a success on {int(seen.sum())} samples and returned none on {silent} of "
        "them (must be 0; fail above 2 % of all)",
    )


def _votes(result: CellResult, name: str) -> Finding:
    """Majority votes read off the judged draws; a vote is right if more than half of them are."""
    right, draws = result.rows["correct"].astype(int), result.rows["draws"].astype(int)
    most = int(draws.min())
    sizes = [n for n in (1, 3, 5, 9, 17, 33) if n <= most]
    # The share of the sets of n judged draws of which more than half are right.
    found = {n: float(stats.hypergeom.sf(n // 2, draws, right, n).mean()) for n in sizes}
    rise = max(found.values()) - found.get(1, 0.0)
    listed = ", ".join(f"{n}: {100 * value:.1f} %" for n, value in found.items())
    return Finding(
        "votes",
        "warn" if rise > 0.1 else "pass",
        name,
        f"accuracy on these images by majority of n draws – {listed} (warn if votes raise it by "
        "more than 10 points: the number holds for what was attacked; deploy and attack votes with "
        "votes=n)",
    )


def _rounds(result: CellResult, name: str) -> Finding:
    """Rounds to the first success; what was never broken is censored at the last round."""
    check, first = "successes-have-settled", result.rows["first_hit"]
    if np.isnan(result.rows["late_gain"]).any():
        return Finding(check, "pass", name, "the attack has no trace: its first hits are not known")
    hits, n = np.sort(first[first >= 0]), len(first)
    last = steps_of(parse_attack(result.cell.attack)) or int(first.max(initial=0))
    late = int((hits > last - max(1, last // 10)).sum()) if last >= 10 else 0
    half = f"half of all by round {hits[(n + 1) // 2 - 1]}" if len(hits) * 2 >= n else "never half"
    return Finding(
        check,
        "warn" if late / n > 0.02 else "pass",
        name,
        f"of {n} samples {len(hits)} showed a success within {last} rounds ({half}; the other "
        f"{n - len(hits)} are censored), {late} in the last tenth of the rounds (warn above 2 %: "
        "the attack was still breaking samples)",
    )


def _moves(result: CellResult, name: str) -> Finding:
    cell, unchanged = result.cell, result.rows["unchanged"]
    if cell.eps == 0:
        return Finding("attack-moves", "pass", name, "the budget is zero: nothing can move")
    # Wrong without any change: there was nothing to do.
    idle = unchanged & (result.shares > 0.5)
    done = 1 - float(idle.mean())
    evidence = f"{100 * done:.0f} % of the images were changed or needed no change"
    if parse_attack(cell.attack).info.goal == "minimal":
        # A sample whose nearest adversarial image lies beyond the budget stays as it is.
        none = bool(idle.any()) and bool(unchanged.all())
        evidence += " (warn if no image at all was changed: broken, or a budget too small)"
        return Finding("attack-moves", "warn" if none else "pass", name, evidence)
    status: Status = "pass" if done > 0.5 else "fail"
    return Finding("attack-moves", status, name, evidence + " (fail up to 50 %)")


def _budget(result: CellResult, name: str) -> Finding:
    cell, rows = result.cell, result.rows
    largest, outside = float(rows["size"].max()), abs(float(rows["outside"].max()))
    ok = largest <= cell.eps * (1 + 1e-6) and outside == 0
    return Finding(
        "budget-and-box",
        "pass" if ok else "fail",
        name,
        f"largest perturbation {largest:.8g} in {cell.norm} for eps {cell.eps:.8g} in float64 "
        f"({float(rows['size_8bit'].max()):.8g} after rounding to 8 bits); pixels leave [0, 1] by "
        f"at most {outside:.2g}",
    )


def _rounded(result: CellResult, name: str) -> Finding:
    rounded, exact = result.accuracy_8bit, result.accuracy
    gap = rounded.value - exact.value
    return Finding(
        "survives-8-bit",
        "warn" if gap > 0.05 else "pass",
        name,
        f"accuracy {exact} on the images as found, {rounded} after rounding to 8 bits (warn if it "
        "rises by more than 5 points)",
    )


def _luck(result: CellResult, name: str) -> Finding:
    check = "single-draw-luck"
    if np.isnan(result.rows["late_gain"]).any():
        return Finding(check, "pass", name, "the attack has no trace: its first hits are not known")
    hit = float((result.rows["first_hit"] >= 0).mean())
    held = 1 - result.accuracy.value
    ever = 1 - result.accuracy_after(int(result.rows["draws"].min())).value
    return Finding(
        check,
        "warn" if hit - held > 0.1 else "pass",
        name,
        f"the attack saw at least one success on {100 * hit:.1f} % of the samples; on "
        f"{result.draws} fresh draws {100 * held:.1f} % are wrong on average, "
        f"{100 * ever:.1f} % at least once (warn if the first exceeds the second by more than "
        "10 points: first hits would overstate the attack; the numbers here do not count them)",
    )


def _settled(result: CellResult, name: str) -> Finding:
    check, rows = "loss-has-settled", result.rows
    standing = result.shares > 0.5
    gain = rows["late_gain"][standing]
    if np.isnan(gain).any():
        return Finding(check, "pass", name, "the attack has no trace: its losses are not known")
    late = float((gain > 0.05).mean()) if standing.any() else 0.0
    return Finding(
        check,
        "warn" if late > 0.5 else "pass",
        name,
        f"of {int(standing.sum())} samples still standing, {100 * late:.0f} % gained more than "
        "5 % of their loss's rise in the last tenth of the steps (warn above 50 %: give more "
        "steps)",
    )
