"""The attacker's view with something changed that must not, or must, make a difference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from feint.core.gradients import Estimate, GradientEstimator, Model, call, is_stochastic
from feint.core.losses import Loss

__all__ = ["Frozen", "Rescaled", "Watched"]


class Rescaled(nn.Module):
    """A view whose logits are multiplied and shifted: the same classifier.

    Args:
        view: What is attacked.
        factor: Positive.
        shift: The same for all logits.
    """

    def __init__(self, view: nn.Module, factor: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.view, self.factor, self.shift = view, factor, shift
        self.training = view.training

    @property
    def stochastic(self) -> bool:
        """As the view declares."""
        return is_stochastic(self.view)

    @property
    def draws(self) -> Callable[[torch.Size], int | None] | None:
        """How many draws the view knows itself to have, as it says."""
        return getattr(self.view, "draws", None)

    def forward(
        self, x: Tensor, keys: Tensor | None = None, *, draw: Tensor | None = None
    ) -> Tensor:
        """Logits, (B, K)."""
        logits = call(self.view, x, keys) if draw is None else self.view(x, draw=draw)
        return self.factor * logits + self.shift


class Frozen(nn.Module):
    """A random pipeline with one draw for all samples, known to the attacker: deterministic.

    Args:
        view: What is attacked, or judged.
        key: (1,) int64, which decides the draw.
    """

    stochastic = False

    def __init__(self, view: nn.Module, key: Tensor) -> None:
        super().__init__()
        self.view, self.key = view, key
        self.training = view.training

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (B, K)."""
        return call(self.view, x, self.key.to(x.device).expand(len(x)))


class Watched:
    """An estimator that counts the gradients that are zero, and those that are not finite.

    Args:
        base: The estimator in use.
    """

    def __init__(self, base: GradientEstimator) -> None:
        self.base = base
        self.scores_only = getattr(base, "scores_only", False)
        self.one_pass = getattr(base, "one_pass", False)
        self.asked = 0
        self._bad: list[Tensor] = []

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        loss: Loss,
        keys: Tensor,
        *,
        forward_only: bool = False,
    ) -> Estimate:
        """The base's estimate."""
        found = self.base(model, x, y, loss, keys, forward_only=forward_only)
        if not forward_only:
            flat = found.gradient.flatten(1)
            self.asked += len(flat)
            zero, lost = (flat == 0).all(1), (~flat.isfinite()).any(1)
            self._bad.append(torch.stack([zero.sum(), lost.sum()]))
        return found

    def shares(self) -> tuple[float, float]:
        """Shares of zero and of not finite gradients; reads from the device."""
        if not self.asked:
            return 0.0, 0.0
        zero, lost = torch.stack(self._bad).sum(0).tolist()
        return zero / self.asked, lost / self.asked
