"""From a model, a defense and attackers to cells, findings and a verdict."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from feint.core import spec
from feint.core.checks import check_eps, check_images, check_labels
from feint.core.errors import ConfigError, DeviceError, RangeError
from feint.core.norms import check_norm
from feint.defenses.base import Defense
from feint.evaluation import health
from feint.evaluation.asked import budget_of, chosen
from feint.evaluation.cell import Cell
from feint.evaluation.findings import Finding
from feint.evaluation.loop import OnProgress, Progress, Resolver, compute_unit, execute
from feint.evaluation.pipeline import Combine
from feint.evaluation.results import CellResult
from feint.evaluation.rungs import rung_cells
from feint.evaluation.samples import Cache, Memory, Samples, TensorSamples
from feint.evaluation.scenarios import get_scenario
from feint.evaluation.shard import Batch, Subject
from feint.evaluation.verdict import Verdict, conclude
from feint.models import check_model

__all__ = [
    "Cache",
    "Evaluation",
    "Memory",
    "OnProgress",
    "Progress",
    "Resolver",
    "Samples",
    "TensorSamples",
    "compute_unit",
    "evaluate",
    "execute",
    "expand",
    "finish",
]


def expand(
    base: Cell,
    attacks: Iterable[str],
    scenarios: Iterable[str],
    *,
    source: str | Sequence[str] = "",
    undefended: bool = True,
    defense: Defense | None = None,
    **budgets: int,
) -> list[Cell]:
    """Cells of one pipeline: clean accuracy, then every scenario's attacks.

    Args:
        base: Model, defense, threat, judge and seed; its scenario and attack do not count.
        attacks: Attack expressions.
        scenarios: Scenario names; `"none"` is always there. See `feint.evaluation.rungs` for which
            attacks go where. Without a defense `"gray-box"`, `"removal"` and `"semi-brute-force"`
            say what `"white-box"` says, and are left out.
        source: Spec of the model that `"transfer"` attacks, or several.
        undefended: Also attack and judge the bare model, which says what the attacks are worth.
        defense: The object that the base's defense names; `"adaptive"` asks it for its rules and
            its declared break.
        **budgets: `queries`, `steps` and `rounds` of `rung_cells`.
    """
    attacks, scenarios = list(attacks), list(scenarios)
    sources = [source] if isinstance(source, str) else list(source)
    for scenario in scenarios:
        get_scenario(scenario)
    clean = replace(base, scenario="none", attack="none", source="")
    bare = replace(clean, defense="none", votes=1, backward="default")
    cells = [clean]
    if undefended and base.defense != "none":
        cells = [bare, *(replace(bare, scenario="white-box", attack=a) for a in attacks), clean]
    for scenario in scenarios:
        cells += rung_cells(base, scenario, attacks, defense=defense, sources=sources, **budgets)
    return list(dict.fromkeys(cells))


@dataclass
class Evaluation:
    """An evaluation's cells, its findings about itself, and the verdict that follows."""

    results: list[CellResult]
    findings: list[Finding]
    verdict: Verdict
    seconds: float

    def as_dict(self) -> dict[str, object]:
        """Plain data: the command line's `--json`."""
        return {
            "verdict": self.verdict.text,
            "grade": self.verdict.grade,
            "cells": [r.as_dict() for r in self.results],
            "findings": [f.as_dict() for f in self.findings],
            "seconds": round(self.seconds, 2),
        }


def finish(
    results: list[CellResult],
    resolve: Resolver,
    samples: Samples,
    *,
    batch_size: int,
    seconds: float,
    extra: Sequence[Finding] = (),
    checks: str = "quick",
) -> Evaluation:
    """Check the results, and conclude."""
    asked = chosen(checks)
    made = health.check(
        results,
        resolve,
        samples,
        batch_size=batch_size,
        costly=asked,
        share=budget_of(asked),
    )
    findings = [*extra, *made]
    return Evaluation(results, findings, conclude(results, findings), seconds)


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    defense: Defense | None = None,
    attacks: Sequence[str] = ("pgd",),
    scenarios: Sequence[str] = ("none", "gray-box", "white-box"),
    norm: str = "linf",
    eps: float = 8 / 255,
    target: Tensor | None = None,
    index: Tensor | None = None,
    source: nn.Module | None = None,
    backward: str = "default",
    votes: int = 1,
    combine: Combine = "mean_probability",
    judge_draws: int = 32,
    seed: int = 0,
    batch_size: int = 128,
    cache: Cache | None = None,
    on_progress: OnProgress | None = None,
    checks: str = "quick",
) -> Evaluation:
    """Evaluate a model with a defense against attackers, and grade the evaluation itself.

    Args:
        model: Maps images in [0, 1] to logits.
        x: Images, (N, C, H, W), in [0, 1].
        y: True labels, (N,).
        defense: What stands in front of the model, or none.
        attacks: Attack expressions, such as `"pgd(steps=100)"`; one text may hold several,
            separated by commas.
        scenarios: Names of `feint.evaluation.SCENARIOS`, or one text of them.
        norm: The threat model's norm.
        eps: The threat model's budget, in image units.
        target: Targets, (N,), for a targeted threat: none is the true label.
        index: Indices of the samples in their data set, (N,), all different, which key every draw;
            by default 0 … N−1.
        source: Another model, for `"transfer"`.
        backward: Backward rule for the defense; by default its own choice.
        votes: Draws per prediction of the deployed pipeline.
        combine: How votes are combined.
        judge_draws: Held-out draws per sample for a stochastic pipeline.
        seed: Seed of every draw.
        batch_size: Images per forward pass.
        cache: Finished units; by default in memory.
        on_progress: Called around every unit of work.
        checks: `"quick"` makes the quick checks, `"all"` the costly ones, too, names of
            `feint.evaluation.checklist.COSTLY` with commas those. `"budget=2"` among them lets the
            quick ones cost twice what the attacks took (half of it by default), `"budget=none"`
            whatever it takes.

    Returns:
        Cells with per-sample rows, findings and the verdict.

    Raises:
        ConfigError, RangeError, ShapeError, DtypeError, DeviceError: On bad arguments.
        ModelError: If a model is in training mode, fails on these images, or gives anything but
            finite logits (N, K).
        GradientError: If a gradient attack gets no gradient from its view.

    Cost: For every cell, the attack's passes, and `judge_draws` forward passes per image.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
        >>> x, y = torch.rand(8, 3, 2, 2), torch.zeros(8, dtype=torch.int64)
        >>> result = evaluate(model, x, y, attacks=["pgd(steps=5)"], eps=0.5)
        >>> [c.cell.scenario for c in result.results]
        ['none', 'white-box']
    """
    begun = time.perf_counter()
    chosen(checks)  # refuse a wrong name before any work
    _check(model, x, y, target, defense, source, norm, eps)
    index = torch.arange(len(x), device=x.device) if index is None else index
    samples = TensorSamples(Batch(x, y, index, target))
    origin = "" if source is None else type(source).__name__
    base = Cell(
        "none",
        model=type(model).__name__,
        defense="none" if defense is None else str(defense),
        backward=backward,
        norm=norm,
        eps=eps,
        targeted=target is not None,
        votes=votes,
        combine=combine,
        judge_draws=judge_draws,
        seed=seed,
    )
    model, noted = health.declare(model, x[:8])
    if source is not None:
        source, more = health.declare(source, x[:8])
        noted = [*noted, *more]
    shared = Subject(model, defense, source)
    bare = Subject(model, None, source)

    def resolve(cell: Cell) -> Subject:
        return bare if cell.defense == "none" else shared

    results = execute(
        expand(base, _texts(attacks), _names(scenarios), source=origin, defense=defense),
        resolve,
        samples,
        cache=Memory() if cache is None else cache,
        batch_size=batch_size,
        on_progress=on_progress,
    )
    seconds = time.perf_counter() - begun
    return finish(
        results,
        resolve,
        samples,
        batch_size=batch_size,
        seconds=seconds,
        extra=noted,
        checks=checks,
    )


def _texts(attacks: Sequence[str]) -> list[str]:
    """Attack expressions one by one: `"pgd, fgsm"` is two."""
    listed = [attacks] if isinstance(attacks, str) else attacks
    return [str(part) for text in listed for part in spec.parse_list(text)]


def _names(scenarios: Sequence[str]) -> list[str]:
    listed = [scenarios] if isinstance(scenarios, str) else scenarios
    return [name.strip() for text in listed for name in text.split(",")]


def _check(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    target: Tensor | None,
    defense: Defense | None,
    source: nn.Module | None,
    norm: str,
    eps: float,
) -> None:
    """Refuse what cannot be evaluated, before any work."""
    check_images(x)
    if len(x) == 0:
        raise ConfigError("there are no samples to evaluate")
    check_norm(norm)
    check_eps(eps, norm, x.shape)
    if defense is not None and not isinstance(defense, Defense):
        raise ConfigError(
            f"the defense is a {type(defense).__name__}; expected a feint Defense, such as "
            "feint.defenses.parse gives; or put it in front of the model with nn.Sequential"
        )
    for name, module in (("model", model), ("source", source)):
        if module is None:
            continue
        if not isinstance(module, nn.Module):
            raise ConfigError(f"the {name} is a {type(module).__name__}; expected an nn.Module")
        place = next((p.device for p in module.parameters()), x.device)
        if place != x.device:
            raise DeviceError(f"the {name} is on {place}, x on {x.device}; move one of them")
        classes = check_model(module, x[:4]).shape[1]
        check_labels(y, len(x), classes)
        if target is not None:
            check_labels(target, len(x), classes, "target")
    if target is not None and bool((target == y).any()):
        raise RangeError(
            f"{int((target == y).sum())} of {len(y)} targets are the true label; expected another "
            "class for every sample"
        )
    if y.device != x.device or (target is not None and target.device != x.device):
        raise DeviceError(f"x is on {x.device}; expected y and target there, too")
