from __future__ import annotations

import inspect
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from feint.attacks import pgd
from feint.attacks.apgd import apgd
from feint.attacks.fab import fab
from feint.attacks.square import square
from feint.attacks.worst_of import worst_of
from feint.core import random
from feint.core.errors import ConfigError, RangeError, UnknownNameError
from feint.core.norms import distance
from feint.core.registry import ATTACKS
from tests.attacks.ensembles import EnsembleContract
from tests.tiny import LinearModel, StochasticLinear, TinyConv, images, predicted


class TestWorstOf(EnsembleContract):
    attack = staticmethod(worst_of)
    kwargs: ClassVar = {"attacks": "pgd(steps=3), apgd(steps=3, sparsity=0.02)"}
    random = True


def moves(amount: float, called: list[int] | None = None) -> Any:
    """An attack that nobody registered: moves a linear model's images straight at the boundary."""

    def attack(model: nn.Module, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
        if called is not None:
            called.append(len(x))
        return (x + amount * eps * torch.tensor([1.0, -1.0])[y].view(-1, 1, 1, 1)).clamp(0, 1)

    return attack


class Brightness(nn.Module):
    """Class 1 where the mean exceeds ½: image i falls once it is moved by its own distance."""

    def forward(self, x: Tensor) -> Tensor:
        u = x.flatten(1).mean(1) - 0.5
        return torch.stack([-u, u], 1)


X = torch.tensor([0.49, 0.47, 0.45, 0.42]).view(4, 1, 1, 1).expand(4, 3, 2, 2).contiguous()
Y = torch.zeros(4, dtype=torch.int64)


def test_only_what_still_stands_goes_on() -> None:
    # Oracle: closed form: moves of 0.02, 0.04 and 0.06 fell one image more each.
    for stop, calls in (("success", [4, 3, 2]), ("never", [4, 4, 4])):
        called: list[int] = []
        attacks = [moves(0.2, called), moves(0.4, called), moves(0.6, called)]
        x_adv = worst_of(Brightness(), X, Y, attacks=attacks, eps=0.1, stop=stop)
        assert called == calls
        assert predicted(Brightness(), x_adv).tolist() == [1, 1, 1, 0]
    # With "never" the largest margin counts, with "success" the first success.
    expected = [0.02, 0.04, 0.06, 0.06]
    x_adv = worst_of(
        Brightness(), X, Y, attacks=[moves(a) for a in (0.2, 0.4, 0.6)], eps=0.1, stop="success"
    )
    assert distance(x_adv, X, "linf").tolist() == pytest.approx(expected, abs=1e-6)


def test_a_sample_that_stands_gets_the_largest_margin() -> None:
    x_adv = worst_of(Brightness(), X, Y, attacks=[moves(0.6), moves(-0.5), moves(0.1)], eps=0.1)
    assert distance(x_adv, X, "linf").tolist() == pytest.approx([0.06] * 4, abs=1e-6)


def test_what_leaves_the_budget_does_not_count() -> None:
    # Oracle: closed form. A function that oversteps, and a minimal-norm attack.
    x_adv = worst_of(Brightness(), X, Y, attacks=[moves(2.0), moves(0.2)], eps=0.04)
    assert distance(x_adv, X, "linf").tolist() == pytest.approx([0.008] * 4, abs=1e-6)
    x_adv = worst_of(Brightness(), X, Y, attacks="fab(steps=5)", eps=0.04)
    assert predicted(Brightness(), x_adv).tolist() == [1, 1, 0, 0]
    assert bool((distance(x_adv, X, "linf") <= 0.04).all())
    # Nothing at all within the budget: the image itself.
    assert torch.equal(worst_of(Brightness(), X, Y, attacks=[moves(2.0)], eps=0.01), X)


def test_is_at_least_as_strong_as_each_attack() -> None:
    # Oracle: the attacks alone, with the keys that worst_of gives them.
    model = TinyConv()
    x = images(8, (3, 6, 6)).double()
    y = predicted(model, x)
    keys = random.keys(3, 8)
    fell = predicted(
        model,
        worst_of(model, x, y, attacks="pgd(steps=4), square(queries=30), fab(steps=5)", eps=0.02,
                 seed=keys),
    ) != y  # fmt: skip
    for number, (name, attack, kwargs) in enumerate(
        [("pgd", pgd, {"steps": 4, "eps": 0.02}), ("square", square, {"queries": 30, "eps": 0.02}),
         ("fab", fab, {"steps": 5})]
    ):  # fmt: skip
        alone = attack(model, x, y, seed=random.fold(keys, name, number), **kwargs)
        alone_fell = (predicted(model, alone) != y) & (distance(alone, x, "linf") <= 0.02)
        assert not bool((alone_fell & ~fell).any())


def test_all_ways_to_name_an_attack_mean_the_same() -> None:
    model = LinearModel()
    x = images(3)
    y = predicted(model, x)
    ways: list[Any] = [
        "apgd(steps=3, loss='dlr')",
        ["apgd(loss='dlr', steps=3)"],
        [("apgd", {"steps": 3, "loss": "dlr"})],
        [(apgd, {"steps": 3, "loss": "dlr"})],
    ]
    found = [worst_of(model, x, y, attacks=way, eps=0.05, stop="never") for way in ways]
    assert all(torch.equal(found[0], other) for other in found[1:])
    text = "pgd(steps=2, gradient=eot(2, base=spsa(4))), square(queries=3)"
    assert worst_of(model, x, y, attacks=text, eps=0.05).shape == x.shape


def test_common_settings_reach_the_attacks_and_their_own_win() -> None:
    seen: dict[str, Any] = {}

    def spy(model: Any, x: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
        seen.update(kwargs)
        return x

    info = ATTACKS["pgd"]
    spy.__signature__ = inspect.signature(pgd)  # type: ignore[attr-defined]
    object.__setattr__(info, "component", spy)
    try:
        worst_of(
            LinearModel(), images(2), torch.tensor([0, 1]), norm="l2", eps=0.5, loss="margin",
            attacks="pgd(eps=0.25, loss='dlr')", targeted=True,
            mask=torch.ones(1, 1, 4, 4, dtype=torch.bool),
        )  # fmt: skip
    finally:
        object.__setattr__(info, "component", pgd)
    assert (seen["norm"], seen["eps"], seen["loss"]) == ("l2", 0.25, "dlr")
    assert seen["targeted"] is True
    assert seen["mask"].shape == (1, 1, 4, 4)
    assert seen["seed"].shape == (2,)


def test_a_random_model_is_judged_on_held_out_draws() -> None:
    # Oracle: closed form. Two fixed answers: one succeeds on 30 % of the draws, one on 90 %;
    # whichever comes first, and whatever one lucky draw said, the second is taken.
    class Chance(nn.Module):
        stochastic = True

        def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
            u = random.uniform(random.entropy_keys(len(x)) if keys is None else keys)
            wrong = (u < x.flatten(1).mean(1)).to(x.dtype) * 2
            return torch.stack([torch.ones_like(wrong), wrong], 1)

    def to(value: float) -> Any:
        return lambda model, x, y: torch.full_like(x, value)

    x = torch.full((16, 3, 2, 2), 0.5)
    y = torch.zeros(16, dtype=torch.int64)
    for order in ([0.3, 0.9], [0.9, 0.3]):
        x_adv = worst_of(Chance(), x, y, attacks=[to(v) for v in order], eps=0.5)
        assert bool((x_adv == torch.tensor(0.9)).all())


def test_a_random_model_loses_no_sample_to_luck() -> None:
    # Every attack sees every sample, unless all held-out draws agree and stop="success".
    called: list[int] = []

    def lazy(model: Any, x: Tensor, y: Tensor) -> Tensor:
        called.append(len(x))
        return x

    model = StochasticLinear()
    x = images(5)
    y = predicted(LinearModel(), x)
    worst_of(model, x, y, attacks=[lazy, lazy])
    assert called == [5, 5]
    called.clear()
    wrong = torch.cat([(y[:3] + 1) % 5, y[3:]])  # far on the other side: all draws agree
    worst_of(model, x, wrong, attacks=[lazy, lazy], stop="success")
    assert called == [5, 2]


@pytest.mark.parametrize(
    ("attacks", "kwargs", "error", "message"),
    [
        ("", {}, ConfigError, "empty"),
        ([], {}, ConfigError, "expected a text"),
        (7, {}, ConfigError, "expected a text"),
        ([3], {}, ConfigError, "a pair such as"),
        ("pgd + apgd", {}, ConfigError, "separate attacks by commas"),
        ("pgdd", {}, UnknownNameError, "'pgd'"),
        ("pgd(stepz=3)", {}, UnknownNameError, "'steps'"),
        ("pgd(gradient=eott(3))", {}, UnknownNameError, "'eot'"),
        ("pgd(gradient=eot(drawz=3))", {}, ConfigError, "drawz"),
        ("pgd(steps=eot(3))", {}, ConfigError, "expected a number or text"),
        ("pgd(eps=16/255)", {}, RangeError, "more than worst_of's"),
        ("pgd(norm='l2')", {}, ConfigError, "fixes norm='l2'"),
        ("pgd(targeted=True)", {}, ConfigError, "fixes targeted=True"),
        ("pgd(seed=3)", {}, ConfigError, "give it to worst_of"),
        ("square", {"norm": "l1"}, ConfigError, "no norm 'l1'"),
        ("pgd", {"held_out": 0}, RangeError, "held_out is 0"),
    ],
    ids=str,
)
def test_bad_settings_name_the_fix(
    attacks: Any, kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        worst_of(LinearModel(), images(2), torch.tensor([0, 1]), attacks=attacks, **kwargs)
