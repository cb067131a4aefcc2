"""How often each registered attack makes the host wait for the device.

Oracle: a count of the operations that read values back. On a GPU each of them drains the queue, so
that the device idles while the host prepares the next step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import feint.attacks  # noqa: F401  (registers every attack)
from feint.core.gradients import eot
from feint.core.mixed import mixed
from feint.core.registry import ATTACKS
from tests.contracts.attack_harness import EPS, HostSyncs
from tests.tiny import LinearModel, StochasticLinear, images, predicted


@dataclass(frozen=True)
class Case:
    """Two lengths of a run, and how many waits a unit of the difference may add."""

    few: dict[str, Any]
    many: dict[str, Any]
    units: int
    """How many more steps the longer run takes."""
    per_step: int = 1
    """Waits of a step with `stop="success"`: the compaction."""
    fixed: dict[str, Any] = field(default_factory=dict)
    never: int = 0
    """Waits of a step with `stop="never"`: there should be nothing to wait for."""


def steps(per_step: int = 1, **fixed: Any) -> Case:
    return Case({"steps": 2}, {"steps": 9}, 7, per_step, fixed)


def rebuilt() -> dict[str, Any]:
    return {"decoder": torch.sigmoid, "encoder": lambda x: torch.logit(x, 1e-3)}


def in_turn(count: int) -> dict[str, Any]:
    return {"attacks": f"pgd(steps={count}), apgd(steps={count}), fab(steps={count})"}


CASES = {
    "apgd": steps(),
    "autoattack": Case(
        {"steps": 2, "queries": 2}, {"steps": 9, "queries": 9}, 7, 4, {"targets": 2}
    ),
    "bim": steps(),
    "carlini_wagner": steps(per_step=2, search_steps=2),
    "ddn": steps(),
    "deepfool": steps(),
    "ead": steps(per_step=2, search_steps=2),
    "fab": steps(),
    "feature_bpda": steps(),
    "fgsm": Case({}, {}, 0),
    "fmn": steps(),
    "hopskipjump": steps(per_step=0, probes=5),
    # One pair of the 48 values a step: 1/48 of gamma is half a step.
    # Samples without a pair left to change leave, whatever `stop` says.
    "jsma": Case({"gamma": 4 / 48}, {"gamma": 18 / 48}, 7, 2, never=1),
    "lbfgs": steps(per_step=2, search_steps=2),
    "mi_fgsm": steps(),
    "one_pixel": Case({"generations": 2}, {"generations": 9}, 7, 1, {"popsize": 8}),
    "pgd": steps(restarts=2),
    "reparameterized": steps(**rebuilt()),
    # A look every 32 transformations.
    "spatial": Case({"tries": 64}, {"tries": 64 + 7 * 32}, 7, 1, {"search": "random"}),
    "spsa": steps(samples=4),
    "square": Case({"queries": 2}, {"queries": 9}, 7),
    "transfer": steps(),
    "worst_of": Case(in_turn(2), in_turn(9), 7, 3),
}


def waits(name: str, norm: str, stop: str, count: int = 3, **over: Any) -> int:
    info = ATTACKS[name]
    model = over.pop("model", None) or LinearModel()
    x = images(count, low=0.45, high=0.55)
    y = predicted(LinearModel(), x)
    kwargs: dict[str, Any] = {"norm": norm, "stop": stop, "loss": "margin", **over}
    if "eps" in info.parameters:
        kwargs.setdefault("eps", EPS[norm] * 1e-3)  # nothing falls, so that no run ends early
    known = {k: v for k, v in kwargs.items() if k in info.parameters}
    with HostSyncs() as syncs:
        info.component(model, x, y, **known)
    return syncs.count


def test_every_attack_is_in_the_table() -> None:
    assert set(ATTACKS) <= set(CASES)


EVERY = [(name, norm) for name in ATTACKS for norm in ATTACKS[name].norms]
FIRST = [(name, ATTACKS[name].norms[0]) for name in ATTACKS]
ESTIMATED = [(name, norm) for name, norm in FIRST if "gradient" in ATTACKS[name].parameters]


@pytest.mark.parametrize(("name", "norm"), EVERY)
def test_no_step_waits_if_nothing_stops_early(name: str, norm: str) -> None:
    case = CASES[name]
    few, many = (waits(name, norm, "never", **case.fixed, **c) for c in (case.few, case.many))
    assert few > 0
    assert many - few == case.units * case.never


@pytest.mark.parametrize(("name", "norm"), EVERY)
def test_a_step_waits_for_its_compaction_at_most(name: str, norm: str) -> None:
    case = CASES[name]
    few, many = (waits(name, norm, "success", **case.fixed, **c) for c in (case.few, case.many))
    assert many - few <= case.units * case.per_step


@pytest.mark.parametrize(("name", "norm"), FIRST)
def test_samples_wait_together(name: str, norm: str) -> None:
    case = CASES[name]
    for stop in ("success", "never"):
        one, more = (waits(name, norm, stop, n, **case.fixed, **case.few) for n in (1, 6))
        assert one == more


@pytest.mark.parametrize(("name", "norm"), ESTIMATED)
def test_draws_do_not_wait(name: str, norm: str) -> None:
    case, model = CASES[name], StochasticLinear(sigma=0.001)
    over = {"model": model, "gradient": eot(2), **case.fixed}
    few, many = (waits(name, norm, "never", **over, **c) for c in (case.few, case.many))
    assert few > 0
    assert many - few == case.units * case.never


@pytest.mark.parametrize("name", ["pgd", "apgd", "fab", "feature_bpda", "transfer"])
def test_mixed_precision_waits_once_a_step(name: str) -> None:
    # To find the rows in doubt, as its docstring says.
    case = CASES[name]
    over = {"gradient": mixed(), **case.fixed}
    few, many = (waits(name, "l2", "never", **over, **c) for c in (case.few, case.many))
    assert many - few == 7


# --- the counter itself ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wait", "count"),
    [
        (lambda t: float(t.sum()), 1),
        (lambda t: bool(t.any()), 1),
        (lambda t: t.sum().item(), 1),
        (lambda t: t.nonzero(), 1),
        (lambda t: torch.where(t > 0), 1),
        (lambda t: t[t > 0], 1),
        (lambda t: t.masked_select(t > 0), 1),
        (lambda t: torch.equal(t, t), 1),
        (lambda t: t.unique(), 1),
        (lambda t: t.repeat_interleave(torch.tensor([1, 2, 3, 4])), 1),
        (lambda t: t.repeat_interleave(2), 0),
        (lambda t: t[torch.tensor([0, 2])], 0),
        (lambda t: torch.where(t > 0, t, 0), 0),
        (lambda t: t.cumsum(0).sort(), 0),
    ],
)
def test_the_counter_sees_what_waits(wait: Any, count: int) -> None:
    t: Tensor = torch.arange(4.0)
    with HostSyncs() as syncs:
        wait(t)
    assert syncs.count == count
