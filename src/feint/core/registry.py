"""Registries of attacks and defenses: a decorator, a list, a lookup, and the schema of each name.

A component's keyword-only signature *is* its schema for Python, YAML and the command line.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from feint.core.errors import ConfigError, UnknownNameError

__all__ = ["ATTACKS", "DEFENSES", "AttackInfo", "DefenseInfo", "Registry", "attack", "defense"]

Goal = Literal["budget", "minimal", "transform"]
Knowledge = Literal["gradient", "score", "decision"]
F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T", bound=type)


@dataclass(frozen=True)
class Info:
    """What is known of a registered component."""

    name: str
    component: Callable[..., Any]
    paper: str
    version: int
    presets: Mapping[str, Mapping[str, object]]

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.component) or "").partition("\n")[0]

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The configuration: every keyword-only parameter with its default."""
        found = inspect.signature(self.component).parameters.values()
        return {p.name: p for p in found if p.kind is inspect.Parameter.KEYWORD_ONLY}

    def check(self, kwargs: Mapping[str, object]) -> None:
        """Refuse a keyword that the component does not take, and name the nearest one."""
        for key in kwargs:
            if key not in self.parameters:
                raise UnknownNameError(f"keyword of {self.name}", key, self.parameters)


@dataclass(frozen=True)
class AttackInfo(Info):
    """A registered attack."""

    goal: Goal
    knowledge: Knowledge
    norms: tuple[str, ...]


@dataclass(frozen=True)
class DefenseInfo(Info):
    """A registered defense."""

    @property
    def differentiable(self) -> bool:
        """Whether autograd through `transform` is the true gradient."""
        return bool(self.component.differentiable)  # type: ignore[attr-defined]

    @property
    def stochastic(self) -> bool:
        """Whether the output depends on a draw."""
        return bool(self.component.stochastic)  # type: ignore[attr-defined]


I = TypeVar("I", bound=Info)  # noqa: E741


class Registry(Generic[I]):
    """Names to components; refuses duplicates, suggests the nearest name for an unknown one."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, I] = {}

    def add(self, info: I) -> None:
        """Register `info`; a second one of the same name is a programming error."""
        if info.name in self._entries:
            raise ConfigError(f"{self.kind} {info.name!r} is registered twice; choose another name")
        self._entries[info.name] = info

    def __getitem__(self, name: str) -> I:
        if name not in self._entries:
            raise UnknownNameError(self.kind, name, self._entries)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)


ATTACKS: Registry[AttackInfo] = Registry("attack")
DEFENSES: Registry[DefenseInfo] = Registry("defense")


def attack(
    *,
    goal: Goal,
    knowledge: Knowledge,
    norms: tuple[str, ...],
    paper: str,
    version: int = 1,
    presets: Mapping[str, Mapping[str, object]] | None = None,
) -> Callable[[F], F]:
    """Register a function `attack(model, x, y, *, …) -> x_adv` under its own name.

    Args:
        goal: `"budget"` maximises the loss within eps; `"minimal"` seeks the nearest adversarial;
            `"transform"` searches a set of transformations that no norm measures (no eps).
        knowledge: What the attack asks of the model: gradients, scores, or decisions only.
        norms: Norms that its `norm` keyword accepts, the default one first.
        paper: Source, as "Authors, year, arXiv id".
        version: Raise it with every change that moves numbers.
        presets: Named settings (`preset="ace"`): values for keywords that the caller leaves out.
            The function then declares a keyword `preset`, which its body need not read.
    """

    def register(function: F) -> F:
        name = function.__name__
        wrapped = _with_presets(name, function, presets or {})
        ATTACKS.add(
            AttackInfo(name, wrapped, paper, version, presets or {}, goal, knowledge, norms)
        )
        return wrapped

    return register


def defense(
    name: str,
    *,
    paper: str,
    version: int = 1,
    presets: Mapping[str, Mapping[str, object]] | None = None,
) -> Callable[[T], T]:
    """Register a `Defense` class under the name that people type.

    Args:
        name: Registered name.
        paper: Source, as "Authors, year, arXiv id".
        version: Raise it with every change that moves numbers.
        presets: As for `attack`; `__init__` declares `preset` with the default preset's name.
    """

    def register(cls: T) -> T:
        if presets:
            cls.__init__ = _with_presets(name, cls.__init__, presets)  # type: ignore[misc]
        DEFENSES.add(DefenseInfo(name, cls, paper, version, presets or {}))
        return cls

    return register


def _with_presets(name: str, function: F, presets: Mapping[str, Mapping[str, object]]) -> F:
    """`function`, with the values of the chosen preset for keywords that the caller leaves out."""
    if not presets:
        return function
    parameters = inspect.signature(function).parameters
    default = parameters["preset"].default
    for values in presets.values():
        for key in values:
            if key not in parameters:
                raise UnknownNameError(f"keyword of {name}", key, parameters)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        preset = kwargs.get("preset", default)
        if preset is not None:
            if preset not in presets:
                raise UnknownNameError(f"preset of {name}", preset, presets)
            kwargs = {**presets[preset], **kwargs}
        return function(*args, **kwargs)

    return wrapper  # type: ignore[return-value]
