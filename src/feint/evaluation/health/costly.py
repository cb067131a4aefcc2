"""Experiments on request: doublings, other losses, other estimators, a black box, a rerun."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.gradients import call, eot, is_stochastic
from feint.core.registry import ATTACKS
from feint.evaluation.attackers import EOT_DRAWS, ParsedAttack, parse_attack
from feint.evaluation.findings import Finding, Status
from feint.evaluation.health.binarise import binarisation
from feint.evaluation.health.case import Case, graded
from feint.evaluation.health.words import steps_of
from feint.evaluation.health.wrapped import Frozen
from feint.evaluation.metrics import rate

__all__ = ["EXPERIMENTS"]

QUERIES = 1000
"""Queries of the black box."""
SOME, FEW = 32, 16
"""Samples of experiments that repeat the whole attack, and of the rerun."""


def _nothing(check: str, case: Case, why: str) -> Finding:
    return Finding(check, "pass", case.name, why)


def _again(check: str, case: Case, parsed: ParsedAttack, what: str, most: int = 64) -> Finding:
    """Another form of the attack, on what the white-box cells left standing."""
    places = case.standing[:most]
    if not len(places):
        return _nothing(check, case, "0 samples stand to be tried")
    _, rows = case.attack(parsed, case.select(places))
    lost = case.also_lost(places, rows["correct"], rows["draws"])
    return Finding(
        check,
        graded(lost),
        case.name,
        f"{what} break {int(lost.sum())} of the {len(places)} samples that stand, of {len(lost)} "
        "(warn above 2 %, fail above 5 % of all, from two on)",
    )


def _with(parsed: ParsedAttack, **settings: Any) -> ParsedAttack:
    return replace(parsed, kwargs={**parsed.kwargs, **settings})


def _restarts(case: Case) -> Iterator[Finding]:
    check, parsed = "more-restarts-do-not-help", parse_attack(case.cell.attack)
    if "restarts" not in parsed.info.parameters:
        yield _nothing(check, case, f"{parsed.info.name} has no restarts: 0 tried")
        return
    now = int(parsed.effective("restarts"))
    # The starts are drawn by number: the first ones would be the old ones again.
    yield _again(check, case, _with(parsed, restarts=now + 2), f"{now + 2} starts instead of {now}")


def _draws_of(case: Case, parsed: ParsedAttack) -> int | None:
    """Draws per gradient that the attack takes from a random pipeline; None if it takes none."""
    if not is_stochastic(case.subject.pipeline(case.cell)) or not parsed.needs_gradient:
        return None
    if "gradient" not in parsed.info.parameters:
        return None
    used = parsed.effective("gradient")
    name = "" if used is None else str(getattr(used, "__qualname__", ""))
    digits = name.removeprefix("eot(").removesuffix(")")
    return EOT_DRAWS if used is None else int(digits) if digits.isdigit() else None


def _draws(case: Case) -> Iterator[Finding]:
    check, parsed = "more-draws-do-not-help", parse_attack(case.cell.attack)
    now = _draws_of(case, parsed)
    if now is None:
        yield _nothing(check, case, "the attack averages over 0 draws: nothing to double")
        return
    doubled = _with(parsed, gradient=eot(2 * now))
    yield _again(check, case, doubled, f"{2 * now} draws per gradient instead of {now}", SOME)


def _equal_budget(case: Case) -> Iterator[Finding]:
    check, parsed = "equal-budget", parse_attack(case.cell.attack)
    draws, steps = _draws_of(case, parsed), steps_of(parsed)
    if draws is None or steps is None:
        yield _nothing(check, case, "the attack averages over 0 draws: nothing to trade for steps")
        return
    many = _with(parsed, gradient=eot(1), steps=draws * steps)
    what = f"{draws * steps} steps with one draw instead of {steps} with {draws}"
    yield _again(check, case, many, what, FEW)


def _losses(case: Case) -> Iterator[Finding]:
    check, parsed = "loss-disagreement", parse_attack(case.cell.attack)
    if "loss" not in parsed.info.parameters:
        yield _nothing(check, case, f"{parsed.info.name} has no losses to choose from: 0 tried")
        return
    classes = _classes(case)
    now = parsed.effective("loss")
    names = ["cross_entropy", "margin", *(["dlr"] if classes >= 4 else [])]
    for name in names:
        if name != now:
            what = f"the loss {name} instead of {now}: its attacks"
            yield _again(check, case, _with(parsed, loss=name), what, SOME)


@torch.no_grad()
def _classes(case: Case) -> int:
    few = case.batch.select(slice(0, 1))
    return int(call(case.subject.pipeline(case.cell), few.x, case.keys[:1]).shape[1])


def _black_box(case: Case) -> Iterator[Finding]:
    check, info = "black-box-does-not-win", ATTACKS["square"]
    places = case.standing
    if case.cell.norm not in info.norms or not len(places):
        yield _nothing(check, case, f"{len(places)} samples stand for Square in {case.cell.norm}")
        return
    pipeline = case.subject.pipeline(case.cell)
    settings: dict[str, Any] = {"queries": QUERIES}
    if is_stochastic(pipeline):
        settings["draws"] = 4
    square = replace(parse_attack("square"), kwargs=settings)
    _, rows = case.attack(square, case.select(places), view=pipeline)
    lost = case.also_lost(places, rows["correct"], rows["draws"])
    share = float(lost.mean())
    yield Finding(
        check,
        "fail" if share > 0.02 else "warn" if share > 0.002 else "pass",
        case.name,
        f"{QUERIES} queries of Square break {int(lost.sum())} of the {len(places)} samples that no "
        f"white-box attack broke, of {len(lost)} (warn above 0.2 %, fail above 2 % of all)",
    )


def _frozen(case: Case) -> Iterator[Finding]:
    check, parsed = "frozen-randomness", parse_attack(case.cell.attack)
    pipeline = case.subject.pipeline(case.cell)
    some = case.batch.select(slice(0, SOME))
    if not is_stochastic(pipeline) or "gradient" not in parsed.info.parameters:
        yield _nothing(check, case, "the pipeline has 0 draws to freeze")
        return
    key = random.fold(random.keys(case.cell.seed, 1), "frozen")
    kwargs = {k: v for k, v in parsed.kwargs.items() if k != "gradient"}
    view = Frozen(case.subject.attacked(case.cell), key)
    found = case.find(replace(parsed, kwargs=kwargs), some, view=view)
    with torch.no_grad():
        right = _right(Frozen(pipeline, key), found.x_adv, some.y, case.batch_size)
    fixed = rate(right.double().cpu().numpy())
    free = case.right[: len(some)] / case.draws[: len(some)]
    more = float(free.mean()) - fixed.value
    yield Finding(
        check,
        "warn" if more > 0.2 else "pass",
        case.name,
        f"with one fixed draw that the attacker knows {fixed} is left, over draws "
        f"{100 * free.mean():.1f} % (warn if 20 points less: only the draws stand in the way, so "
        "resolve them with more per gradient and more steps; if as much is left, randomness is not "
        "the reason)",
    )


def _right(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> Tensor:
    parts = [call(model, x[i : i + batch_size]).argmax(1) for i in range(0, len(x), batch_size)]
    return torch.cat(parts) == y


class _ThroughStandIn(nn.Module):
    """The bare model's logits, with the derivative that the defended view has."""

    def __init__(self, model: nn.Module, view: nn.Module) -> None:
        super().__init__()
        self.model, self.view = model, view
        self.training = view.training

    @property
    def stochastic(self) -> bool:
        return is_stochastic(self.view)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        seen = call(self.view, x, keys)
        with torch.no_grad():
            bare = call(self.model, x, keys)
        return bare + (seen - seen.detach())


def _stand_in(case: Case) -> Iterator[Finding]:
    check, parsed = "stand-in-on-undefended", parse_attack(case.cell.attack)
    if case.subject.defense is None or not parsed.needs_gradient:
        yield _nothing(check, case, "there are 0 stand-ins in use")
        return
    some, model = case.batch.select(slice(0, SOME)), case.subject.model
    keys = random.keys(case.cell.seed, some.index).to(some.x.device)
    view = _ThroughStandIn(model, case.subject.attacked(case.cell))
    found = case.find(parsed, some, view=view)
    with torch.no_grad():
        before = call(model, some.x, keys).argmax(1) == some.y
        after = call(model, found.x_adv, keys).argmax(1) == some.y
    fell = float((before & ~after).sum() / before.sum().clamp_min(1))
    status: Status = "fail" if fell < 0.1 else "warn" if fell < 0.5 else "pass"
    yield Finding(
        check,
        status,
        case.name,
        f"attacked with gradients through the defense's stand-in, the model without the defense "
        f"loses {100 * fell:.0f} % of {int(before.sum())} samples (warn below 50 %, fail below "
        "10 %)",
    )


def _rerun(case: Case) -> Iterator[Finding]:
    """The attack and the judge once more: what is stored must come out again."""
    best = next(r for r in case.group if r.cell == case.cell)
    few = case.batch.select(slice(0, FEW))
    _, rows = case.attack(parse_attack(case.cell.attack), few)
    n = len(few)
    before, after = best.shares[:n] > 0.5, rows["correct"] / rows["draws"] > 0.5
    other = int((before != after).sum())
    size = float(np.abs(best.rows["size"][:n] - rows["size"]).max())
    status: Status = "fail" if other > n / 4 else "warn" if other > 1 else "pass"
    yield Finding(
        "rerun-agrees",
        status,
        case.name,
        f"attacked and judged again, {other} of {n} samples come out otherwise than stored, and "
        f"their perturbations differ in size by up to {size:.2g} (warn above 1, fail above "
        f"{n // 4})",
    )


EXPERIMENTS: dict[str, Callable[[Case], Iterator[Finding]]] = {
    "more-restarts-do-not-help": _restarts,
    "more-draws-do-not-help": _draws,
    "loss-disagreement": _losses,
    "black-box-does-not-win": _black_box,
    "frozen-randomness": _frozen,
    "equal-budget": _equal_budget,
    "stand-in-on-undefended": _stand_in,
    "binarisation": binarisation,
    "rerun-agrees": _rerun,
}
"""Costly experiments with one case each."""
