"""The report of a run directory."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.errors import DataError, GradientError
from feint.core.gradients import backprop, call, eot, is_stochastic
from feint.core.losses import margin
from feint.defenses import Defense
from feint.evaluation import CellResult
from feint.evaluation.attackers import EOT_DRAWS
from feint.evaluation.verdict import conclude
from feint.reports.attached import attached
from feint.reports.data import Claim, Gradients, Images, ReportData, Seen, Views
from feint.store import Resolver, StoredRun

__all__ = ["OF_CLEAN", "from_run"]

OF_CLEAN = ("defense success", "defense success rate")
"""Labels of published numbers that are shares of clean accuracy: S0's measure."""
_LEFT_OUT = ("schema", "spec", "given", "cells", "timing", "sha256")


def from_run(
    run: StoredRun,
    *,
    resolver: Resolver | None = None,
    eps: float | None = None,
    html: str | Path = "",
) -> ReportData:
    """Everything that a report shows of a run on disk; images are read when a report asks.

    Args:
        run: The run, from `feint.store.open_run`.
        resolver: Gives the run's models, for heat maps of input gradients, probabilities, and what
            the models see behind their defenses; none of these without it.
        eps: The threat model's budget, where cells at other budgets only serve the curves: those
            leave the table, and the verdict is drawn anew without them. By default every cell is
            in the table.
        html: Where the page is or will be.

    Cost: No pass of a model; with `resolver`, for every image shown, `EOT_DRAWS` (one if nothing is
        random) forward and backward passes, and as many forward passes.
    """
    table = [r for r in run.results if eps is None or not _elsewhere(r, eps)]
    curve = [r for r in run.results if not any(r is kept for kept in table)]
    return ReportData(
        table,
        run.findings,
        conclude(table, run.findings) if curve else run.verdict,
        metadata=_metadata(run),
        claims=_claims(run),
        curve=curve,
        images=_images(run),
        gradients=None if resolver is None else _gradients(run, resolver),
        views=None if resolver is None else _views(run, resolver),
        diagnosis=attached(run.directory),
        class_names=run.classes or (),
        command=_command(run),
        run=str(run.directory),
        html=str(html),
        title=run.spec.title or "Feint evaluation",
    )


def _elsewhere(result: CellResult, eps: float) -> bool:
    cell = result.cell
    return cell.attack != "none" and abs(cell.eps - eps) > 1e-9 * max(eps, cell.eps)


def _claims(run: StoredRun) -> tuple[Claim, ...]:
    found = []
    for result in run.results:
        given = run.published(result)
        if given is not None:
            source = ", ".join(part for part in (given.label, given.source) if part)
            of_clean = given.label.strip().lower() in OF_CLEAN
            found.append(
                Claim(given.value, source or "as given", of_clean=of_clean, cell=result.cell)
            )
    return tuple(found)


def _metadata(run: StoredRun) -> Mapping[str, object]:
    info = run.info
    settings = {k: v for k, v in run.spec.full.items() if k not in ("cells", "published")}
    shown: dict[str, object] = {"settings": settings}
    shown |= {name: value for name, value in info.items() if name not in _LEFT_OUT}
    shown["seconds"] = info["timing"]["total"]
    return shown


def _command(run: StoredRun) -> str:
    commands = [s["command"] for s in run.info["sessions"] if s.get("command")]
    return shlex.join(commands[0]) if commands else ""


def _images(run: StoredRun) -> Images | None:
    def give(result: CellResult, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        clean = run.clean_images(positions)
        if clean is None:
            raise DataError(f"{run.directory} has no cell without attacker, so no clean images")
        return clean, run.images(result, positions)

    return give if any(r.cell.attack == "none" for r in run.results) else None


def _gradients(run: StoredRun, resolver: Resolver) -> Gradients:
    def give(result: CellResult, positions: Sequence[int]) -> Tensor | None:
        clean = run.clean_images(positions)
        if clean is None or not positions:
            return None
        cell, rows = result.cell, result.rows
        device = resolver.samples.device
        label, index = (torch.from_numpy(rows[n][list(positions)]) for n in ("label", "index"))
        keys = random.keys(cell.seed, index.to(device))
        view = resolver(cell).attacked(cell)
        estimator = eot(EOT_DRAWS) if is_stochastic(view) else backprop
        try:
            found = estimator(view, clean.to(device), label.to(device), margin, keys)
        except GradientError:
            return None  # the finding "zero-gradient" says where it is lost
        return found.gradient.cpu()

    return give


def _views(run: StoredRun, resolver: Resolver) -> Views:
    @torch.no_grad()
    def give(result: CellResult, positions: Sequence[int]) -> Seen:
        cell, subject = result.cell, resolver(result.cell)
        device = resolver.samples.device
        x = run.images(result, positions).to(device)
        index = torch.from_numpy(result.rows["index"][list(positions)]).to(device)
        keys, pipeline = random.keys(cell.seed, index), subject.judged(cell)
        draws = min(result.draws, EOT_DRAWS)
        wide = keys[:, None]
        if is_stochastic(pipeline):
            wide = random.fold(keys, "judge", 0, torch.arange(draws, device=device))
        draws = wide.shape[1]
        logits = call(pipeline, x.repeat_interleave(draws, 0), wide.flatten())
        shares = logits.double().softmax(-1).view(len(x), draws, -1).mean(1)
        return Seen(_defended(pipeline, x, wide[:, 0]), shares.cpu())

    return give


def _defended(pipeline: nn.Module, x: Tensor, keys: Tensor) -> Tensor | None:
    """What the model behind a defense gets on the judge's first draw, if that is an image."""
    defense = getattr(pipeline, "defense", None)
    if not isinstance(defense, Defense):
        return None
    votes = int(getattr(pipeline, "votes", 1))
    first = (
        keys
        if votes == 1
        else random.fold(keys, "vote", 0, torch.zeros(1, dtype=torch.int64, device=x.device))[:, 0]
    )
    seen = defense(x, random.fold(first, "defense"))
    return seen.detach().clamp(0, 1).cpu() if seen.ndim == 4 and seen.shape[1] in (1, 3) else None
