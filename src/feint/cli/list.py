"""`feint list`: what there is, with sources and settings."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

import feint.attacks
import feint.defenses  # noqa: F401  (both register their components)
from feint.cli import common
from feint.core.errors import UnknownNameError
from feint.core.registry import ATTACKS, DEFENSES, Info
from feint.core.spec import format_value
from feint.evaluation import SCENARIOS
from feint.models import bundled, card
from feint.training.recipe import list_recipes, load_recipe

__all__ = ["list_names"]

_KINDS = ("attacks", "defenses", "models", "scenarios", "recipes", "metrics", "drawings")


def list_names(
    kind: Annotated[
        str | None, typer.Argument(help=f"One of {', '.join(_KINDS)}; all by default.")
    ] = None,
    as_json: common.Json = False,
) -> None:
    """List attacks, defenses, models, scenarios, training recipes, and what tables are made of.

    Metrics and drawings are for recipes of `feint reproduce`.
    """
    with common.guard():
        if kind is not None and kind not in _KINDS:
            raise UnknownNameError("kind", kind, _KINDS)
        found = {k: _entries(k) for k in ([kind] if kind else _KINDS)}
        if as_json:
            common.print_json(found)
            return
        for name, entries in found.items():
            common.out.print(_table(name, entries))


def _entries(kind: str) -> list[dict[str, object]]:
    if kind == "attacks":
        return [
            {
                **_common(ATTACKS[n]),
                "goal": ATTACKS[n].goal,
                "knowledge": ATTACKS[n].knowledge,
                "norms": list(ATTACKS[n].norms),
            }
            for n in ATTACKS
        ]
    if kind == "defenses":
        return [
            {
                **_common(DEFENSES[n]),
                "differentiable": DEFENSES[n].differentiable,
                "stochastic": DEFENSES[n].stochastic,
            }
            for n in DEFENSES
        ]
    if kind == "models":
        return [
            {**card(n), "name": n, "clean": card(n)["accuracy"]["clean"]["value"]}
            for n in bundled()
        ]
    if kind == "scenarios":
        return [{"name": s.name, "summary": s.knowledge} for s in SCENARIOS.values()]
    if kind in ("metrics", "drawings"):
        return _parts(kind)
    return [_recipe(n) for n in list_recipes()]


def _parts(kind: str) -> list[dict[str, object]]:
    """What recipes of tables and figures are made of; imported here, as it draws."""
    from feint.recipes.reproduce import METRICS
    from feint.reports.reproduction import DRAWINGS

    if kind == "metrics":
        return [
            {"name": m.name, "unit": "share" if m.share else "number", "summary": m.summary}
            for m in METRICS.values()
        ]
    return [
        {"name": n, "summary": " ".join((f.__doc__ or "").split())} for n, f in DRAWINGS.items()
    ]


def _recipe(name: str) -> dict[str, object]:
    told = load_recipe(name).model_dump(mode="json", exclude={"name"})
    makes = told.get("defense") or told["architecture"]
    lam = None if told.get("ace") is None else f"{float(told['ace']):g}"
    if lam == "inf":
        told["ace"] = lam  # JSON has no such number
    return {
        "name": name,
        "makes": makes if lam is None else f"{makes} behind ACE, λ={lam}",
        **told,
    }


def _common(info: Info) -> dict[str, object]:
    settings = {k: format_value(p.default) for k, p in info.parameters.items()}
    return {
        "name": info.name,
        "summary": info.summary,
        "paper": info.paper,
        "version": info.version,
        "presets": sorted(info.presets),
        "settings": settings,
    }


def _table(kind: str, entries: list[dict[str, object]]) -> Table:
    table = Table(title=kind, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("name", style="bold", no_wrap=True)
    facts = {
        "attacks": ("goal", "knowledge", "norms"),
        "defenses": ("differentiable", "stochastic"),
        "models": ("architecture", "ace", "clean"),
        "scenarios": (),
        "recipes": ("makes", "data", "epochs"),
        "metrics": ("unit",),
        "drawings": (),
    }[kind]
    for fact in facts:
        table.add_column(fact)
    if "summary" in entries[0]:
        table.add_column("what it is", ratio=1)
    for entry in entries:
        row = [str(entry["name"]), *(_show(entry.get(f)) for f in facts)]
        if "summary" in entry:
            row.append(str(entry["summary"]))
        table.add_row(*map(escape, row))
    return table


def _show(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, float) and 0 < value < 1:
        return f"{100 * value:.2f} %"
    if value == "?":  # whoever trains says
        return "yours"
    return "–" if value is None else str(value)
