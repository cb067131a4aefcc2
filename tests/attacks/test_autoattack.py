from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from feint.attacks.autoattack import autoattack
from feint.attacks.worst_of import worst_of
from feint.core import random
from feint.core.errors import ConfigError, ModelError, RangeError
from feint.core.gradients import eot
from feint.core.norms import distance
from feint.evaluation.judge import judge
from tests.attacks.ensembles import EnsembleContract
from tests.contracts.attack_harness import HostSyncs
from tests.tiny import Counting, LinearModel, StochasticLinear, TinyConv, images, predicted


class TestAutoAttack(EnsembleContract):
    attack = staticmethod(autoattack)
    kwargs: ClassVar = {"steps": 2, "targets": 2, "queries": 4, "draws": 2, "held_out": 4}
    random = True

    def test_no_host_synchronisation_within_a_step(self, norm: str) -> None:
        # Oracle: count of waiting operations: one a step and attack, and none with "never".
        model = LinearModel()
        x = images(4)
        y = predicted(model, x)

        def waits(steps: int, stop: str) -> int:
            with HostSyncs() as syncs:
                self.run(model, x, y, norm, steps=steps, stop=stop, eps=1e-4)
            return syncs.count

        assert waits(12, "never") == waits(2, "never") > 0
        assert waits(12, "success") - waits(2, "success") == 30


NORMS = pytest.mark.parametrize("norm", ["linf", "l2", "l1"])


@NORMS
@pytest.mark.parametrize("version", ["standard", "plus"])
def test_succeeds_if_and_only_if_eps_exceeds_the_distance(norm: str, version: str) -> None:
    # Oracle: closed form, for five classes: the targeted parts miss none of the boundaries.
    model = LinearModel()
    x = images(3, low=0.45, high=0.55)
    y = predicted(model, x)
    for i, least in enumerate(model.distance(x, y, norm).tolist()):
        one = slice(i, i + 1)
        for factor in (0.98, 1.02):
            x_adv = autoattack(
                model, x[one], y[one], version=version, eps=factor * least, norm=norm, steps=40,
                queries=20,
            )  # fmt: skip
            assert bool(predicted(model, x_adv) != y[one]) is (factor > 1)
            assert float(distance(x_adv, x[one], norm)) <= factor * least


def passes(version: str, norm: str = "linf", **kwargs: Any) -> tuple[int, int]:
    inner = TinyConv()
    model = Counting(inner)
    x = images(3, (3, 6, 6)).double()
    autoattack(
        model, x, predicted(inner, x), version=version, norm=norm, eps=1e-4, steps=5, queries=7,
        stop="never", **kwargs,
    )  # fmt: skip
    return model.forwards - 2 * 3, model.backwards  # all three are asked twice first


def test_the_parts_are_those_of_the_paper() -> None:
    # Oracle: counts. APGD; a clean pass and the targets' rows; the same for FAB; Square.
    ce, rows = 3 * 6, 3 * 4 * 6
    assert passes("standard") == (ce + 2 * (3 + rows) + 3 * 7, 3 * 5 + 2 * 3 * 4 * 5)
    assert passes("standard", targets=2)[1] == 3 * 5 + 2 * 3 * 2 * 5
    assert passes("standard", norm="l1") == (ce + 2 * (3 + rows), 3 * 5 + 2 * 3 * 4 * 5)
    # Five restarts of two APGDs and of FAB, whose backward passes are one per rival class.
    forwards, backwards = passes("plus")
    assert forwards == 5 * 2 * ce + (3 + 5 * ce) + 3 * 7 + 2 * (3 + rows)
    assert backwards == 5 * 2 * 3 * 5 + 5 * 3 * 5 * 4 + 2 * 3 * 4 * 5


def test_targeted_pursues_one_class() -> None:
    model = LinearModel()
    x = images(4, low=0.4, high=0.6)
    y = predicted(model, x)
    target = (y + 2) % 5
    x_adv = autoattack(model, x, target, targeted=True, eps=0.2, steps=20, queries=20)
    assert torch.equal(predicted(model, x_adv), target)


def test_samples_leave_after_the_part_that_felled_them() -> None:
    # Oracle: closed form: eps between the distances: those that stand see every part.
    model = LinearModel(classes=2)
    x = images(8, low=0.4, high=0.6)
    y = predicted(model, x)
    least = model.distance(x, y, "linf")
    eps = float(least.median()) * 1.01
    last: set[int] = set()
    x_adv = autoattack(
        model, x, y, eps=eps, steps=30, queries=9,
        trace=lambda step, p, logits, loss, rows: (last.clear(), last.update(rows.tolist())),
    )  # fmt: skip
    standing = set((least > eps).nonzero()[:, 0].tolist())
    assert 0 < len(standing) < 8
    assert last == standing
    assert set((predicted(model, x_adv) == y).nonzero()[:, 0].tolist()) == standing


# --- random models --------------------------------------------------------------------------------


class Coin(nn.Module):
    """Right about class 0 with probability p, whatever its input; a hint of a gradient."""

    stochastic = True

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.linear = p, LinearModel(shape=(3, 2, 2))

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        u = random.uniform(random.entropy_keys(len(x)) if keys is None else keys)
        wrong = (u >= self.p).to(x.dtype)
        zero = torch.zeros_like(wrong)
        return torch.stack([zero + 1, 2 * wrong, zero, zero, zero], 1) + 1e-3 * self.linear(x)


@pytest.mark.parametrize("p", [0.95, 0.8])
def test_a_coin_keeps_its_accuracy(p: float) -> None:
    # Oracle: p. AutoAttack's own `rand` prints 85.9 and 53.9 % for these coins, since a sample
    # counts as broken once a single draw went wrong.
    model = Coin(p)
    x, y = images(100, (3, 2, 2)), torch.zeros(100, dtype=torch.int64)
    keys = random.keys(1, 100)
    x_adv = autoattack(model, x, y, eps=0.1, steps=4, draws=4, held_out=16, seed=keys)
    found = judge(model, x_adv, y, keys, draws=64)
    share = float(found.correct.sum()) / (100 * 64)
    assert abs(share - p) < 3.5 * (p * (1 - p) / 6400) ** 0.5


def test_a_random_model_falls_as_often_as_it_can() -> None:
    # Oracle: the noise-free model, whose boundary is far behind at three times the distance.
    model, clean = StochasticLinear(sigma=0.02), LinearModel()
    x = images(6, low=0.45, high=0.55)
    y = predicted(clean, x)
    eps = 3 * float(clean.distance(x, y, "linf").max())
    x_adv = autoattack(model, x, y, eps=eps, steps=6, draws=4, held_out=8)
    found = judge(model, x_adv, y, random.keys(4, 6), draws=16)
    assert int(found.correct.sum()) <= 0.05 * 6 * 16


def test_the_random_version_takes_the_draws_it_says() -> None:
    # Oracle: counts: two APGDs, and their two results on held-out draws.
    inner = StochasticLinear()

    class Keyed(Counting):
        stochastic = True

        def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
            self.forwards += len(x)
            return inner(x, keys=keys)

    counting = Keyed(inner)
    x = images(3)
    autoattack(counting, x, predicted(LinearModel(), x), steps=4, draws=5, held_out=7)
    assert counting.forwards == 3 * (2 * 5 * 5 + 2 * 7)


# --- AutoAttack's flags ---------------------------------------------------------------------------


class Unsaid(nn.Module):
    """A random model that does not say so: its logits come from torch's own generator."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = LinearModel()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + 0.01 * torch.randn(len(x), 1)


@pytest.mark.parametrize("attack", [autoattack, worst_of])
def test_randomness_that_is_not_declared_is_refused(attack: Any) -> None:
    # Oracle: the model. Its single draws would be taken for successes.
    x, y = images(3), torch.zeros(3, dtype=torch.int64)
    with (
        torch.random.fork_rng(),
        pytest.raises(ModelError, match="stochastic = True"),
    ):
        attack(Unsaid(), x, y)


class Probable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return LinearModel()(x).softmax(1)


def test_probabilities_are_attacked_as_they_are_and_told(caplog: pytest.LogCaptureFixture) -> None:
    # Oracle: closed form: the classes are those of the linear model.
    model = LinearModel()
    x = images(4, low=0.45, high=0.55)
    y = predicted(model, x)
    eps = 1.1 * float(model.distance(x, y, "linf").max())
    for tested, told in ((Probable(), 1), (model, 0)):
        caplog.clear()
        x_adv = autoattack(tested, x, y, eps=eps, steps=20, queries=5)
        assert bool((predicted(model, x_adv) != y).all())
        assert sum("probabilities" in r.message for r in caplog.records) == told


class Shy(nn.Module):
    """A gradient that leads away from what the scores say."""

    def forward(self, x: Tensor) -> Tensor:
        u = x.flatten(1).mean(1) - 0.5
        score = 2 * u.detach() - u
        return torch.stack([-score, score, score - 9, score - 9, score - 9], 1)


def test_scores_that_beat_gradients_are_told(caplog: pytest.LogCaptureFixture) -> None:
    # Oracle: closed form: brighter is class 1, and the gradient says darker.
    x, y = torch.full((6, 3, 4, 4), 0.48), torch.zeros(6, dtype=torch.int64)
    x_adv = autoattack(Shy(), x, y, eps=0.05, steps=5, queries=200, targets=2)
    fell = int((predicted(Shy(), x_adv) != y).sum())
    assert fell > 0
    told = [r.getMessage() for r in caplog.records]
    assert told == [f"square, which sees no gradients, fells {fell} of 6 samples that those before "
                    "it left standing; the model's gradients may be masked"]  # fmt: skip


# --- few classes, bad settings --------------------------------------------------------------------


@NORMS
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("version", ["standard", "plus", "random"])
def test_few_classes_fall_back_to_the_margin(norm: str, classes: int, version: str) -> None:
    # Oracle: closed form; DLR needs three classes, its targeted form four.
    model = LinearModel(classes=classes)
    x = images(3, low=0.45, high=0.55)
    y = predicted(model, x)
    eps = 1.5 * float(model.distance(x, y, norm).max())
    x_adv = autoattack(
        model, x, y, version=version, norm=norm, eps=eps, steps=10, queries=5, draws=2
    )
    assert bool((predicted(model, x_adv) != y).all())


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"version": "rand"}, ConfigError, "standard, plus, random"),
        ({"queries": 0}, RangeError, "queries is 0"),
        ({"targets": 0}, RangeError, "targets is 0"),
        ({"draws": 0}, RangeError, "draws is 0"),
        ({"held_out": 0}, RangeError, "held_out is 0"),
    ],
    ids=str,
)
def test_bad_settings_name_the_fix(
    kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        autoattack(LinearModel(), images(2), torch.tensor([0, 1]), **kwargs)


def test_single_draws_of_a_random_model_are_refused() -> None:
    model = StochasticLinear()
    x, y = images(2), torch.tensor([0, 1])
    with pytest.raises(ConfigError, match="version='random'"):
        autoattack(model, x, y, version="standard")
    x_adv = autoattack(
        model, x, y, version="standard", gradient=eot(2), steps=2, queries=2, draws=2
    )
    assert x_adv.shape == x.shape
