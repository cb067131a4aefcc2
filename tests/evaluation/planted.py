"""Classifiers with a known accuracy or a planted defect, and attacks that break the rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.registry import ATTACKS, AttackInfo
from feint.defenses.base import Defense, Params, backward_rule
from tests.tiny import LinearModel


class Coin(nn.Module):
    """Right about class 0 with probability p, whatever its input; keyed.

    Args:
        p: Probability of class 0.
        tiny: Weight of a linear model added to the logits: too small to change a prediction, and
            enough for a gradient.
        shape: Shape of an image.
    """

    stochastic = True

    def __init__(self, p: float, tiny: float = 1e-3, shape: tuple[int, ...] = (3, 2, 2)) -> None:
        super().__init__()
        self.p, self.tiny = p, tiny
        self.linear = LinearModel(shape=shape)
        self.eval()

    def uniform(self, x: Tensor, keys: Tensor | None) -> Tensor:
        keys = random.entropy_keys(len(x), x.device) if keys is None else keys
        return random.uniform(keys)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        return self.toss(x, self.uniform(x, keys))

    def toss(self, x: Tensor, u: Tensor) -> Tensor:
        wrong = (u >= self.p).to(x.dtype)
        zero = torch.zeros_like(wrong)
        logits = torch.stack([zero + 1, 2 * wrong, zero, zero, zero], 1)
        return logits + self.tiny * self.linear(x) if self.tiny else logits


class UnkeyedCoin(Coin):
    """The same from torch's global generator, declared random."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.toss(x, torch.rand(len(x)))


class SecretCoin(UnkeyedCoin):
    """The same, not declared."""

    stochastic = False


class SharedCoin(UnkeyedCoin):
    """One toss for a whole batch."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.toss(x, torch.rand(1).expand(len(x)))


class CoinTimesLinear(nn.Module):
    """A linear classifier whose answer moves to the next class with probability 1 − p; keyed."""

    stochastic = True

    def __init__(self, p: float, shape: tuple[int, ...] = (3, 2, 2)) -> None:
        super().__init__()
        self.p, self.linear = p, LinearModel(shape=shape)
        self.eval()

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        keys = random.entropy_keys(len(x), x.device) if keys is None else keys
        logits = self.linear(x)
        wrong = (random.uniform(keys) >= self.p)[:, None]
        return torch.where(wrong, logits.roll(1, 1), logits)


class Through(Defense):
    """The identity; deterministic, differentiable."""

    def transform(self, x: Tensor, params: Params) -> Tensor:
        return x


class Jitter(Defense):
    """Adds keyed Gaussian noise."""

    stochastic = True
    bounded = False

    def __init__(self, *, sigma: float = 0.02) -> None:
        super().__init__()
        self.sigma = sigma

    def draw(self, keys: Tensor, shape: torch.Size) -> Params:
        return {"noise": random.normal(keys, shape[1:])}

    def transform(self, x: Tensor, params: Params) -> Tensor:
        return x + self.sigma * params["noise"].to(x.dtype)


class Steps(Defense):
    """Rounds to few levels; its identity rule is the usual stand-in."""

    differentiable = False

    def __init__(self, *, levels: int = 16) -> None:
        super().__init__()
        self.levels = levels

    def transform(self, x: Tensor, params: Params) -> Tensor:
        return (x * self.levels).round() / self.levels

    @backward_rule("identity")
    def identity(self, x: Tensor, params: Params) -> Tensor:
        return x

    @backward_rule("backwards")
    def backwards(self, x: Tensor, params: Params) -> Tensor:
        """A rule that misleads."""
        return -x

    best_rule = "identity"


class Opaque(Defense):
    """Rounds, and has no rule at all."""

    differentiable = False

    def transform(self, x: Tensor, params: Params) -> Tensor:
        return (x * 16).round() / 16


class Softmaxed(nn.Module):
    """Probabilities instead of logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).softmax(1)


class Noisy(nn.Module):
    """Noise from torch's global generator on the input; not declared."""

    def __init__(self, model: nn.Module, sigma: float = 0.05) -> None:
        super().__init__()
        self.model, self.sigma = model, sigma

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x + self.sigma * torch.randn_like(x))


class Calm(LinearModel):
    """Declares itself random and is not."""

    stochastic = True

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        return super().forward(x)


class Adapting(nn.Module):
    """Counts what it sees in a buffer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.model(x)


class NanGradient(nn.Module):
    """The identity, with the gradient 0·∞ of a square root at zero."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * (x - x.detach()).abs().sqrt()


class _Flip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Flipped(nn.Module):
    """The identity, with the gradient's sign turned: a masked gradient at its worst."""

    def forward(self, x: Tensor) -> Tensor:
        return _Flip.apply(x)


class Spy(nn.Module):
    """Notes how many images its model was asked, and by whom gradients were wanted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()
        self._calls: list[tuple[Tensor, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self._calls.append((x.detach().clone(), x.requires_grad))
        return self.model(x)

    @property
    def asked(self) -> int:
        return sum(len(x) for x, _ in self._calls)

    @property
    def differentiated(self) -> int:
        return sum(len(x) for x, wanted in self._calls if wanted)

    def forget(self) -> None:
        self._calls.clear()


def plant(
    monkeypatch: Any,
    name: str,
    function: Callable[..., Tensor],
    *,
    goal: str = "budget",
    knowledge: str = "gradient",
) -> str:
    """Register an attack for the length of a test; its name."""
    info = AttackInfo(name, function, "none", 1, {}, goal, knowledge, ("linf", "l2"))  # type: ignore[arg-type]
    monkeypatch.setitem(ATTACKS._entries, name, info)
    return name


def stuck(model: Any, x: Tensor, y: Tensor, *, eps: float = 0.1, seed: Any = 0) -> Tensor:
    """Returns the images."""
    return x.clone()


def greedy(model: Any, x: Tensor, y: Tensor, *, eps: float = 0.1, seed: Any = 0) -> Tensor:
    """Takes twice the budget."""
    return torch.where(x > 0.5, x - 2 * eps, x + 2 * eps)


def outside(model: Any, x: Tensor, y: Tensor, *, eps: float = 0.1, seed: Any = 0) -> Tensor:
    """Leaves the box."""
    return x + eps


def restless(model: Any, x: Tensor, y: Tensor, *, eps: float = 0.1, seed: Any = 0) -> Tensor:
    """Moves without a budget, too."""
    return torch.where(x > 0.5, x - max(eps, 1 / 255), x + max(eps, 1 / 255))
