"""Semi-brute force. Oracles: spies, a coin's closed forms, and PGD where nothing is hidden."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from feint.attacks import pgd
from feint.core import random
from feint.core.errors import GradientError, RangeError
from feint.core.gradients import Estimate, backprop
from feint.core.losses import cross_entropy
from feint.defenses import parse
from feint.defenses.base import Defense, Params
from feint.defenses.chain import Chain
from feint.evaluation import Batch, Cell, Pipeline, Subject, effort_to, execute, rms_budget
from feint.evaluation.evaluate import Memory, TensorSamples
from feint.evaluation.semi_brute_force import (
    differentiable_parts,
    round_by_round,
    semi_brute_force,
)
from tests.evaluation.planted import Coin, Jitter, Opaque, Spy, Steps, Through
from tests.tiny import Detach, LinearModel, images, predicted

X = images(12)
MODEL = LinearModel()
Y = predicted(MODEL, X)


class Wall(Defense):
    """Lets nothing through: every image becomes gray. Not differentiable."""

    differentiable = False

    def transform(self, x: Tensor, params: Params) -> Tensor:
        return torch.full_like(x, 0.5)


def test_the_differentiable_parts() -> None:
    chain = parse("fd + rdg + jpeg")
    assert str(differentiable_parts(chain)) == "rdg"
    assert str(differentiable_parts(parse("rdg + pixel_shift + fd"))) == "rdg + pixel_shift"
    assert differentiable_parts(Opaque()) is None
    assert differentiable_parts(Chain([Opaque(), Steps()])) is None
    whole = parse("rdg")
    assert differentiable_parts(whole) is whole


def test_gradients_are_the_parts_and_answers_the_wholes() -> None:
    """Oracle: backprop through the part, and the whole's own logits under the same keys."""
    whole, part = Pipeline(MODEL, Steps(levels=3)), Pipeline(MODEL)
    keys = random.keys(0, len(X))
    found = round_by_round(part)(whole, X, Y, cross_entropy, keys)
    expected = backprop(part, X, Y, cross_entropy, keys)
    assert torch.equal(found.gradient, expected.gradient)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.logits[:, 0], whole(X))
    assert not torch.equal(found.logits, expected.logits)
    assert isinstance(found, Estimate)


def test_a_cut_part_is_an_error() -> None:
    """Its zeros come from the part, so the part is named; not the whole, which has no gradient."""
    estimator = round_by_round(Pipeline(torch.nn.Sequential(Detach(), MODEL)))
    keys = random.keys(0, len(X))
    with pytest.raises(GradientError, match="graph is cut"):
        estimator(Pipeline(MODEL), X, Y, cross_entropy, keys)


@pytest.mark.parametrize("defense", [None, Through()])
def test_without_a_hidden_part_it_is_pgd(defense: Defense | None) -> None:
    """Oracle: `pgd` on the model, which also stops at its first success."""
    found = semi_brute_force(MODEL, X, Y, defense=defense, rounds=9, eps=0.2, batch_size=5)
    keys = random.fold(random.keys(0, torch.arange(len(X))), "attack")
    plain = pgd(MODEL, X, Y, eps=0.2, steps=9, random_start=False, seed=keys, stop="success")
    assert torch.allclose(found.x_adv, plain)
    assert found.success[-1].value == pytest.approx(
        float((MODEL(plain).argmax(1) != Y).double().mean())
    )
    assert found.held.value == 1.0  # nothing is random: what got through gets through again
    assert found.verified.draws == 1


def test_a_wall_lets_nothing_through() -> None:
    """What is found on the part is tried against the whole: right-censored at the last round."""
    y = torch.full_like(Y, int(MODEL(torch.full_like(X[:1], 0.5)).argmax()))
    found = semi_brute_force(MODEL, X, y, defense=Wall(), rounds=5, eps=0.5)
    assert found.first_hit.tolist() == [-1] * len(X)
    assert [r.value for r in found.accuracy] == [1.0] * 6
    assert found.rounds_to(0.1) is None
    assert found.honest.value == 0
    with pytest.raises(RangeError, match="no image was hit"):
        _ = found.held


def test_lucky_hits_do_not_hold() -> None:
    """A coin of p = 0.8 whatever its input: hit by round r with probability 1 − 0.8^(r+1), and
    a hit holds on a fifth of fresh draws. Oracle: these closed forms, inside their intervals."""
    shape, n = (3, 2, 2), 300
    x, y = images(n, shape), torch.zeros(n, dtype=torch.int64)
    held, hits = [], []
    for seed in range(6):
        found = semi_brute_force(
            Coin(0.8), x, y, rounds=6, draws=2, judge_draws=20, batch_size=300, seed=seed
        )
        hits.append([rate.value for rate in found.success])
        held.append(found.held.value)
        for alive, hit in zip(found.accuracy, found.success, strict=True):
            assert alive.value == pytest.approx(1 - hit.value)  # untargeted: right is not yet hit
    error = (0.16 / (6 * 0.79 * n * 20)) ** 0.5
    assert np.mean(held) == pytest.approx(0.2, abs=4 * error)
    expected = [1 - 0.8 ** (r + 1) for r in range(7)]
    assert np.mean(hits, 0) == pytest.approx(expected, abs=4 * (0.25 / (6 * n)) ** 0.5)
    assert found.rounds_to(0.2) == int(np.sort(found.first_hit[found.first_hit >= 0])[59])


def test_targeted_rounds_are_right_or_hit_or_neither() -> None:
    """S1's ACC counts images alive and right, its ASR images that hit the target."""
    target = (Y + 1) % 5
    found = semi_brute_force(
        MODEL, X, Y, defense=Steps(levels=64), target=target, rounds=12, eps=0.6
    )
    assert found.success[-1].value > 0.5
    for right, hit in zip(found.accuracy, found.success, strict=True):
        assert right.value + hit.value <= 1 + 1e-9
    hit = found.first_hit >= 0
    assert (found.verified.hits(target).numpy()[hit] == 1).all()


def test_a_cell_does_the_same() -> None:
    """Rounds, and what Table II reads from them, from a cell's rows. Oracle: the function above."""
    attack = "pgd(steps=9, random_start=False)"
    cell = Cell("semi-brute-force", "m", "d", attack, eps=0.2)
    subject = Subject(MODEL, Steps(levels=8))
    samples = TensorSamples(Batch(X, Y, torch.arange(len(X))))
    (found,) = execute([cell], lambda _: subject, samples, cache=Memory())
    again = semi_brute_force(MODEL, X, Y, defense=Steps(levels=8), rounds=9, eps=0.2)
    assert found.rows["first_hit"].tolist() == again.first_hit.tolist()
    for share in (0.1, 0.3, 0.5):
        assert effort_to(found, [share]) == {share: again.rounds_to(share)}


def test_hits_of_a_random_whole_are_judged_again() -> None:
    """First hits overstate: nearly all are hit once, and the mean on fresh draws is far less."""
    x, y = images(100, (3, 2, 2)), torch.zeros(100, dtype=torch.int64)
    cell = Cell("semi-brute-force", "m", "d", "pgd(steps=30, gradient=eot(2))")
    samples = TensorSamples(Batch(x, y, torch.arange(100)))
    subject = Subject(Coin(0.8), Through())
    (found,) = execute([cell], lambda _: subject, samples, cache=Memory(), batch_size=100)
    assert found.first_hits is not None
    assert found.first_hits.value > 0.95
    assert found.accuracy.low <= 0.8 <= found.accuracy.high
    assert found.luck == pytest.approx(found.first_hits.value - (1 - found.accuracy.value))


def test_the_part_is_counted_with_the_whole() -> None:
    """Per round one pass of each and one derivative of the part. Oracle: a spy, counted by hand."""
    spy = Spy(MODEL)
    cell = Cell("semi-brute-force", "m", "d", "pgd(steps=4, random_start=False, stop='never')")
    found = Subject(spy, Steps()).attacker(cell).run(X, Y, random.keys(0, len(X)), 100)
    assert (found.forwards, found.backwards) == (2 * 5 * len(X), 4 * len(X))
    assert spy.asked == found.forwards


def test_rms_budgets() -> None:
    """Oracle: FACTS' 0.05 rms of 299×299 RGB is an absolute l2 of 25.89; the inverse."""
    assert rms_budget(0.05, (3, 299, 299)) == pytest.approx(25.89, abs=5e-3)
    x = torch.full((1, 3, 4, 4), 0.05)
    assert rms_budget(0.05, x.shape) == pytest.approx(float(x.norm()))
    with pytest.raises(RangeError, match="expected 0 to 1"):
        rms_budget(12.75, (3, 8, 8))
    with pytest.raises(RangeError, match=r"expected \(C, H, W\)"):
        rms_budget(0.1, (8, 8))


@pytest.mark.parametrize("share", [0, 1.5])
def test_shares_of_rounds(share: float) -> None:
    found = semi_brute_force(MODEL, X, Y, rounds=1, eps=0.0)
    with pytest.raises(RangeError, match="expected a number in"):
        found.rounds_to(share)
    with pytest.raises(RangeError, match="rounds, batch_size"):
        semi_brute_force(MODEL, X, Y, rounds=0)


def test_jitter_is_averaged_in_the_part() -> None:
    """A random differentiable part is followed over draws: D derivatives a round."""
    cell = Cell("semi-brute-force", "m", "d", "pgd(steps=2, random_start=False, stop='never')")
    subject = Subject(MODEL, Chain([Steps(), Jitter()]).eval())
    found = subject.attacker(cell).run(X, Y, random.keys(0, len(X)), 100)
    assert found.backwards == 2 * 8 * len(X)
    assert found.forwards == 3 * (8 + 1) * len(X)
