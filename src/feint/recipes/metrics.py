"""What a recipe can measure: metrics by name, each from a point's fields to a number.

A metric that is read from an evaluation's cells says which cells it needs; all cells of a recipe
are computed in one run, and equal ones once. To add a metric, write one function here, or in
`feint.recipes.measures` if it needs the models themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from dataclasses import fields as fields_of
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from feint.core.errors import ConfigError, RangeError, UnknownNameError
from feint.defenses import parse
from feint.diagnostics.numbers import Measured, Number, mean
from feint.evaluation import Cell, CellResult, rung_cells
from feint.evaluation.budgets import rms_budget
from feint.evaluation.effort import effort_curve
from feint.evaluation.metrics import Rate, rate, ratio
from feint.evaluation.results import worst_shares
from feint.training.recipe import parse_fraction

__all__ = ["METRICS", "Case", "Fields", "Metric", "attacked_cells", "metric", "metric_of"]

Fields = Mapping[str, Any]
Cells = dict[str, list[Cell]]
_CELL = frozenset(f.name for f in fields_of(Cell))


@dataclass(frozen=True)
class Case:
    """What a metric is read from.

    Attributes:
        fields: Of the point.
        cells: Results of the cells that the metric asked for, by the name that it gave them.
        lab: Models and data, for what is not in cells.
    """

    fields: Fields
    cells: Mapping[str, list[CellResult]]
    lab: Any

    def shares(self, name: str = "attacked") -> NDArray[np.float64]:
        """(N,) share correct of every sample, the per-sample worst case of the cells."""
        return worst_shares(self.cells[name])

    def draws(self, name: str = "attacked") -> int:
        """The judge's draws."""
        return min(r.draws for r in self.cells[name])


@dataclass(frozen=True)
class Metric:
    """A metric."""

    name: str
    summary: str
    """What it is and which fields of a point it reads, as `feint list metrics` prints it."""
    share: bool
    """Whether it is a share, which people read in percent."""
    ask: Callable[[Fields, tuple[int, ...]], Cells]
    """Cells by name, from a point's fields and the shape of its images."""
    read: Callable[[Case], Measured | Number | Rate]
    models: bool = False
    """Whether it needs the models themselves, and is kept in the lab's memory."""

    def __call__(self, case: Case) -> Measured:
        """The number, with what a figure needs beside it."""
        found = self.read(case)
        if isinstance(found, Rate):
            found = Number(found.value, found.n, found.low, found.high)
        return found if isinstance(found, Measured) else Measured({}, {"value": found})


METRICS: dict[str, Metric] = {}


def metric(
    name: str,
    *,
    share: bool = True,
    ask: Callable[[Fields, tuple[int, ...]], Cells] | None = None,
    models: bool = False,
) -> Callable[[Callable[[Case], Any]], Callable[[Case], Any]]:
    """Register a function as the metric of a name."""

    def register(read: Callable[[Case], Any]) -> Callable[[Case], Any]:
        if name in METRICS:
            raise ConfigError(f"there are two metrics {name!r}")
        summary = " ".join((read.__doc__ or "").split())
        METRICS[name] = Metric(name, summary, share, ask or _nothing, read, models)
        return read

    return register


def metric_of(fields: Fields) -> Metric:
    """The metric that a point's fields name.

    Raises:
        ConfigError: None is named.
        UnknownNameError: No such metric.
    """
    name = fields.get("metric")
    if name is None:
        raise ConfigError("a point has no field 'metric'; set it in `base` or by an axis")
    if name not in METRICS:
        raise UnknownNameError("metric", str(name), METRICS)
    return METRICS[name]


def _nothing(fields: Fields, shape: tuple[int, ...]) -> Cells:
    return {}


# --- cells ----------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _written(expression: str) -> str:
    """A defense as a cell writes it; making one to find out may take reading its weights."""
    return str(parse(expression))


def cell_of(fields: Fields, shape: tuple[int, ...], **changes: Any) -> Cell:
    """A cell of a point's fields; `norm: rms` is S1's budget."""
    own = {key: value for key, value in {**fields, **changes}.items() if key in _CELL}
    try:
        own["eps"] = float(parse_fraction(own.get("eps", 8 / 255)))  # type: ignore[arg-type]
    except (ValueError, TypeError):
        what = f"eps is {own['eps']!r}; expected a number or a fraction such as 8/255"
        raise ConfigError(what) from None
    if own.get("norm") == "rms":
        own["norm"], own["eps"] = "l2", rms_budget(own["eps"], shape)
    defense = _written(str(own.get("defense", "none")))
    own["defense"] = defense
    if "attack" not in own or own["attack"] == "none":
        own.update(scenario="none", attack="none", source="")
    if own["scenario"] != "transfer":
        own["source"] = ""
    return Cell(**own)


def attacked_cells(fields: Fields, shape: tuple[int, ...]) -> list[Cell]:
    """The cells whose worst case per sample a point is: one, those of `attacks`, or a search.

    `attacks` lists attack expressions, or mappings with `attack` and `backward`. A point whose
    scenario is `adaptive` and that names no attacks gets the whole search, the first `most` of it.
    """
    named = fields.get("attacks")
    if named is not None:
        made = []
        for entry in named:
            own = {"attack": entry} if isinstance(entry, str) else dict(entry)
            made.append(cell_of({**fields, **own}, shape))
        return list(dict.fromkeys(made))
    if fields.get("scenario") == "adaptive":
        base = cell_of(fields, shape, scenario="none", attack="none")
        chain = None if base.defense == "none" else parse(base.defense)
        found = rung_cells(base, "adaptive", [], defense=chain, steps=int(fields.get("steps", 40)))
        return found[: int(fields["most"])] if "most" in fields else found
    return [cell_of(fields, shape)]


def _attacked(fields: Fields, shape: tuple[int, ...]) -> Cells:
    return {"attacked": attacked_cells(fields, shape)}


def _and_clean(fields: Fields, shape: tuple[int, ...]) -> Cells:
    """The attacked cells, and the bare classifier on clean images."""
    bare = str(fields.get("clean_model", fields["model"]))
    clean = cell_of({**fields, "model": bare}, shape, attack="none", defense="none")
    return {"attacked": attacked_cells(fields, shape), "clean": [clean]}


def _bare(fields: Fields, shape: tuple[int, ...]) -> Cells:
    """The bare classifier under the attack on itself, and on clean images."""
    own = {**fields, "defense": "none", "scenario": "white-box", "votes": 1, "backward": "default"}
    return _and_clean(own, shape)


@metric("accuracy", ask=_attacked)
def _accuracy(case: Case) -> Rate:
    """Share of samples that the judged pipeline gets right."""
    return rate(case.shares(), case.draws())


@metric("majority accuracy", ask=_attacked)
def _majority(case: Case) -> Rate:
    """Share of samples that the majority vote over the judge's draws gets right."""
    right = [r.rows["prediction"] == r.rows["label"] for r in case.cells["attacked"]]
    return rate(np.min(np.stack(right).astype(float), 0))


@metric("attack survival", ask=_bare)
def _survival(case: Case) -> Rate:
    """S0: accuracy of the bare classifier under attack over its clean accuracy."""
    return ratio(case.shares(), case.shares("clean"))


@metric("defense success", ask=_and_clean)
def _success(case: Case) -> Rate:
    """S0: accuracy of the defended classifier under attack over the clean accuracy of the bare."""
    return ratio(case.shares(), case.shares("clean"))


@metric("accuracy of the right", ask=_and_clean)
def _of_the_right(case: Case) -> Rate:
    """Accuracy over the images that the bare classifier gets right without attack (S1, S2)."""
    right = case.shares("clean") > 0.5
    if not right.any():
        raise RangeError("the bare classifier gets no clean image right; there is nothing to count")
    return rate(case.shares()[right], case.draws())


@metric("newly misclassified", ask=_and_clean)
def _newly(case: Case) -> Rate:
    """S3: share of the rightly classified images that are misclassified under attack."""
    right = case.shares("clean") > 0.5
    if not right.any():
        raise RangeError("the bare classifier gets no clean image right; there is nothing to count")
    return rate(1 - case.shares()[right], case.draws())


@metric("attack success", ask=_attacked)
def _hits(case: Case) -> Rate:
    """S1's ASR: share of draws that give the attacker's target; of several attacks the best."""
    if all(r.cell.attack == "none" for r in case.cells["attacked"]):
        aimed = case.cells["attacked"][0]
        return rate(aimed.rows["target_hits"] / aimed.rows["draws"], aimed.draws)
    return max((r.hits for r in case.cells["attacked"]), key=lambda found: found.value)


def _distance(name: str) -> None:
    def read(case: Case) -> Number:
        rows = [r.rows[name] for r in case.cells["attacked"]]
        return mean(torch.from_numpy(np.mean(np.stack(rows), 0)), (0.0, np.inf))

    read.__doc__ = f"Mean {name} distance of the attacked images."
    metric(name, share=False, ask=_attacked)(read)


for _name in ("rms", "abs_l2", "relative_l2", "linf"):
    _distance(_name)


@metric("success by round", ask=_attacked)
def _by_round(case: Case) -> Measured:
    """Share of samples that have fallen on a draw of the attacker's own by the field `round`."""
    (result,) = case.cells["attacked"]
    wanted = float(case.fields["round"])
    curve = effort_curve(result, "rounds")
    before = [found for at, found in curve if at <= wanted]
    n = len(result.rows["index"])
    value = before[-1] if before else rate(np.zeros(n))
    arrays = {
        "round": np.array([at for at, _ in curve]),
        "share": np.array([found.value for _, found in curve]),
        "low": np.array([found.low for _, found in curve]),
        "high": np.array([found.high for _, found in curve]),
    }
    return Measured(arrays, {"value": Number(value.value, value.n, value.low, value.high)})


@metric("rounds to success", share=False, ask=_attacked)
def _rounds_to(case: Case) -> Number:
    """First round by which the field `success_share` of the samples has fallen; None if none."""
    (result,) = case.cells["attacked"]
    share = float(case.fields["success_share"])
    for at, found in effort_curve(result, "rounds"):
        if found.value >= share - 1e-9:
            return Number(at, found.n)
    return Number(None, len(result.rows["index"]))
