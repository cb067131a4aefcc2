"""The papers' own quantities, each under its own name, from the cells of a run."""

from __future__ import annotations

from collections.abc import Sequence

from feint.core.errors import RangeError
from feint.evaluation.metrics import (
    Rate,
    attack_survival,
    defense_recovery,
    defense_success,
    newly_misclassified,
)
from feint.evaluation.results import CellResult
from feint.evaluation.scenarios import get_scenario

__all__ = ["PAPER_METRICS", "paper_metrics", "summary"]

PAPER_METRICS = {
    "attack_survival": "S0: the bare model's accuracy under the attack over its clean accuracy",
    "defense_success": "S0: accuracy under the attack over the bare model's clean accuracy",
    "defense_recovery": "S0's code: 1 − (clean − defended) / (clean − attacked), accuracies of "
    "bare, defended and attacked bare model",
    "acc": "S1: accuracy under the attack",
    "asr": "S1: share of the attacks that reach their target",
    "newly_misclassified": "S3: share of the correctly classified samples that the attack makes "
    "wrong",
}
"""What each name means."""


def paper_metrics(result: CellResult, results: Sequence[CellResult]) -> dict[str, Rate]:
    """The papers' quantities for one attacked cell.

    Args:
        result: A cell with an attack.
        results: All cells of the run: clean accuracies and the bare model under the same attack
            are looked up here.

    Returns:
        A rate for each name of `PAPER_METRICS` that the run's cells decide: S0's need the bare
        model's clean cell and, for survival and recovery, the bare model under the same attack;
        `asr` needs a targeted threat; `newly_misclassified` needs the judged pipeline's clean cell.
        Empty for a cell without attack.

    Example:
        >>> import torch
        >>> from feint.evaluation import evaluate
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).eval()
        >>> x = torch.rand(8, 3, 2, 2)
        >>> found = evaluate(model, x, model(x).argmax(1), attacks=["pgd(steps=2)"], eps=0.5)
        >>> sorted(paper_metrics(found.results[1], found.results))
        ['acc', 'attack_survival', 'defense_success', 'newly_misclassified']
    """
    cell = result.cell
    if cell.attack == "none":
        return {}
    found: dict[str, Rate] = {"acc": result.accuracy}
    if cell.targeted:
        found["asr"] = result.hits
    bare = _clean(results, cell.model, "none", 1)
    under = _bare_under(result, results)
    if bare is not None:
        _add(found, "defense_success", defense_success, result.shares, bare.shares)
    if bare is not None and under is not None:
        _add(found, "attack_survival", attack_survival, under.shares, bare.shares)
        if under is not result:
            _add(
                found,
                "defense_recovery",
                defense_recovery,
                result.shares,
                under.shares,
                bare.shares,
            )
    judged = get_scenario(cell.scenario).judged
    own = _clean(results, cell.model, cell.defense, cell.votes) if judged == "pipeline" else bare
    if own is not None:
        _add(
            found, "newly_misclassified", newly_misclassified, result.shares, own.shares, own.draws
        )
    return {name: found[name] for name in PAPER_METRICS if name in found}


def _add(found, name, metric, *facts) -> None:  # type: ignore[no-untyped-def]
    """A metric, if its denominator is not zero."""
    try:
        found[name] = metric(*facts)
    except RangeError:
        return


def _clean(
    results: Sequence[CellResult], model: str, defense: str, votes: int
) -> CellResult | None:
    wanted = ("none", model, defense, votes)
    cells = ((r, r.cell) for r in results)
    return next((r for r, c in cells if (c.scenario, c.model, c.defense, c.votes) == wanted), None)


def _bare_under(result: CellResult, results: Sequence[CellResult]) -> CellResult | None:
    """The bare model under the same attack and threat."""
    cell = result.cell
    wanted = (cell.model, cell.attack, cell.norm, cell.eps, cell.targeted)
    for other in results:
        c = other.cell
        if (
            c.scenario == "white-box"
            and c.defense == "none"
            and (c.model, c.attack, c.norm, c.eps, c.targeted) == wanted
        ):
            return other
    return None


def summary(results: Sequence[CellResult]) -> list[dict[str, object]]:
    """Plain data: every cell's `as_dict` with the papers' quantities under `"papers"`."""
    return [
        {
            **result.as_dict(),
            "papers": {k: v.as_dict() for k, v in paper_metrics(result, results).items()},
        }
        for result in results
    ]
