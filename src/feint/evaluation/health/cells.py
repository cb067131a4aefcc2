"""Checks of one cell's rows: did the attack do anything, within the rules, and for good."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from feint.evaluation.attackers import parse_attack
from feint.evaluation.cell import Cell
from feint.evaluation.findings import Finding, Status
from feint.evaluation.results import CellResult
from feint.evaluation.verdict import name_of

__all__ = ["check_cell"]


def check_cell(result: CellResult) -> Iterator[Finding]:
    """Checks of one cell's rows; a cell without attacker has none."""
    cell = result.cell
    if cell.attack == "none":
        return
    name = _cell_name(cell)
    yield _moves(result, name)
    yield _budget(result, name)
    yield _rounded(result, name)
    if cell.scenario != "white-box":
        return  # what the attacker saw was not what is judged
    if result.draws > 1:
        yield _luck(result, name)
    if "steps" in parse_attack(cell.attack).info.parameters:
        yield _settled(result, name)


def _cell_name(cell: Cell) -> str:
    return f"{name_of(cell.model, cell.defense)}, {cell.scenario}, {cell.attack}"


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
    largest, outside = float(rows["size"].max()), float(rows["outside"].max())
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
