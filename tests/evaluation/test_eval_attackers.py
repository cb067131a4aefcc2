"""From words to attacks: what is read, what is filled in, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from feint.core import random
from feint.core.errors import ConfigError, ModelError, RangeError, UnknownNameError
from feint.core.gradients import backprop
from feint.evaluation.attackers import Attacker, parse_attack
from feint.evaluation.pipeline import Pipeline
from tests.evaluation.planted import Jitter, Opaque, Steps, plant, stuck
from tests.tiny import LinearModel, StochasticLinear, behind, images

EPS = 8 / 255


def attacker(text: str, view: Any = None, **more: Any) -> Attacker:
    settings = {"norm": "linf", "eps": EPS, **more}
    return Attacker(parse_attack(text), LinearModel() if view is None else view, **settings)


def test_estimators_are_read() -> None:
    """Oracle: the estimator's own name and flag; nested ones keep their base's."""
    assert parse_attack("pgd(gradient=eot(4))").kwargs["gradient"].__qualname__ == "eot(4)"
    assert parse_attack("pgd(gradient=backprop)").kwargs["gradient"] is backprop
    assert parse_attack("pgd(gradient=None)").kwargs["gradient"] is None
    for text in ("pgd(gradient=spsa(4))", "pgd(gradient=nes)", "pgd(gradient=eot(2, base=spsa))"):
        assert not parse_attack(text).needs_gradient
    for text in ("pgd", "pgd(gradient=eot)", "pgd(gradient=eot(2, base=backprop))"):
        assert parse_attack(text).needs_gradient
    for text in ("pgd(gradient=mixed)", "pgd(gradient=eot(2, base=mixed('bf16')))"):
        assert parse_attack(text).needs_gradient


@pytest.mark.parametrize("estimator", ["backprop", "mixed", "mixed('bf16', base=backprop)"])
def test_single_draws_of_a_random_view_are_refused(estimator: str) -> None:
    """Oracle: these estimators ask about each image once; averaged ones do not."""
    with pytest.raises(ConfigError, match="follows one draw"):
        attacker(f"pgd(gradient={estimator})", StochasticLinear())
    for averaged in (f"eot(2, base={estimator})", "mixed('bf16', base=eot(2))"):
        attacker(f"pgd(gradient={averaged})", StochasticLinear())


def test_the_canonical_text() -> None:
    assert (
        parse_attack("pgd(steps = 40,eps=.5)").text == parse_attack("pgd(eps=0.5, steps=40)").text
    )


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("pdg", UnknownNameError, "did you mean 'pgd'"),
        ("pgd(step=3)", UnknownNameError, "did you mean 'steps'"),
        ("pgd(preset='acé')", UnknownNameError, "did you mean 'ace'"),
        ("pgd(gradient=eott)", UnknownNameError, "did you mean 'eot'"),
        ("pgd(gradient=3)", UnknownNameError, "gradient estimator '3'"),
        ("pgd(gradient=eot(drawz=3))", ConfigError, "drawz"),
        ("pgd(gradient=eot(0))", RangeError, "at least 1"),
        ("pgd(loss=margin)", ConfigError, "quote text"),
        ("pgd + fgsm", ConfigError, "no single call"),
        ("pgd*2", ConfigError, "no single call"),
        ("pgd(40)", ConfigError, "expected pgd"),
    ],
)
def test_words_that_mean_nothing(text: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        parse_attack(text)


def test_the_threat_model_is_filled_in() -> None:
    """The attack gets the threat's norm, eps and goal; what its text fixes stays."""
    found = attacker("pgd(steps=3)", norm="l2", eps=0.7, targeted=True).settings()
    assert found == {"steps": 3, "norm": "l2", "eps": 0.7, "targeted": True}
    own = attacker("pgd(eps=1/255, steps=3)").settings()
    assert own["eps"] == 1 / 255
    preset = attacker("pgd(preset='ace')").settings()
    assert "eps" not in preset  # the preset's 0.031 stays
    assert "stop" not in preset


def test_transferred_examples_do_not_stop_at_the_first_success() -> None:
    assert attacker("pgd", transferred=True).settings()["stop"] == "never"
    assert "stop" not in attacker("pgd").settings()
    assert attacker("pgd(stop='success')", transferred=True).settings()["stop"] == "success"


def test_random_views_are_averaged() -> None:
    """Oracle: the estimator's name."""
    view = StochasticLinear()
    assert attacker("pgd", view).settings()["gradient"].__qualname__ == "eot(8)"
    assert attacker("pgd(gradient=None)", view).settings()["gradient"].__qualname__ == "eot(8)"
    assert attacker("pgd(gradient=eot(3))", view).settings()["gradient"].__qualname__ == "eot(3)"
    assert "gradient" not in attacker("pgd").settings()


@pytest.mark.parametrize(
    ("text", "more", "error", "match"),
    [
        ("pgd", {"norm": "l0"}, ConfigError, "no norm 'l0'; it has linf, l2, l1"),
        ("pgd(norm='l2')", {}, ConfigError, "--norm l2"),
        ("pgd(preset='ace')", {"norm": "l2"}, ConfigError, "--norm linf"),
        ("pgd(eps=9/255)", {}, RangeError, "more than the threat model's"),
        ("pgd(preset='ace')", {"eps": 0.03}, RangeError, "eps 0.031, more than"),
        ("pgd(eps='8')", {}, ConfigError, "expected a number"),
        (
            "pgd(preset='qiu')",
            {"norm": "l2", "eps": 26.0},
            ConfigError,
            "is targeted, the threat model untargeted",
        ),
        ("pgd(targeted=False)", {"targeted": True}, ConfigError, "leave its keyword out"),
    ],
)
def test_what_does_not_fit_is_refused(
    text: str, more: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        attacker(text, **more)


def test_a_preset_may_be_made_untargeted() -> None:
    found = attacker("pgd(preset='qiu', targeted=False)", norm="l2", eps=26.0)
    assert found.settings()["targeted"] is False
    assert attacker("pgd(preset='qiu')", norm="l2", eps=26.0, targeted=True).settings()["targeted"]


def test_ignored_randomness_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    view = Pipeline(LinearModel(), Jitter()).view()
    with pytest.raises(ConfigError, match=r"one draw of a random pipeline; use gradient=eot\(8\)"):
        attacker("pgd(gradient=backprop)", view)
    with pytest.raises(ConfigError, match="no keyword 'gradient' to average"):
        attacker(plant(monkeypatch, "plain", stuck), view)
    attacker(plant(monkeypatch, "blind", stuck, knowledge="score"), view)


def test_ignored_non_differentiable_parts_are_refused() -> None:
    """Behind a view they may be differentiated; by scores they need not be."""
    bare = Pipeline(LinearModel(), Steps())
    with pytest.raises(ConfigError, match=r"'defense' \(Steps\).*spsa"):
        attacker("pgd", bare)
    with pytest.raises(ConfigError, match=r"'front' \(Opaque\)"):
        attacker("pgd", behind(Opaque(), LinearModel()))
    attacker("pgd", bare.view())
    attacker("pgd(gradient=spsa(4))", bare)


def test_an_attack_without_a_goal_is_not_targeted(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no targeted form"):
        attacker(plant(monkeypatch, "plain", stuck), targeted=True)


@pytest.mark.parametrize("size", [1, 5, 64])
def test_batches_do_not_matter(size: int) -> None:
    """Oracle: bit equality on a linear model whose products are summed sample by sample."""
    x, y = images(11), torch.arange(11) % 5
    keys = random.keys(0, 11)
    found = attacker("pgd(steps=4, restarts=2)").run(x, y, keys, size)
    whole = attacker("pgd(steps=4, restarts=2)").run(x, y, keys, 11)
    assert torch.equal(found.x_adv, whole.x_adv)
    assert torch.equal(found.first_hit, whole.first_hit)
    assert torch.allclose(found.late_gain, whole.late_gain)
    assert found.forwards == whole.forwards


def test_an_empty_shard() -> None:
    found = attacker("pgd").run(images(0), torch.empty(0).long(), random.keys(0, 0), 8)
    assert found.x_adv.shape == (0, 3, 4, 4)
    assert (found.first_hit.shape, found.late_gain.shape) == ((0,), (0,))


def test_attacks_that_break_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    def returns(change: Any) -> Any:
        def attack(model: Any, x: Tensor, y: Tensor, *, eps: float = 0, seed: Any = 0) -> Tensor:
            return change(x)

        return attack

    x, y, keys = images(2), torch.zeros(2).long(), random.keys(0, 2)
    for name, change, match in (
        ("double", Tensor.double, "torch.float64"),
        ("fewer", lambda x: x[:1], r"\(1, 3, 4, 4\)"),
        ("nan", lambda x: x * torch.nan, "NaN"),
    ):
        with pytest.raises(ModelError, match=match):
            attacker(plant(monkeypatch, name, returns(change))).run(x, y, keys, 2)


def test_an_attack_without_a_trace_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first hits are none, and its late gain is not a number rather than a comforting zero."""
    found = attacker(plant(monkeypatch, "plain", stuck)).run(
        images(3), torch.zeros(3).long(), random.keys(0, 3), 2
    )
    assert found.first_hit.tolist() == [-1, -1, -1]
    assert found.late_gain.isnan().all()
