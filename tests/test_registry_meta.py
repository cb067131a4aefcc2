"""Registered names keep their promises: a contract class each, and one vocabulary.

Oracle: the registries themselves against the tests and the vocabulary of DESIGN §3.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections import Counter
from collections.abc import Iterator

import pytest

import feint.attacks
import tests.attacks
from feint.core.registry import ATTACKS
from tests.contracts.attack import AttackContract

COMMON = {
    "eps", "norm", "steps", "step_size", "restarts", "targeted", "loss", "gradient", "mask", "seed",
    "stop", "trace",
}  # fmt: skip
"""Keywords that mean the same in every attack that has them."""

EVERY = {"targeted", "mask", "seed", "stop", "trace"}
"""Keywords of every attack."""

FOREIGN = {
    "epsilon", "eps_iter", "eps_step", "alpha", "lr", "stepsize", "iterations", "n_iter", "nb_iter",
    "iters", "max_iter", "max_iterations", "num_steps", "n_steps", "random_init", "rand_init",
    "n_restarts", "num_restarts", "nb_restarts", "target", "criterion", "loss_fn", "norm_type", "p",
    "ord", "generator", "random_state", "rng", "callback", "log_interval", "clip_min", "clip_max",
    "eot_iter", "eot_samples", "early_stop", "verbose", "device", "batch_size",
}  # fmt: skip
"""Other libraries' names for the common keywords, and things that no attack decides."""


def subclasses(cls: type) -> Iterator[type]:
    for child in cls.__subclasses__():
        yield child
        yield from subclasses(child)


def contracts(package: object, base: type, attribute: str) -> Counter[str]:
    """How many contract classes the test modules of a package have for each component."""
    prefix = package.__name__
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith("test_"):
            importlib.import_module(f"{prefix}.{module.name}")
    found = [c for c in subclasses(base) if c.__module__.startswith(f"{prefix}.test_")]
    return Counter(getattr(c, attribute).__name__ for c in found if c.__name__.startswith("Test"))


def test_every_attack_has_exactly_one_contract_class() -> None:
    assert contracts(tests.attacks, AttackContract, "attack") == dict.fromkeys(ATTACKS, 1)


def test_every_attack_is_exported() -> None:
    assert set(feint.attacks.__all__) == set(ATTACKS)
    for name in ATTACKS:
        assert getattr(feint.attacks, name) is ATTACKS[name].component


@pytest.mark.parametrize("name", list(ATTACKS))
def test_attack_signatures_use_one_vocabulary(name: str) -> None:
    info = ATTACKS[name]
    parameters = inspect.signature(info.component).parameters
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["model", "x", "y"]
    assert set(info.parameters) == set(parameters) - {"model", "x", "y"}  # the rest: keyword-only
    assert not set(info.parameters) & FOREIGN
    wanted = set(EVERY)
    if info.goal == "budget":
        wanted |= {"eps"}
    if info.knowledge == "gradient":
        wanted |= {"gradient"}
    if info.knowledge == "gradient" and info.goal == "budget":
        wanted |= {"loss"}
    if len(info.norms) > 1:
        wanted |= {"norm"}
    assert wanted <= set(info.parameters)
    defaults = {k: p.default for k, p in info.parameters.items()}
    assert inspect.Parameter.empty not in defaults.values()  # callable with data alone
    for key, value in {"targeted": False, "seed": 0, "mask": None, "stop": None}.items():
        assert defaults[key] == value
    if "norm" in defaults:
        assert defaults["norm"] == info.norms[0]


@pytest.mark.parametrize("name", list(ATTACKS))
def test_attack_docstrings_say_everything(name: str) -> None:
    info = ATTACKS[name]
    text = inspect.getdoc(info.component) or ""
    for section in ("Convention:", "Args:", "Returns:", "Raises:", "Cost:", "Example:"):
        assert section in text
    assert "References:" in text
    assert "Deviations:" in text
    for key in ("model", "x", "y", *info.parameters):
        assert f"    {key}: " in text, f"{name} does not document {key}"
    assert info.paper
    for preset in info.presets:
        assert f'"{preset}"' in text


def test_the_vocabularies_do_not_overlap() -> None:
    assert not COMMON & FOREIGN
    assert EVERY <= COMMON
