"""Registries: duplicates, unknown names, presets, keywords."""

from __future__ import annotations

from typing import Any

import pytest

from feint.core import registry
from feint.core.errors import ConfigError, UnknownNameError
from feint.core.registry import AttackInfo, Registry


@pytest.fixture
def attacks(monkeypatch: pytest.MonkeyPatch) -> Registry[AttackInfo]:
    fresh: Registry[AttackInfo] = Registry("attack")
    monkeypatch.setattr(registry, "ATTACKS", fresh)
    return fresh


def register(**kwargs: Any) -> Any:
    given = {"goal": "budget", "knowledge": "gradient", "norms": ("linf",), "paper": "A, 2020"}
    return registry.attack(**{**given, **kwargs})


def test_an_attack_is_registered_under_its_own_name(attacks: Registry[AttackInfo]) -> None:
    @register(version=3)
    def nudge(model: Any, x: Any, y: Any, *, eps: float = 0.1, steps: int = 4) -> tuple:
        """Nudge the pixels.

        More words.
        """
        return eps, steps

    info = attacks["nudge"]
    assert info.component is nudge
    assert (info.name, info.version, info.goal, info.norms) == ("nudge", 3, "budget", ("linf",))
    assert info.summary == "Nudge the pixels."
    assert {k: p.default for k, p in info.parameters.items()} == {"eps": 0.1, "steps": 4}
    assert "nudge" in attacks
    assert list(attacks) == ["nudge"]
    assert len(attacks) == 1
    assert nudge(None, None, None, steps=5) == (0.1, 5)


def test_names_are_sorted_and_unique(attacks: Registry[AttackInfo]) -> None:
    def make(name: str) -> Any:
        def attack(model: Any, x: Any, y: Any) -> None:
            """Do nothing."""

        attack.__name__ = name
        return register()(attack)

    make("b"), make("a")
    assert list(attacks) == ["a", "b"]
    with pytest.raises(ConfigError, match="attack 'a' is registered twice; choose another name"):
        make("a")


def test_an_unknown_name_gets_the_nearest_one(attacks: Registry[AttackInfo]) -> None:
    @register()
    def mi_fgsm(model: Any, x: Any, y: Any) -> None:
        """Momentum."""

    with pytest.raises(UnknownNameError, match="unknown attack 'mifgsm'; did you mean 'mi_fgsm'"):
        attacks["mifgsm"]
    with pytest.raises(UnknownNameError, match="unknown attack 'zzz'; known: mi_fgsm") as error:
        attacks["zzz"]
    assert (error.value.kind, error.value.name, error.value.known) == ("attack", "zzz", ["mi_fgsm"])
    with pytest.raises(UnknownNameError, match="known: none"):
        Registry("attack")["pgd"]


def test_keywords_are_checked(attacks: Registry[AttackInfo]) -> None:
    @register()
    def walk(model: Any, x: Any, y: Any, *, eps: float = 0.1, step_size: float = 1) -> None:
        """Walk."""

    attacks["walk"].check({"eps": 1})
    with pytest.raises(
        UnknownNameError, match="keyword of walk 'stepsize'; did you mean 'step_size'"
    ):
        attacks["walk"].check({"stepsize": 1})
    with pytest.raises(UnknownNameError, match="keyword of walk 'model'"):
        attacks["walk"].check({"model": 1})  # data is no configuration


PRESETS = {"gentle": {"eps": 0.01, "steps": 2}, "rough": {"eps": 0.9}}


def preset_attack(default: str | None) -> Any:
    @register(presets=PRESETS)
    def push(
        model: Any,
        x: Any,
        y: Any,
        *,
        preset: str | None = default,
        eps: float = 0.1,
        steps: int = 7,
    ) -> tuple:
        """Push."""
        return preset, eps, steps

    return push


def test_presets_fill_what_the_caller_leaves_out(attacks: Registry[AttackInfo]) -> None:
    push = preset_attack(None)
    assert push(0, 0, 0) == (None, 0.1, 7)
    assert push(0, 0, 0, preset="gentle") == ("gentle", 0.01, 2)
    assert push(0, 0, 0, preset="gentle", eps=0.5) == ("gentle", 0.5, 2)
    assert push(0, 0, 0, preset="rough") == ("rough", 0.9, 7)
    assert attacks["push"].presets == PRESETS
    assert "preset" in attacks["push"].parameters
    with pytest.raises(UnknownNameError, match="preset of push 'gentel'; did you mean 'gentle'"):
        push(0, 0, 0, preset="gentel")


@pytest.mark.usefixtures("attacks")
def test_a_preset_can_be_the_default() -> None:
    push = preset_attack("rough")
    assert push(0, 0, 0)[1:] == (0.9, 7)
    assert push(0, 0, 0, preset=None)[1:] == (0.1, 7)


@pytest.mark.usefixtures("attacks")
def test_a_preset_with_an_unknown_keyword_is_refused_at_once() -> None:
    with pytest.raises(UnknownNameError, match="keyword of pull 'epz'; did you mean 'eps'"):

        @register(presets={"typo": {"epz": 1}})
        def pull(model: Any, x: Any, y: Any, *, preset: str | None = None, eps: float = 1) -> None:
            """Pull."""


def test_defenses_have_presets_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "DEFENSES", Registry("defense"))

    @registry.defense("blur", paper="B, 2021", presets={"paper": {"sigma": 3.0}})
    class Blur:
        """Blur."""

        differentiable = True
        stochastic = False

        def __init__(self, *, preset: str | None = "paper", sigma: float = 1.0) -> None:
            self.preset, self.sigma = preset, sigma

    info = registry.DEFENSES["blur"]
    assert (Blur().sigma, Blur(preset=None).sigma, Blur(sigma=2.0).sigma) == (3.0, 1.0, 2.0)
    assert (info.differentiable, info.stochastic) == (True, False)
    assert list(info.parameters) == ["preset", "sigma"]
