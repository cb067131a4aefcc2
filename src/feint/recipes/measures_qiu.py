"""What S1's tables and figures need: attacks round by round, property 1 as a share, drawings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from feint.attacks._ascent import Trace
from feint.attacks.pgd import pgd
from feint.core import random
from feint.core.errors import ConfigError, RangeError
from feint.core.gradients import GradientEstimator, backprop, call, eot, is_stochastic
from feint.core.registry import ATTACKS, DEFENSES
from feint.defenses import RDG, Chain, Defense
from feint.diagnostics.numbers import Measured, Number, mean
from feint.evaluation import Pipeline
from feint.evaluation.budgets import rms_budget
from feint.evaluation.judge import judge
from feint.evaluation.metrics import Rate, rate
from feint.evaluation.rounds import History, watched
from feint.evaluation.semi_brute_force import differentiable_parts, round_by_round
from feint.recipes.measures import _pick, _properties
from feint.recipes.metrics import METRICS, Case, metric

__all__ = ["WAYS", "rounds_of"]

WAYS = ("BPDA", "BPDA+EOT", "semi-brute force", "aligned")
"""Three attacks of S1 §VI, and the one that undoes FD's shift."""
_STEP = 0.1
"""S1's factor of the raw gradient."""


@metric("property, share", models=True)
def _share(case: Case) -> Measured:
    """A property of a defense by S1 §IV that is a share of the images: accuracy or agreement."""
    return _pick(_properties(case), case.fields["number"])


@metric("attack success of the right", ask=METRICS["accuracy of the right"].ask)
def _hits_of_the_right(case: Case) -> Rate:
    """S1's ASR: share of draws that give the attacker's target, over images right without attack.

    Of several attacks each image counts by the one that hits most often.
    """
    right = case.shares("clean") > 0.5
    if not right.any():
        raise RangeError("the bare classifier gets no clean image right; there is nothing to count")
    hits = [r.rows["target_hits"] / r.rows["draws"] for r in case.cells["attacked"]]
    return rate(np.max(np.stack(hits), 0)[right], case.draws())


class _Identity(nn.Module):
    """A defense whose backward pass is the identity, whatever rules it declares: S1's BPDA."""

    def __init__(self, defense: nn.Module) -> None:
        super().__init__()
        self.defense = defense
        self.stochastic = is_stochastic(defense)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            seen = self.defense(x.detach(), keys)
        return seen + (x - x.detach())


def _through(way: str, model: nn.Module, defense: Defense | None) -> nn.Module:
    """What the attacker differentiates."""
    if way not in WAYS:
        raise ConfigError(f"way is {way!r}; expected one of {', '.join(WAYS)}")
    whole = Pipeline(model, defense)
    if defense is None:
        return whole
    if way == "BPDA":
        return Pipeline(model, _Identity(defense.bind(model)))
    if way == "semi-brute force":
        return Pipeline(model, differentiable_parts(defense)).view()
    if way == "aligned":
        return whole.view()
    members = defense.members if isinstance(defense, Chain) else (defense,)
    rules = [None if part.differentiable else "identity" for part in members]
    return whole.view(rules if len(rules) > 1 else rules[0])


def rounds_of(
    model: nn.Module,
    defense: Defense | None,
    x: Tensor,
    target: Tensor,
    y: Tensor,
    keys: Tensor,
    *,
    way: str,
    rounds: int,
    rms: float = 0.05,
    draws: int = 30,
    checked: Sequence[int] = (),
    batch_size: int = 64,
) -> History:
    """Run one of S1's attacks, targeted, and note every round.

    Args:
        model: Maps images in [0, 1] to logits.
        defense: What stands in front of it.
        x: Images, (N, C, H, W), in [0, 1].
        target: Targets, (N,).
        y: True labels, (N,).
        keys: (N,) keys of the samples.
        way: `"BPDA"`: the gradient at g(x) of the draw that is tried, taken for that at x.
            `"BPDA+EOT"`: the mean gradient over draws, FD passed by the identity.
            `"semi-brute force"`: the same without FD. `"aligned"`: the recommended backward rules,
            which undo FD's shift, and normalised steps.
        rounds: The last round; round 0 is the clean image.
        rms: Budget, root mean square over the values of an image.
        draws: Draws that a gradient is averaged over, except for BPDA.
        checked: Rounds whose images are kept.
        batch_size: Images per call.

    Deviations:
        Steps are projected to the budget; S1 gives an image up that leaves it. S1's script takes
        the EOT gradient at the clean image by mistake; here it is at the current one.

    Cost: Per image and round one forward and backward pass for BPDA, otherwise `draws` of them and
        a further forward pass.
    """
    part = _through(way, model, defense)
    gradient: GradientEstimator = backprop
    attacked: nn.Module = part
    if way != "BPDA":
        base = eot(draws) if is_stochastic(part) else backprop
        gradient, attacked = round_by_round(part, base), Pipeline(model, defense)
    eps = rms_budget(rms, x.shape)
    raw = way != "aligned"

    def attack(pick: slice, trace: Trace) -> Tensor:
        return pgd(
            attacked,
            x[pick],
            target[pick],
            eps=eps,
            norm="l2",
            steps=rounds,
            step_size=_STEP if raw else eps / 20,
            direction="raw" if raw else "gradient",
            random_start=False,
            targeted=True,
            gradient=gradient,
            seed=random.fold(keys[pick], "rounds"),
            stop="success",
            trace=trace,
        )

    return watched(attack, x, y, target, rounds=rounds, checked=checked, batch_size=batch_size)[1]


_USED = ("model", "defense", "way", "rounds", "rms", "eot", "checked", "fresh")


def _history(case: Case) -> Measured:
    """Arrays: `first_hit` and `right` by round; of checked rounds what is left on fresh draws."""
    fields, lab = case.fields, case.lab

    def make() -> Measured:
        found = lab.dataset(fields)
        batch = next(found.batches(len(found)))
        if batch.target is None:
            raise ConfigError(
                "S1's attacks are targeted; give data with targets, or targets=random"
            )
        x, y, target, index = (
            t.to(lab.device) for t in (batch.x, batch.y, batch.target, batch.index)
        )
        model, defense = lab.model(str(fields["model"])), lab.defense(str(fields["defense"]))
        keys = random.keys(lab.seed, index)
        with torch.no_grad():
            said = [
                call(model, x[i : i + lab.batch_size], keys[i : i + lab.batch_size]).argmax(1)
                for i in range(0, len(x), lab.batch_size)
            ]
        kept = torch.cat(said) == y
        if not bool(kept.any()):
            raise RangeError("the bare classifier gets no image right; there is nothing to attack")
        x, y, target, keys = x[kept], y[kept], target[kept], keys[kept]
        checked = [int(r) for r in fields.get("checked", [])]
        history = rounds_of(
            model,
            defense,
            x,
            target,
            y,
            keys,
            way=str(fields["way"]),
            rounds=int(fields["rounds"]),
            rms=float(fields.get("rms", 0.05)),
            draws=int(fields.get("eot", 30)),
            checked=checked,
            batch_size=lab.batch_size,
        )
        arrays: dict[str, Any] = {"first_hit": history.first_hit, "right": history.right}
        whole = Pipeline(model, defense)
        correct, hits = [], []
        for r in checked:
            judged = judge(
                whole,
                history.images[r],
                y,
                keys,
                draws=int(fields.get("fresh", 8)),
                batch_size=4 * lab.batch_size,
            )
            correct.append(judged.correct.double().numpy() / judged.draws)
            hits.append(judged.hits(target.cpu()).double().numpy() / judged.draws)
        shape = (len(checked), len(x))
        arrays["checked"] = np.array(checked, dtype=np.int64)
        arrays["fresh right"] = np.array(correct).reshape(shape)
        arrays["fresh hits"] = np.array(hits).reshape(shape)
        return Measured(arrays, {"value": Number(None)})

    return cast(Measured, lab.keep("rounds", fields, _USED, make))


def _recalled(found: Measured) -> History:
    return History(np.asarray(found.arrays["first_hit"]), np.asarray(found.arrays["right"]))


def _number(found: Rate) -> Number:
    return Number(found.value, found.n, found.low, found.high)


@metric("round by round", models=True)
def _round(case: Case) -> Measured:
    """S1 Fig. 3: `what` (ACC or ASR) at round `at` or the last, counted `own` or `fresh`.

    Fields: `way` (see `WAYS`), `rounds`, `rms`, `eot` (draws of a gradient), `checked` (rounds that
    are judged again), `fresh` (draws of that judgement).
    """
    fields = case.fields
    last, what = int(fields["rounds"]), str(fields["what"])
    found, at = _history(case), min(int(fields["at"]), last)
    if what not in ("ACC", "ASR"):
        raise ConfigError(f"what is {what!r}; expected ACC or ASR")
    if str(fields.get("count", "own")) == "own":
        history = _recalled(found)
        series = history.accuracy if what == "ACC" else history.success
        value = series[at]
    else:
        listed = list(found.arrays["checked"])
        if at not in listed:
            raise ConfigError(f"round {at} is not among those judged again: {listed}")
        row = found.arrays["fresh right" if what == "ACC" else "fresh hits"][listed.index(at)]
        value = rate(np.asarray(row), int(fields.get("fresh", 8)))
    return Measured({}, {"value": _number(value)})


@metric("rounds to hit", share=False, models=True)
def _rounds_to(case: Case) -> Measured:
    """S1 Table II: round by which the field `share` of the images was hit; None if it was not."""
    history = _recalled(_history(case))
    reached = history.rounds_to(float(case.fields["share"]))
    n = len(history.first_hit)
    return Measured({}, {"value": Number(None if reached is None else float(reached), n)})


_YEAR = re.compile(r"\b(?:19|20)\d\d\b(?!\.\d)")


@metric("published until", share=False, models=True)
def _until(case: Case) -> Measured:
    """How many attacks or defenses of the package (field `kind`) were published `until` a year."""
    if case.fields["kind"] == "attacks":
        papers = {name: ATTACKS[name].paper for name in ATTACKS}
    else:
        papers = {name: DEFENSES[name].paper for name in DEFENSES}
    years = []
    for name, paper in papers.items():
        found = _YEAR.search(paper)
        if found is None:
            raise ConfigError(f"{name!r} has no year in {paper!r}")
        years.append(int(found.group()))
    upto = sum(year <= int(case.fields["until"]) for year in years)
    return Measured({}, {"value": Number(float(upto))})


@metric("distortion over grids", share=False, models=True)
def _distortion(case: Case) -> Measured:
    """What RDG does: field `number`, `dropped` (share of pixels never read) or `moved` (pixels).

    Arrays: the first image, source rows and columns of its first draw, whether each begins at the
    far end (`mirrored`), and what comes out.
    """
    fields, lab = case.fields, case.lab

    def make() -> Measured:
        x, _, index = lab.images(fields)
        keys = random.keys(lab.seed, index)
        defense = lab.defense(str(fields["defense"]))
        if not isinstance(defense, RDG):
            raise ConfigError(f"this is about RDG; the field 'defense' is {fields['defense']!r}")
        params = defense.draw(keys, x.shape)
        height, width = x.shape[-2:]

        def read(places: Tensor, n: int) -> Tensor:
            seen = torch.zeros(len(places), n, device=places.device)
            return seen.scatter_(1, places, 1.0).mean(1)

        dropped = 1 - read(params["rows"], height) * read(params["columns"], width)
        at = [torch.arange(n, device=x.device) for n in (height, width)]
        down = (params["rows"] - at[0]).double()[:, :, None]
        across = (params["columns"] - at[1]).double()[:, None, :]
        moved = (down.square() + across.square()).sqrt().mean((1, 2))
        seen = defense.transform(x[:1], {k: v[:1] for k, v in params.items()})
        upper = RDG(delta=defense.delta, strips=defense.strips).draw(keys[:1], x.shape)
        mirrored = [bool((params[k][:1] != upper[k]).any()) for k in ("rows", "columns")]
        return Measured(
            {
                "image": x[0].cpu().numpy(),
                "rows": params["rows"][0].cpu().numpy(),
                "columns": params["columns"][0].cpu().numpy(),
                "seen": seen[0].cpu().numpy(),
                "strips": np.array(defense.strips),
                "mirrored": np.array(mirrored),
            },
            {"dropped": mean(dropped.cpu(), (0.0, 1.0)), "moved": mean(moved.cpu(), (0.0, np.inf))},
        )

    found = lab.keep("distortion over grids 2", fields, ("defense",), make)
    return _pick(found, fields["number"])
