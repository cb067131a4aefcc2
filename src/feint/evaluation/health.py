"""Checks that an evaluation runs on itself: is the number trustworthy, and if not, why.

`declare` and `check_pipeline` look at the pipelines, `check_cell` at one cell's rows, and
`check_together` at cells against each other. Every check yields a `Finding` whether it passes or
not, with its numbers and its threshold.

References:
    Carlini et al., "On evaluating adversarial robustness", 2019; Pintor et al., "Indicators of
    attack failure", NeurIPS 2022; Croce & Hein, AutoAttack's `checks`, 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.errors import GradientError
from feint.core.gradients import backprop, call, eot, find_gradient_loss, is_stochastic, takes_keys
from feint.core.losses import margin
from feint.core.norms import random_in_ball
from feint.evaluation.attackers import parse_attack
from feint.evaluation.cell import Cell
from feint.evaluation.findings import Finding, Status
from feint.evaluation.judge import judge
from feint.evaluation.results import CellResult, by_pipeline
from feint.evaluation.scenarios import get_scenario
from feint.evaluation.shard import Batch, Subject, judge_shard
from feint.evaluation.verdict import name_of

__all__ = ["Undeclared", "check", "check_cell", "check_pipeline", "check_together", "declare"]

PROBE = 16
"""Samples that the pipeline checks look at."""
DOUBLING = 64
"""Most samples on which the step count is doubled."""
RANDOM_POINTS = 20
"""Random points per sample of the blind control."""


class Undeclared(nn.Module):
    """A stochastic module that takes no keys: run under a seed that its keys decide.

    Draws repeat for the same keys in the same batch, but depend on the batch; a finding says so.
    """

    stochastic = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """The module's own forward pass, torch's global generator seeded and put back."""
        if keys is None:
            return call(self.model, x)
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(int(random.fold(keys, "global").sum()) if len(keys) else 0)
            return call(self.model, x)


def declare(model: nn.Module, x: Tensor) -> tuple[nn.Module, list[Finding]]:
    """Measure whether a model is random; wrap it if it is and does not say so.

    Args:
        model: The user's model.
        x: A few images.

    Returns:
        The model, wrapped in `Undeclared` where needed, and what was found.
    """
    name = type(model).__name__
    if takes_keys(model):
        return model, []
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(0)  # the evidence is the same in every run
        logits = [call(model, x) for _ in range(5)]
    spread = max(float((other - logits[0]).abs().max()) for other in logits[1:]) if len(x) else 0.0
    if spread <= 1e-4:
        return model, []
    evidence = (
        f"logits of the same images differ by up to {spread:.3g} between five forward passes "
        "(threshold 1e-4), and forward takes no keys: judged by the random protocol, with draws "
        "that depend on the batch"
    )
    declared = is_stochastic(model)
    finding = Finding("unkeyed-randomness", "warn", name, evidence)
    if declared:
        return Undeclared(model), [finding]
    return Undeclared(model), [replace(finding, evidence=evidence + "; it was not declared")]


def check(
    results: Sequence[CellResult],
    resolve: Callable[[Cell], Subject],
    samples: object,
    *,
    batch_size: int,
) -> list[Finding]:
    """All checks of a run, in a fixed order."""
    found: list[Finding] = []
    read = samples.read  # type: ignore[attr-defined]
    size = len(samples)  # type: ignore[arg-type]
    probe: Batch = read(0, min(PROBE, size))
    for group in by_pipeline(results).values():
        cell = _strongest(group) or group[0].cell
        found += check_pipeline(resolve(cell), cell, probe)
    for result in results:
        found += check_cell(result)
    larger: Batch = read(0, min(DOUBLING, size))
    for group in by_pipeline(results).values():
        found += check_together(group, resolve, larger, batch_size)
    return found


def _strongest(group: Sequence[CellResult]) -> Cell | None:
    """The white-box gradient cell that left the least."""
    white = [
        r
        for r in group
        if r.cell.scenario == "white-box"
        and parse_attack(r.cell.attack).info.knowledge == "gradient"
    ]
    return min(white, key=lambda r: r.accuracy.value).cell if white else None


def check_pipeline(subject: Subject, cell: Cell, batch: Batch) -> Iterator[Finding]:
    """Checks of a deployed pipeline and of the attacker's view of it, on a few samples."""
    pipeline = subject.pipeline(cell)
    name = name_of(cell.model, cell.defense)
    keys = random.keys(cell.seed, batch.index)
    with torch.no_grad():
        logits = call(pipeline, batch.x, keys)
        yield _probabilities(logits, name)
        yield _randomness(pipeline, batch.x, keys, logits, name)
        yield _coupling(pipeline, batch.x, keys, logits, name)
        yield _state(pipeline, batch.x, keys, name)
    attacked_knowingly = cell.scenario == "white-box"
    if attacked_knowingly:
        yield from _gradient(subject.attacked(cell), pipeline, batch, keys, name)


def _probabilities(logits: Tensor, name: str) -> Finding:
    inside = bool(((logits >= 0) & (logits <= 1)).all())
    off = float((logits.sum(1) - 1).abs().max())
    looks = inside and off < 1e-3
    evidence = (
        f"outputs lie in [{float(logits.min()):.3g}, {float(logits.max()):.3g}] and their sums "
        f"are off 1 by at most {off:.2g} (probabilities if in [0, 1] and below 1e-3)"
    )
    if looks:
        evidence += "; a softmax hides gradients: give the logits before it"
    return Finding("outputs-are-logits", "fail" if looks else "pass", name, evidence)


def _randomness(pipeline: nn.Module, x: Tensor, keys: Tensor, logits: Tensor, name: str) -> Finding:
    declared = is_stochastic(pipeline)
    again = float((call(pipeline, x, keys) - logits).abs().max())
    others = [call(pipeline, x, random.fold(keys, "other", n)) for n in range(4)]
    spread = max(float((other - logits).abs().max()) for other in others)
    measured = spread > 1e-4
    evidence = (
        f"declared {'stochastic' if declared else 'deterministic'}; with the same keys logits "
        f"differ by {again:.2g}, with others by up to {spread:.2g} (threshold 1e-4)"
    )
    status: Status = "pass"
    if again > 1e-4 or (measured and not declared):
        status = "fail"
    elif declared and not measured:
        status, evidence = "warn", evidence + "; no randomness was seen"
    return Finding("declared-randomness", status, name, evidence)


def _coupling(pipeline: nn.Module, x: Tensor, keys: Tensor, logits: Tensor, name: str) -> Finding:
    if any(isinstance(m, Undeclared) for m in pipeline.modules()):
        return Finding(
            "batch-independence",
            "warn",
            name,
            "its randomness takes no keys, so an influence of batch-mates cannot be told from luck",
        )
    few = min(8, len(x))
    alone = torch.cat([call(pipeline, x[i : i + 1], keys[i : i + 1]) for i in range(few)])
    scale = float(logits.abs().max()) + 1e-12
    off = float((alone - logits[:few]).abs().max()) / scale
    evidence = (
        f"logits of {few} samples alone and in their batch differ by {off:.2g} of the largest "
        "logit (threshold 1e-3)"
    )
    if off > 1e-3:
        evidence += "; samples influence each other: batch normalisation in train mode?"
    return Finding("batch-independence", "fail" if off > 1e-3 else "pass", name, evidence)


def _state(pipeline: nn.Module, x: Tensor, keys: Tensor, name: str) -> Finding:
    before = {k: v.clone() for k, v in pipeline.state_dict().items()}
    call(pipeline, x, keys)
    changed = [k for k, v in pipeline.state_dict().items() if not torch.equal(v, before[k])]
    evidence = f"{len(changed)} of {len(before)} parameters and buffers change in a forward pass"
    if changed:
        evidence += f" (first: {changed[0]}); the pipeline adapts to what it is asked"
    return Finding("static-state", "fail" if changed else "pass", name, evidence)


def _gradient(
    view: nn.Module, pipeline: nn.Module, batch: Batch, keys: Tensor, name: str
) -> Iterator[Finding]:
    estimator = eot(8) if is_stochastic(view) else backprop
    try:
        gradient = estimator(view, batch.x, batch.y, margin, keys).gradient
    except GradientError as error:
        yield Finding("zero-gradient", "fail", name, str(error))
        return
    flat = gradient.flatten(1)
    zero = float((flat == 0).all(1).double().mean())
    bad = float((~flat.isfinite()).any(1).double().mean())
    evidence = f"{100 * zero:.0f} % of the input gradients are zero, {100 * bad:.0f} % not finite"
    status: Status = "pass"
    if zero > 0 or bad > 0:
        module = find_gradient_loss(view, batch.x, keys)
        evidence += f"; lost in module {module!r}" if module else ""
        status = "fail" if zero > 0.1 or bad > 0 else "warn"
    yield Finding("zero-gradient", status, name, evidence + " (fail above 10 %)")
    if status != "fail":
        yield _agreement(pipeline, batch, keys, gradient, name)


@torch.no_grad()
def _agreement(
    pipeline: nn.Module, batch: Batch, keys: Tensor, gradient: Tensor, name: str
) -> Finding:
    """Does a step along the view's gradient raise the true pipeline's loss?

    One step of 2/255 in the sign's direction, judged by the margin loss of the true pipeline, mean
    over 8 draws; compared with the same step in a random direction.
    """
    wide = random.fold(keys, "agreement", 0, torch.arange(8, device=keys.device)).flatten()

    def loss(x: Tensor) -> Tensor:
        each = margin(call(pipeline, x.repeat_interleave(8, 0), wide), batch.y.repeat_interleave(8))
        return each.view(-1, 8).mean(1)

    blind = random.integers(random.fold(keys, "blind"), 0, 2, batch.x.shape[1:]) * 2 - 1
    step = 2 / 255
    base = loss(batch.x)
    gain = loss((batch.x + step * gradient.sign()).clamp(0, 1)) - base
    chance = loss((batch.x + step * blind).clamp(0, 1)) - base
    better = float((gain > chance).double().mean())
    evidence = (
        f"a step of 2/255 along the gradient raises the margin loss of the deployed pipeline by "
        f"{float(gain.mean()):.3g} on average, a random one by {float(chance.mean()):.3g}; it is "
        f"better on {100 * better:.0f} % of {len(batch)} samples (warn below 80 %, fail below 55 %)"
    )
    status: Status = "pass" if better >= 0.8 else "warn" if better >= 0.55 else "fail"
    return Finding("gradient-is-useful", status, name, evidence)


def _cell_name(cell: Cell) -> str:
    return f"{name_of(cell.model, cell.defense)}, {cell.scenario}, {cell.attack}"


def check_cell(result: CellResult) -> Iterator[Finding]:
    """Checks of one cell's rows."""
    cell, rows = result.cell, result.rows
    if cell.attack == "none":
        return
    name = _cell_name(cell)
    moved = 1 - float(rows["unchanged"].mean())
    status: Status = "pass" if moved > 0.5 or cell.eps == 0 else "fail"
    if cell.eps > 0 and result.cell.scenario == "white-box":
        wrong = (rows["first_hit"] == 0) & rows["unchanged"]
        moved += float(wrong.mean())  # misclassified without any change: there is nothing to do
        status = "pass" if moved > 0.5 else "fail"
    yield Finding(
        "attack-moves",
        status,
        name,
        f"{100 * min(moved, 1.0):.0f} % of the images were changed or needed no change "
        "(fail up to 50 %)",
    )
    yield _budget(result, name)
    rounded, exact = result.accuracy_8bit, result.accuracy
    gap = rounded.value - exact.value
    yield Finding(
        "survives-8-bit",
        "warn" if gap > 0.05 else "pass",
        name,
        f"accuracy {exact} on the images as found, {rounded} after rounding to 8 bits; the largest "
        f"perturbation grows to {rows['size_8bit'].max():.6g} (warn if accuracy rises by more than "
        "5 points)",
    )
    if result.draws > 1:
        yield _luck(result, name)
    if cell.scenario == "white-box":
        yield _incomplete(result, name)


def _budget(result: CellResult, name: str) -> Finding:
    cell, rows = result.cell, result.rows
    budget = parse_attack(cell.attack).info.goal == "budget"
    largest, outside = float(rows["size"].max()), float(rows["outside"].max())
    over = budget and largest > cell.eps * (1 + 1e-6)
    ok = not over and outside == 0
    return Finding(
        "budget-and-box",
        "pass" if ok else "fail",
        name,
        f"largest perturbation {largest:.8g} in {cell.norm} for eps {cell.eps:.8g} in float64; "
        f"pixels leave [0, 1] by at most {outside:.2g}",
    )


def _luck(result: CellResult, name: str) -> Finding:
    hit = float((result.rows["first_hit"] >= 0).mean())
    held = 1 - result.accuracy.value
    ever = 1 - result.accuracy_after(result.draws).value
    gap = hit - held
    return Finding(
        "single-draw-luck",
        "warn" if gap > 0.1 else "pass",
        name,
        f"the attack saw at least one success on {100 * hit:.1f} % of the samples; on "
        f"{result.draws} fresh draws {100 * held:.1f} % are wrong on average, "
        f"{100 * ever:.1f} % at least once in {result.draws} (warn if the first exceeds the second "
        "by more than 10 points: first hits would overstate the attack)",
    )


def _incomplete(result: CellResult, name: str) -> Finding:
    rows = result.rows
    standing = rows["correct"] == rows["draws"]
    late = float((rows["late_gain"][standing] > 0.05).mean()) if standing.any() else 0.0
    return Finding(
        "loss-has-settled",
        "warn" if late > 0.5 else "pass",
        name,
        f"of {int(standing.sum())} samples still standing, {100 * late:.0f} % gained more than "
        "5 % of their loss in the last tenth of the steps (warn above 50 %: give more steps)",
    )


def check_together(
    group: Sequence[CellResult],
    resolve: Callable[[Cell], Subject],
    batch: Batch,
    batch_size: int,
) -> Iterator[Finding]:
    """Checks of one pipeline's cells against each other, and against blind controls."""
    cell = _strongest(group)
    if cell is None:
        return
    name = name_of(cell.model, cell.defense)
    white = np.min(
        [r.shares for r in group if r.cell.scenario == "white-box"], axis=0
    )  # per sample, over all white-box attacks
    yield from _weaker_attackers(group, white, name)
    subject = resolve(cell)
    yield _random_points(subject, cell, batch, white[: len(batch)], batch_size, name)
    yield _zero_budget(subject, cell, batch, group, batch_size, name)
    doubled = _more_steps(subject, cell, batch, group, batch_size, name)
    if doubled is not None:
        yield doubled


def _weaker_attackers(
    group: Sequence[CellResult], white: np.ndarray, name: str
) -> Iterator[Finding]:
    for result in group:
        info = None if result.cell.attack == "none" else parse_attack(result.cell.attack).info
        blind = info is not None and info.knowledge != "gradient"
        ignorant = result.cell.scenario in ("gray-box", "transfer")
        if not (blind or ignorant) or get_scenario(result.cell.scenario).judged != "pipeline":
            continue
        lost = (result.shares <= 0.5) & (white > 0.5)
        share = float(lost.mean())
        yield Finding(
            "white-box-is-strongest",
            "fail" if share > 0.02 else "warn" if lost.any() else "pass",
            name,
            f"{result.cell.scenario} {result.cell.attack} breaks {int(lost.sum())} of {len(lost)} "
            "samples that no white-box attack broke (fail above 2 %)",
        )


def _random_points(
    subject: Subject, cell: Cell, batch: Batch, white: np.ndarray, batch_size: int, name: str
) -> Finding:
    """Random points of the ball (half of them corners for linf) against the white-box attack."""
    keys = random.keys(cell.seed, batch.index)
    drawn = random.fold(keys, "blind", 0, torch.arange(RANDOM_POINTS)).flatten()
    wide = batch.x.repeat_interleave(RANDOM_POINTS, 0)
    delta = random_in_ball(drawn, wide, cell.norm, cell.eps)
    if cell.norm == "linf":
        corner = (torch.arange(len(wide)) % 2 == 0).view(-1, 1, 1, 1)
        delta = torch.where(corner, delta.sign() * cell.eps, delta)
    pipeline = subject.judged(cell)
    found = judge(
        pipeline,
        (wide + delta).clamp(0, 1),
        batch.y.repeat_interleave(RANDOM_POINTS),
        drawn,
        draws=4,
        batch_size=batch_size,
    )
    share = (found.correct.double() / found.draws).view(len(batch), RANDOM_POINTS)
    # The luckiest of 20 points looks strong on the draws that chose it: judge it on fresh ones.
    best = torch.arange(len(batch)) * RANDOM_POINTS + share.argmin(1)
    chosen = judge(
        pipeline,
        (wide + delta).clamp(0, 1)[best],
        batch.y,
        keys,
        draws=max(2, cell.judge_draws),
        batch_size=batch_size,
        purpose="blind-judge",
    )
    left = (chosen.correct.double() / chosen.draws).numpy()
    lost = (left < 0.5) & (white > 0.5)
    return Finding(
        "random-does-not-win",
        "fail" if lost.mean() > 0.02 else "warn" if lost.any() else "pass",
        name,
        f"{RANDOM_POINTS} random points of the {cell.norm} ball break {int(lost.sum())} of "
        f"{len(lost)} samples that the white-box attacks left standing (fail above 2 %)",
    )


def _zero_budget(
    subject: Subject,
    cell: Cell,
    batch: Batch,
    group: Sequence[CellResult],
    batch_size: int,
    name: str,
) -> Finding:
    few = Batch(*(None if t is None else t[:PROBE] for t in vars(batch).values()))  # type: ignore[arg-type]
    parsed = parse_attack(cell.attack)
    if parsed.info.goal != "budget":
        return Finding("zero-budget", "pass", name, f"{cell.attack} has no budget to set to zero")
    attacker = replace(subject.attacker(cell), eps=0.0)
    # Whatever budget the expression names, here it is zero.
    fixed = {k: v for k, v in parsed.kwargs.items() if k not in ("eps", "preset")}
    attacker = replace(attacker, attack=replace(parsed, kwargs=fixed))
    goal = few.target if cell.targeted and few.target is not None else few.y
    keys = random.keys(cell.seed, few.index)
    found = attacker.run(few.x, goal, keys, batch_size)
    moved = int((found.x_adv != few.x).flatten(1).any(1).sum())
    rows = judge_shard(replace(cell, eps=0.0), subject, few, found, batch_size)
    clean = next((r for r in group if r.cell.scenario == "none"), None)
    same = clean is None or np.array_equal(rows["correct"], clean.rows["correct"][: len(few)])
    return Finding(
        "zero-budget",
        "pass" if not moved and same else "fail",
        name,
        f"at eps = 0 the attack changes {moved} of {len(few)} images, and the judge's counts "
        f"{'equal' if same else 'differ from'} those of the clean images",
    )


def _more_steps(
    subject: Subject,
    cell: Cell,
    batch: Batch,
    group: Sequence[CellResult],
    batch_size: int,
    name: str,
) -> Finding | None:
    """Twice the steps on the samples that still stand."""
    parsed = parse_attack(cell.attack)
    if "steps" not in parsed.info.parameters:
        return None
    steps = int(parsed.effective("steps"))
    result = next(r for r in group if r.cell is cell or r.cell == cell)
    standing = torch.from_numpy(result.shares[: len(batch)] > 0.5).nonzero()[:, 0]
    if len(standing) == 0:
        return Finding(
            "more-steps-do-not-help", "pass", name, f"no sample of {len(batch)} stands to be tried"
        )
    left = Batch(*(None if t is None else t[standing] for t in vars(batch).values()))  # type: ignore[arg-type]
    kwargs = {**parsed.kwargs, "steps": 2 * steps}
    attacker = replace(subject.attacker(cell), attack=replace(parsed, kwargs=kwargs))
    goal = left.target if cell.targeted and left.target is not None else left.y
    found = attacker.run(left.x, goal, random.keys(cell.seed, left.index), batch_size)
    rows = judge_shard(cell, subject, left, found, batch_size)
    lost = int((rows["correct"] / rows["draws"] <= 0.5).sum())
    share = lost / len(batch)
    return Finding(
        "more-steps-do-not-help",
        "fail" if share > 0.05 else "warn" if share > 0.02 else "pass",
        name,
        f"{2 * steps} steps instead of {steps} break {lost} of the {len(left)} samples that stand "
        f"among {len(batch)} (warn above 2 %, fail above 5 % of all)",
    )
