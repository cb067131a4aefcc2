"""The frame of the attack contract: how a test finds out what applies, and runs the attack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from feint.core.registry import ATTACKS, AttackInfo

EPS = {"linf": 0.1, "l2": 0.4, "l1": 1.0, "l0": 4.0, "spatial": 0.0}
"""Budgets that fit the images of 3×4×4 used here; a spatial attack has keywords of its own."""


def needs(*keywords: str, goal: str | None = None, knowledge: str | None = None) -> Any:
    """Mark a test as part of the contract of attacks that have these properties only."""

    def mark(test: Callable[..., None]) -> Callable[..., None]:
        test._needs = lambda info: (  # type: ignore[attr-defined]
            all(k in info.parameters for k in keywords)
            and goal in (None, info.goal)
            and knowledge in (None, info.knowledge)
        )
        return test

    return mark


WAITING = {
    "_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "masked_scatter", "equal",
    "allclose", "bincount", "_unique", "_unique2", "unique_dim", "unique_consecutive",
}  # fmt: skip
"""Operations whose result's shape or value the host must know."""


class HostSyncs(TorchDispatchMode):
    """Counts the operations that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        waits = name in WAITING
        if name == "repeat_interleave":  # with a tensor of counts it must know their sum
            waits = func._overloadname in ("Tensor", "self_Tensor")
        if name in ("index", "index_put", "index_put_"):  # boolean indices hide a nonzero
            waits = any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += waits
        return func(*args, **(kwargs or {}))


class AttackHarness:
    """Base of the parts of `AttackContract`."""

    attack: ClassVar[Callable[..., Tensor]]
    kwargs: ClassVar[dict[str, Any]] = {}
    """Given on every call, unless the test sets the keyword itself."""
    random: ClassVar[bool] = False
    """Whether another seed gives another result."""
    tolerance: ClassVar[float] = 1.25
    """Minimal-norm attacks: how many times the least distance they may need on a linear model."""
    info: ClassVar[AttackInfo]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "attack"):  # a part of the contract, not yet somebody's
            return
        if "info" not in vars(cls):
            cls.info = ATTACKS[cls.attack.__name__]
        for name in dir(cls):
            applies = getattr(getattr(cls, name), "_needs", None)
            if applies is not None and not applies(cls.info):
                setattr(cls, name, None)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "norm" in metafunc.fixturenames:
            metafunc.parametrize("norm", self.info.norms)

    def run(self, model: Any, x: Tensor, y: Tensor, norm: str | None = None, **over: Any) -> Tensor:
        """The attack with this class's keywords, a budget for the norm, and the test's own."""
        chosen = {**self.kwargs, **over}
        if norm is not None and "norm" in self.info.parameters:
            chosen["norm"] = norm
        if norm is not None and "eps" in self.info.parameters:
            chosen.setdefault("eps", EPS[norm])
        return type(self).attack(model, x, y, **chosen)

    def knobs(self, **wanted: Any) -> dict[str, Any]:
        """Those of the keywords that the attack has."""
        return {k: v for k, v in wanted.items() if k in self.info.parameters}
