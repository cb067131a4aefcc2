"""Which checks a run is asked to make of itself, and how much they may cost, from one option."""

from __future__ import annotations

import math
from collections.abc import Iterable

from feint.core.errors import ConfigError, UnknownNameError
from feint.evaluation.checklist import COSTLY

__all__ = ["SHARE", "budget_of", "chosen"]

SHARE = 0.5
"""What the quick checks may cost, as a share of the cells that they judge."""
_BUDGET = "budget="


def chosen(text: str) -> tuple[str, ...]:
    """What an option asks for beside the quick checks in their usual budget.

    Args:
        text: `"quick"` (nothing), `"all"`, or names of costly checks with commas; `budget=2` among
            them allows the quick checks twice what the cells took, `budget=none` whatever they
            cost.

    Returns:
        Names of costly checks, and last the budget if it is not the usual one.

    Raises:
        UnknownNameError: A name that is no costly check; the nearest one is named.
        ConfigError: A budget that is no number above zero.
    """
    parts = [n.strip() for n in text.split(",") if n.strip() not in ("", "quick")]
    names = [n for n in parts if not n.startswith(_BUDGET)]
    budgets = [_share(n) for n in parts if n.startswith(_BUDGET)]
    if len(budgets) > 1:
        raise ConfigError(f"checks {text!r} name {len(budgets)} budgets; expected one at most")
    for name in names:
        if name not in (*COSTLY, "all"):
            known = (*COSTLY, "all", "quick", f"{_BUDGET}NUMBER")
            raise UnknownNameError("check on request", name, known)
    asked = COSTLY if "all" in names else tuple(name for name in COSTLY if name in names)
    return (*asked, *(f"{_BUDGET}{share:g}" for share in budgets if share != SHARE))


def budget_of(asked: Iterable[str]) -> float:
    """The budget among what `chosen` gives: a share of the cells' cost, or infinity."""
    found = [_share(name) for name in asked if name.startswith(_BUDGET)]
    return found[0] if found else SHARE


def _share(text: str) -> float:
    value = text.removeprefix(_BUDGET).strip()
    try:
        share = math.inf if value == "none" else float(value)
    except ValueError:
        share = math.nan
    if not share > 0:
        raise ConfigError(
            f"the checks' budget is {value!r}; expected a number above 0 (a share of what the "
            "attacks took) or none, as in checks='budget=2'"
        )
    return share
