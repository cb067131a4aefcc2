"""Numbers and names in words, the same in every report."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from feint.core import spec
from feint.core.errors import FeintError
from feint.evaluation import Cell, CellResult, Rate
from feint.evaluation.verdict import name_of
from feint.reports.data import Deployment, Threat

__all__ = [
    "attack_words",
    "budget",
    "columns_apart",
    "deployment_words",
    "interval",
    "interval_of",
    "mean",
    "passes",
    "percent",
    "rate_words",
    "significant",
    "threat_words",
]


def percent(value: float | None) -> str:
    """0.815 → "81.5"; nothing or NaN → "–"."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def interval_of(low: float, high: float) -> str:
    """An interval of two shares: "[75.5, 86.3]"."""
    return f"[{percent(low)}, {percent(high)}]"


def interval(rate: Rate) -> str:
    """A rate's 95 % interval: "[75.5, 86.3]"."""
    return interval_of(rate.low, rate.high)


def rate_words(rate: Rate) -> str:
    """Value and interval: "81.5 [75.5, 86.3]"."""
    return f"{percent(rate.value)} {interval(rate)}"


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits; "–" for NaN."""
    if math.isnan(value):
        return "–"
    return "0" if value == 0 else f"{value:.{digits}g}"


def mean(values: Iterable[float]) -> float:
    """Mean of the finite values; NaN if there are none."""
    array = np.asarray(values, dtype=np.float64)
    finite = array[np.isfinite(array)]
    return float(finite.mean()) if len(finite) else math.nan


def budget(norm: str, eps: float) -> str:
    """8/255 for a linf budget that is one, a plain number otherwise."""
    levels = eps * 255
    near = round(levels)
    if norm == "linf" and near and abs(levels - near) < 1e-6:
        return f"{near}/255"
    return f"{eps:g}"


def threat_words(threat: Threat) -> str:
    """A threat model in words: "linf 8/255, targeted"."""
    norm, eps, targeted = threat
    return f"{norm} {budget(norm, eps)}" + (", targeted" if targeted else "")


def deployment_words(key: Deployment) -> str:
    """A deployed pipeline in words, as the verdict spells it."""
    model, defense, votes, combine = key
    return name_of(model, defense) + (f" ({votes} votes, {combine})" if votes > 1 else "")


_FIRST = ("steps", "step_size", "restarts", "gradient")
"""Keywords that tell most about an attack, in the order in which they are shown."""


def _value(key: str, value: object) -> str:
    if not isinstance(value, float):
        return spec.format_value(value)
    return budget("linf", value) if key in ("eps", "step_size") else f"{value:.4g}"


def attack_words(cell: Cell) -> str:
    """A cell's attack in short: `pgd(ace, steps=40)`, its source, its backward rule."""
    if cell.attack == "none":
        return "–"
    try:
        typed = spec.parse(cell.attack)
    except FeintError:
        typed = None
    text = cell.attack
    if isinstance(typed, spec.Call):
        keywords = typed.keywords
        parts = [str(keywords.pop("preset"))] if "preset" in keywords else []
        order = [key for key in _FIRST if key in keywords]
        order += [key for key in keywords if key not in order]
        parts += [f"{key}={_value(key, keywords[key])}" for key in order]
        text = f"{typed.name}({', '.join(parts)})" if parts else typed.name
    if cell.source:
        text += f" from {cell.source}"
    if cell.backward != "default":
        text += f" via {cell.backward}"
    return text


def passes(result: CellResult) -> str:
    """Forward and backward passes per image; "–" where nothing was counted."""
    n = len(result.rows["index"])
    if result.cell.attack == "none" or not n or not result.forwards:
        return "–"
    return f"{_count(result.forwards / n)} / {_count(result.backwards / n)}"


def _count(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 and value != round(value) else f"{value:.0f}"


def columns_apart(texts: list[str], width: int) -> list[str]:
    """Texts cut to a width, so that different ones stay different."""
    width = max(width, 4)
    cut = [t if len(t) <= width else t[: width - 1] + "…" for t in texts]
    out = []
    for position, (short, text) in enumerate(zip(cut, texts, strict=True)):
        same = list(dict.fromkeys(t for c, t in zip(cut, texts, strict=True) if c == short))
        if short == text or len(same) == 1:
            out.append(short)
        else:
            mark = f"…{same.index(texts[position]) + 1}"
            out.append(text[: width - len(mark)] + mark)
    return out
