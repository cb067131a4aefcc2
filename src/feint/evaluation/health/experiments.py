"""Small experiments with the strongest attack: what must not help it, and what must."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.errors import FeintError, GradientError
from feint.core.gradients import backprop, call, eot, is_stochastic
from feint.core.norms import distance
from feint.core.registry import ATTACKS
from feint.evaluation.attackers import EOT_DRAWS, ParsedAttack, parse_attack
from feint.evaluation.findings import Finding, Status
from feint.evaluation.health.case import Case, graded, reduced
from feint.evaluation.health.declare import Undeclared
from feint.evaluation.health.words import steps_of
from feint.evaluation.health.wrapped import Rescaled, Watched
from feint.evaluation.metrics import rate
from feint.evaluation.shard import Batch, judge_shard

__all__ = [
    "DRAWS",
    "FEW",
    "FEWER",
    "LONG",
    "SHORT",
    "ZERO",
    "Experiment",
    "large_budget",
    "more_steps",
    "repeats",
    "scale",
    "single_step",
    "watch",
]

Experiment = Callable[[Case, ParsedAttack], Iterator[Finding]]
"""Makes findings of a case and the parsed attack of its cell."""

FEW, FEWER = 16, 8
"""Samples of experiments that need few, and of those that need fewer."""
ZERO, SHORT, LONG = 2, 5, 10
"""Steps of an attack without a budget, of one that shows how it works, and of one that must
succeed."""
MATES = 0.01
"""Share of values that batch-mates may seem to change."""
DRAWS = 8
"""Draws that judge where a few samples stand or fall together."""
SHIFT = 50.0
"""Constant that is added to all logits."""


def single_step(case: Case, parsed: ParsedAttack) -> Iterator[Finding]:
    """One step of the whole budget, on what stands."""
    check, fast = "iterative-beats-single", ATTACKS["fgsm"]
    places = case.standing
    if case.cell.norm not in fast.norms or not parsed.needs_gradient or not len(places):
        evidence = f"nothing to compare: {len(places)} samples stand against {parsed.info.name}"
        yield Finding(check, "pass", case.name, evidence)
        return
    single = parse_attack("fgsm")
    if "gradient" in parsed.kwargs:
        single = replace(single, kwargs={"gradient": parsed.kwargs["gradient"]})
    _, rows = case.attack(single, case.select(places))
    lost = case.also_lost(places, rows["correct"], rows["draws"])
    yield Finding(
        check,
        graded(lost),
        case.name,
        f"one step of the whole budget breaks {int(lost.sum())} of the {len(places)} samples that "
        f"stand among {len(lost)} (warn above 2 %, fail above 5 % of all, from two on)",
    )


def _whole_box(case: Case) -> float:
    """A budget that lets every image become every other one."""
    shape = case.batch.x.shape[1:]
    largest = torch.ones(1, *shape, dtype=torch.float64)
    return float(distance(largest, torch.zeros_like(largest), case.cell.norm))


def large_budget(case: Case, parsed: ParsedAttack) -> Iterator[Finding]:
    """With the whole box to move in, the attack must do what handing in another image does."""
    check, few = "large-budget-breaks", case.batch
    if parsed.info.goal != "budget" or case.cell.targeted:
        evidence = f"{parsed.info.name} has no budget to raise, or a target to reach: 0 tried"
        yield Finding(check, "pass", case.name, evidence)
        return
    eps = _whole_box(case)
    more = {"eps": eps, "stop": "success"}
    if parsed.fixes("step_size"):  # the cell's own step was made for the cell's own budget
        more["step_size"] = eps / 4
    wide = reduced(parsed, LONG, **more)
    _, rows = case.attack(wide, few, eps, draws=DRAWS)
    draws = int(rows["draws"].max())
    left = rate(rows["correct"] / rows["draws"], draws)
    # Another sample's image: what an attacker without any budget limit can hand in.
    others = few.x.roll(-(-len(few) // 2), 0)
    keys = random.keys(case.cell.seed, few.index).to(few.x.device)
    swapped = case.judge(others, few.y, keys, DRAWS, "another image")
    other = rate(swapped.correct.double().numpy() / swapped.draws, swapped.draws)
    bad = left.value > other.value and left.low > other.high
    yield Finding(
        check,
        "fail" if bad else "pass",
        case.name,
        f"with the whole box as its budget the attack leaves {left} after at most {LONG} steps; "
        f"handing in another image leaves {other} (fail if the first is clearly more)",
    )


def repeats(case: Case, parsed: ParsedAttack) -> Iterator[Finding]:
    """A short attack once, one by one, in reverse, and with a constant added to the logits."""
    few, short = case.batch, reduced(parsed, SHORT, stop="success")
    view, once = case.subject.attacked(case.cell), case.find(short, case.batch)
    yield _one_by_one(case, short, few, once.x_adv)
    cell = replace(case.cell, judge_draws=min(DRAWS, case.cell.judge_draws))
    found = [once, *(case.find(short, few, view=Rescaled(view, shift=s)) for s in (SHIFT, -SHIFT))]
    rows = [judge_shard(cell, case.subject, few, f, case.batch_size) for f in found]
    stand = [r["correct"] / r["draws"] > 0.5 for r in rows]
    other = max(int((s != stand[0]).sum()) for s in stand[1:])
    standing = " / ".join(str(int(s.sum())) for s in stand)
    yield Finding(
        "logit-shift",
        "fail" if other > 1 else "pass",
        case.name,
        f"with 0 / +{SHIFT:g} / −{SHIFT:g} added to all logits, which is the same classifier, "
        f"{standing} of {len(few)} samples stand, {other} of them others (fail above 1)",
    )


def _one_by_one(case: Case, short: ParsedAttack, few: Batch, whole: Tensor) -> Finding:
    check = "attack-batch-invariance"
    if _unkeyed(case):
        evidence = "the pipeline's draws hang on the batch, so 0 samples could be compared"
        return Finding(check, "pass", case.name, evidence)
    apart = _apart(case, short, few, whole, None)
    told = f"{100 * apart:.2g} % of the values differ"
    if apart > MATES:
        # Where gradients nearly vanish, rounding decides their signs, and it hangs on the size of
        # the batch. Batch-mates have their influence in float64, too.
        with suppress(FeintError, RuntimeError, TypeError):  # not everything can be made float64
            view = copy.deepcopy(case.subject.attacked(case.cell)).double()
            fine = replace(few, x=few.x.double())
            apart = _apart(case, short, fine, case.find(short, fine, view=view).x_adv, view)
            told += f", in float64 {100 * apart:.2g} %"
    return Finding(
        check,
        "fail" if apart > MATES else "pass",
        case.name,
        f"{len(few)} samples one by one, in a batch and in its reverse, {SHORT} steps: {told} "
        f"(fail above {MATES:.0%}, in float64 too: batch-mates influence the attack)",
    )


def _apart(
    case: Case, short: ParsedAttack, few: Batch, whole: Tensor, view: nn.Module | None
) -> float:
    """The share of values that differ if samples are attacked one by one, or in reverse."""
    alone = case.find(short, few, view=view, batch_size=1).x_adv
    turned = few.select(torch.arange(len(few)).flip(0))
    moved = case.find(short, turned, view=view).x_adv.flip(0)
    return max(float(((whole - o).abs() > 1e-5).double().mean()) for o in (alone, moved))


def _unkeyed(case: Case) -> bool:
    pipeline = case.subject.pipeline(case.cell)
    return any(isinstance(m, Undeclared) and not m.keyed for m in pipeline.modules())


def scale(case: Case, parsed: ParsedAttack) -> Iterator[Finding]:
    """Logits of a spread of one: what temperature or saturation hid comes to light."""
    check, places = "logit-scale", case.standing[:FEW]
    if not parsed.needs_gradient:
        return
    if not len(places):
        yield Finding(check, "pass", case.name, "0 samples stand to be tried")
        return
    view, some = case.subject.attacked(case.cell), case.select(places)
    keys = random.keys(case.cell.seed, some.index).to(some.x.device)
    with torch.no_grad():
        logits = call(view, some.x, keys).double()
    spread = float(logits.std(1).median())
    factor = 1 / spread if 0 < spread < float("inf") else 1.0
    _, rows = case.attack(reduced(parsed, LONG), some, view=Rescaled(view, factor))
    lost = case.also_lost(places, rows["correct"], rows["draws"])
    yield Finding(
        check,
        graded(lost),
        case.name,
        f"logits have a spread of {spread:.3g}; brought to 1, {LONG} steps break {int(lost.sum())} "
        f"of {len(places)} samples that stand (warn above 2 %, fail above 5 % of {len(lost)}, from "
        "two on: a temperature or a saturated loss hides the gradient)",
    )


def more_steps(case: Case, parsed: ParsedAttack) -> Iterator[Finding]:
    """Twice the steps on the samples that still stand, with an eye on the gradients on the way."""
    check, path, steps = "more-steps-do-not-help", "gradients-along-the-path", steps_of(parsed)
    if steps is None:
        return
    places, n = case.standing, len(case.batch)
    watched = watch(case, parsed)
    if len(places) == 0:
        evidence = f"no sample of {n} stands to be tried"
        yield Finding(check, "pass", case.name, evidence)
        if watched is not None:
            yield Finding(path, "pass", case.name, evidence)
        return
    kwargs = {**parsed.kwargs, "steps": 2 * steps}
    if watched is not None:
        kwargs["gradient"] = watched
    try:
        _, rows = case.attack(replace(parsed, kwargs=kwargs), case.select(places))
    except GradientError as error:
        yield Finding(path, "fail", case.name, f"after {steps} steps: {error}")
        return
    lost = case.also_lost(places, rows["correct"], rows["draws"])
    share = float(lost.mean())
    yield Finding(
        check,
        "fail" if share > 0.05 else "warn" if share > 0.02 else "pass",
        case.name,
        f"{2 * steps} steps instead of {steps} break {int(lost.sum())} of the {len(places)} "
        f"samples that stand among {n} (warn above 2 %, fail above 5 % of all)",
    )
    if watched is not None:
        zero, bad = watched.shares()
        status: Status = "fail" if zero > 0.5 or bad > 0 else "warn" if zero > 0.1 else "pass"
        yield Finding(
            path,
            status,
            case.name,
            f"of {watched.asked} gradients on the way {100 * zero:.0f} % are zero and "
            f"{100 * bad:.0f} % not finite (warn above 10 % zero, fail above 50 % zero or on any "
            "not finite)",
        )


def watch(case: Case, parsed: ParsedAttack) -> Watched | None:
    """The attack's estimator with an eye on its gradients; None if it has none."""
    if "gradient" not in parsed.info.parameters or not parsed.needs_gradient:
        return None
    base = parsed.effective("gradient")
    if base is None:
        base = eot(EOT_DRAWS) if is_stochastic(case.subject.attacked(case.cell)) else backprop
    return Watched(base)
