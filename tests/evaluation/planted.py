"""Classifiers with a known accuracy or a planted defect, and attacks that break the rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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


# --- the zoo of masked gradients -----------------------------------------------------------------
# Each one keeps (almost) all predictions of the classifier behind it and misleads gradients. None
# protects: whatever fools the bare classifier fools it, too.


class Mask(Defense):
    """A front that claims to be differentiable; the identity is the rule that sees through it."""

    @backward_rule("identity")
    def identity(self, x: Tensor, params: Params) -> Tensor:
        return x


class ZeroMask(Mask):
    """Rounding to a thousand levels: the derivative is zero."""

    def transform(self, x: Tensor, params: Params) -> Tensor:
        return torch.round(x * 1000) / 1000


class DetachedMask(Mask):
    """Cuts the graph."""

    def transform(self, x: Tensor, params: Params) -> Tensor:
        return x.detach().clone()


class ShatteredMask(Mask):
    """A ripple too small to matter, whose slope drowns that of the image."""

    def transform(self, x: Tensor, params: Params) -> Tensor:
        return x + 1e-3 * torch.sin(5e4 * x)


class StochasticMask(Mask):
    """Noise too small to matter in the image, and large in the gradient."""

    stochastic = True

    def draw(self, keys: Tensor, shape: torch.Size) -> Params:
        return {"noise": random.normal(keys, shape[1:])}

    def transform(self, x: Tensor, params: Params) -> Tensor:
        noise = params["noise"].to(x.dtype)
        return x + 1e-4 * noise + 200 * noise * (x - x.detach())


class VanishingMask(Mask):
    """A staircase of 64 sigmoid steps, flat in float32 but for the edges."""

    def transform(self, x: Tensor, params: Params) -> Tensor:
        level = (x * 64).detach().floor()
        return (level + torch.sigmoid(800 * (x * 64 - level - 0.5))) / 64


class ExplodingMask(Mask):
    """The identity with a derivative beyond the range of float32."""

    def transform(self, x: Tensor, params: Params) -> Tensor:
        return x + 1e30 * (1e30 * (x - x.detach()))


class HiddenQuantisation(Mask):
    """Rounds to 40 levels, and leaks a gradient that has nothing to do with it."""

    def transform(self, x: Tensor, params: Params) -> Tensor:
        pattern = random.normal(random.keys(9, 1).to(x.device), x.shape[1:], x.dtype)
        return torch.round(x * 40) / 40 + 1e-5 * pattern * x.flip(-1)


class FlippedMask(Mask):
    """The identity, with the gradient's sign turned."""

    def transform(self, x: Tensor, params: Params) -> Tensor:
        return _Flip.apply(x)


class Saturated(nn.Module):
    """Logits that are 0 for the first class and −20 for all others, wherever one is ahead."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return (1e4 * self.model(x)).log_softmax(1).clamp(min=-20)


class Hot(nn.Module):
    """A temperature of a thousandth: cross-entropy has no slope left in float32."""

    def __init__(self, model: nn.Module, factor: float = 2000.0) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.model(x)


class Coupled(nn.Module):
    """Batch normalisation that was left in training mode in front of a classifier."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.norm, self.model = nn.BatchNorm2d(3, affine=False), model
        self.eval()
        self.norm.train()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(0.5 + 0.2887 * self.norm(x))


class Cheating(nn.Module):
    """Answers with another classifier whenever it is asked for gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.other = model, LinearModel(seed=77)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return 0.1 * self.other(x) + (self.model(x) - 0.1 * self.other(x)).detach() * 1.001
        return self.model(x)


class Planted(NamedTuple):
    """A broken defense, what flags it, and what breaks it."""

    build: Callable[[nn.Module], tuple[nn.Module, Defense | None]]
    """From the classifier to a model and a defense."""
    flags: tuple[str, ...]
    """Checks that must not pass."""
    breaks: tuple[tuple[str, str, str], ...]
    """Rungs that must leave next to nothing: scenario, attack, backward rule."""


_GRAY = ("gray-box", "pgd(steps=20)", "default")
_RULE = ("white-box", "pgd(steps=20)", "identity")
_SQUARE = ("white-box", "square(queries=300)", "default")
_SPSA = ("white-box", "pgd(steps=20, gradient=spsa(64))", "default")
_STILL = ("white-box", "pgd(steps=40, gradient=spsa(64), stop='never')", "default")
"""Nobody leaves the batch on which the classifier hangs."""
_TRANSFER = ("transfer", "pgd(steps=20)", "default")
_MARGIN = ("white-box", "pgd(steps=20, loss='margin')", "default")
_DECISION = ("white-box", "hopskipjump(steps=8)", "default")


def _front(mask: type[Mask]) -> Callable[[nn.Module], tuple[nn.Module, Defense | None]]:
    return lambda model: (model, mask())


ZOO = {
    "zero gradient": Planted(
        _front(ZeroMask), ("zero-gradient", "differentiable-parts"), (_RULE, _GRAY, _SQUARE)
    ),
    "detached": Planted(
        _front(DetachedMask), ("zero-gradient", "differentiable-parts"), (_RULE, _GRAY, _SQUARE)
    ),
    "shattered": Planted(_front(ShatteredMask), ("gradient-foretells",), (_RULE, _GRAY, _SPSA)),
    "stochastic": Planted(
        _front(StochasticMask), ("eot-signal", "gradient-foretells"), (_RULE, _GRAY, _SPSA)
    ),
    "vanishing": Planted(_front(VanishingMask), ("gradient-foretells",), (_RULE, _GRAY, _SQUARE)),
    "exploding": Planted(_front(ExplodingMask), ("zero-gradient",), (_RULE, _GRAY, _SPSA)),
    "hidden quantisation": Planted(
        _front(HiddenQuantisation), ("gradient-foretells",), (_RULE, _GRAY, _SQUARE)
    ),
    "flipped": Planted(
        _front(FlippedMask), ("gradient-foretells", "gradient-is-useful"), (_RULE, _GRAY, _SPSA)
    ),
    "misleading rule": Planted(
        lambda model: (model, Steps(levels=64)),
        ("gradient-is-useful", "stand-in-fidelity"),
        (_RULE, _GRAY, _SQUARE),
    ),
    "saturating logits": Planted(
        lambda model: (Saturated(model), None), ("zero-gradient",), (_TRANSFER, _DECISION)
    ),
    "temperature": Planted(
        lambda model: (Hot(model), None),
        ("loss-is-alive", "logit-scale"),
        (_TRANSFER, _MARGIN, _SQUARE),
    ),
    "train and eval coupled": Planted(
        lambda model: (Coupled(model), None),
        ("input-and-mode", "batch-independence", "static-state"),
        (_TRANSFER, _STILL),
    ),
    "another model for gradients": Planted(
        lambda model: (Cheating(model), None), ("view-is-exact",), (_TRANSFER, _SQUARE)
    ),
    "probabilities": Planted(
        lambda model: (Softmaxed(model), None), ("outputs-are-logits",), (_TRANSFER, _SQUARE)
    ),
    "secret randomness": Planted(
        lambda model: (Noisy(model, 1e-3), None), ("unkeyed-randomness",), (_TRANSFER, _SPSA)
    ),
}
"""Broken defenses by what is wrong with them."""
