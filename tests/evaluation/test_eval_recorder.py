"""What is noted of an attack: first hits, late gains, passes. Oracles: counts by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from feint.attacks import pgd
from feint.core import random
from feint.core.gradients import spsa
from feint.evaluation.recorder import Recorder, counted
from tests.tiny import LinearModel, StochasticLinear, images, predicted

Y = torch.tensor([0, 1])
RIGHT, WRONG = [[2.0, 1.0], [1.0, 2.0]], [[1.0, 2.0], [2.0, 1.0]]


def record(recorder: Recorder, step: int, logits: list, loss: list, active: list) -> None:
    recorder(
        step,
        torch.zeros(len(active), 3, 1, 1),
        torch.tensor(logits),
        torch.tensor(loss),
        torch.tensor(active),
    )


def test_first_hits_under_restarts() -> None:
    """A sample of two rows is hit if one row is, at the earliest step; others later or never."""
    recorder = Recorder(Y, targeted=False)
    both = [RIGHT[0], RIGHT[0], RIGHT[1], RIGHT[1]]
    record(recorder, 0, both, [0.0] * 4, [0, 0, 1, 1])
    record(recorder, 1, [RIGHT[0], WRONG[0], RIGHT[1], RIGHT[1]], [0.0] * 4, [0, 0, 1, 1])
    record(recorder, 2, [WRONG[0], WRONG[0], RIGHT[1], RIGHT[1]], [0.0] * 4, [0, 0, 1, 1])
    assert recorder.summary()["first_hit"].tolist() == [1, -1]


def test_first_hits_of_targets_and_draws() -> None:
    """Targets are hit when predicted; one adversarial draw of several is a hit."""
    aimed = Recorder(torch.tensor([1, 1]), targeted=True)
    record(aimed, 0, [WRONG[0], RIGHT[0]], [0.0, 0.0], [0, 1])
    assert aimed.summary()["first_hit"].tolist() == [0, -1]
    drawn = Recorder(Y, targeted=False)
    record(drawn, 3, [[RIGHT[0], WRONG[0]], [RIGHT[1], RIGHT[1]]], [0.0, 0.0], [0, 1])
    assert drawn.summary()["first_hit"].tolist() == [3, -1]
    invalid = Recorder(Y, targeted=False)
    record(invalid, 0, [[math.nan, 1.0], [math.nan, 1.0]], [0.0, 0.0], [0, 1])
    assert invalid.summary()["first_hit"].tolist() == [-1, -1]  # NaN is no success


def test_late_gain() -> None:
    """Over 41 steps the last four count: by hand 4/40 for a steady climb, 0 once settled."""
    recorder = Recorder(torch.zeros(5, dtype=torch.int64), targeted=False)
    for step in range(41):
        losses = [
            float(step),  # climbs to the end
            float(min(step, 10)),  # has settled
            -float(step),  # falls: the best point stays the first
            0.0 if step < 40 else 5.0,  # jumps at the end
            math.sin(step),  # goes round
        ]
        record(recorder, step, [RIGHT[0]] * 5, losses, [0, 1, 2, 3, 4])
    gain = recorder.summary()["late_gain"]
    assert gain.tolist()[:4] == pytest.approx([0.1, 0.0, 0.0, 1.0])
    assert gain[4] < 1e-3


def test_late_gain_of_odd_traces() -> None:
    """A trace that starts later, NaN losses, and samples that left early give no NaN."""
    recorder = Recorder(torch.zeros(3, dtype=torch.int64), targeted=False)
    record(recorder, 1, [RIGHT[0]] * 3, [1.0, math.nan, 2.0], [0, 1, 2])
    record(recorder, 2, [RIGHT[0]] * 2, [2.0, math.nan], [0, 1])
    assert recorder.summary()["late_gain"].tolist() == [1.0, 0.0, 0.0]
    unseen = Recorder(torch.zeros(2, dtype=torch.int64), targeted=False).summary()
    assert unseen["first_hit"].tolist() == [-1, -1]
    assert unseen["late_gain"].isnan().all()


def test_a_real_trace_with_restarts_and_compaction() -> None:
    """Oracle: first hits of restarts folded together are the earliest of the restarts' own.

    With `stop="never"` the recorded first hit is the least step at which any row was adversarial.
    """
    model = LinearModel()
    x = images(12)
    y = predicted(model, x)
    seen: list[tuple[int, Tensor, Tensor]] = []
    recorder = Recorder(y, targeted=False)

    def trace(step: int, x_adv: Tensor, logits: Tensor, loss: Tensor, active: Tensor) -> None:
        recorder(step, x_adv, logits, loss, active)
        seen.append((step, active, model(x_adv).argmax(1) != y[active]))

    pgd(model, x, y, eps=0.05, steps=8, step_size=0.005, restarts=3, trace=trace)
    expected = torch.full((12,), -1)
    for step, active, wrong in reversed(seen):
        expected[active[wrong]] = step
    found = recorder.summary()["first_hit"]
    assert torch.equal(found, expected)
    assert -1 in found  # some stand, so the test says something about both
    assert (found > 0).any()


@pytest.mark.parametrize("steps", [1, 4])
def test_passes_are_counted(steps: int) -> None:
    """Oracle: PGD that never stops takes steps + 1 forward and `steps` backward passes an image."""
    model = LinearModel()
    x = images(6)
    with counted(model) as passes:
        pgd(model, x, predicted(model, x) * 0, eps=0.01, steps=steps, stop="never")
    asked = 6  # `predicted` asks once, inside of the context
    assert passes.forwards == 6 * (steps + 1) + asked
    assert passes.backwards == 6 * steps


def test_scores_are_no_backward_passes() -> None:
    """Oracle: SPSA asks 1 + 2·samples times a step and never differentiates."""
    model = LinearModel()
    x = images(3)
    with counted(model) as passes:
        pgd(model, x, x[:, 0, 0, 0].long(), eps=0.01, steps=2, stop="never", gradient=spsa(4))
    assert passes.backwards == 0
    assert passes.forwards == 3 * (2 * (1 + 8) + 1)


def test_counting_leaves_no_trace() -> None:
    model = StochasticLinear()
    with counted(model), torch.no_grad():
        model(images(2), keys=random.keys(0, 2))
    assert not model._forward_hooks
    with pytest.raises(ValueError, match="odd"), counted(model):
        raise ValueError("odd")
    assert not model._forward_hooks
    odd = nn.Identity()
    with counted(odd) as passes:  # what gives no tensor is not counted, and not in the way
        odd([1, 2])
    assert passes.forwards == 0
