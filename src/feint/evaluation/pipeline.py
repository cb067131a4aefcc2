"""The deployed classifier, and the attacker's view of it."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.errors import ConfigError, RangeError
from feint.core.gradients import call, is_stochastic
from feint.defenses.base import Defense, Params, View

__all__ = ["Combine", "Pipeline"]

Combine = Literal["mean_probability", "mean_logits", "majority"]
_COMBINES = ("mean_probability", "mean_logits", "majority")


class Pipeline(nn.Module):
    """A classifier as it is deployed: a defense in front of a model, and a rule for votes.

    Args:
        model: Maps images in [0, 1] to logits; gets keys if its forward takes them.
        defense: A `Defense`, or none; one that looks at its classifier is bound to `model`.
        votes: Independent draws per prediction; more than one needs a stochastic pipeline.
        combine: How votes become logits: `"mean_probability"` (the log of the mean softmax),
            `"mean_logits"`, or `"majority"` (vote shares; ties go to the higher mean probability;
            its derivative is that of the mean probability's log).

    Convention:
        Given keys (B,) the result is a function of `(x, keys)`; without them a stochastic pipeline
        draws from the operating system's entropy. A pipeline takes over its model's mode and
        changes nobody's: what is in training mode stays there, for the checks to see.

    Raises:
        RangeError: If `votes` is below 1.
        ConfigError: If `combine` is unknown, or votes are wanted where nothing is random.

    Cost: `votes` forward passes of the model and the defense.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        >>> Pipeline(model)(torch.rand(2, 3, 2, 2)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        defense: nn.Module | None = None,
        *,
        votes: int = 1,
        combine: Combine = "mean_probability",
    ) -> None:
        super().__init__()
        if votes < 1:
            raise RangeError(f"votes is {votes}; expected at least 1")
        if combine not in _COMBINES:
            raise ConfigError(f"combine is {combine!r}; expected one of {', '.join(_COMBINES)}")
        if isinstance(defense, Defense):
            defense = defense.bind(model)
        self.model, self.defense, self.votes, self.combine = model, defense, votes, combine
        if votes > 1 and not self.stochastic:
            raise ConfigError(
                f"votes is {votes}, but nothing in this pipeline is random; leave votes out"
            )
        self.training = bool(getattr(model, "training", False))

    @property
    def stochastic(self) -> bool:
        """Whether the model or the defense declares itself random."""
        return is_stochastic(self.model) or is_stochastic(self.defense)

    def draws(self, shape: torch.Size) -> int | None:
        """How many equally likely draws a prediction can hang on; None if many or unknown.

        Args:
            shape: Shape of a batch, (B, C, H, W).
        """
        options = self._support(shape)
        return None if options is None else len(options)

    def _support(self, shape: torch.Size) -> tuple[Params, ...] | None:
        defense = self.defense.defense if isinstance(self.defense, View) else self.defense
        if not isinstance(defense, Defense) or self.votes > 1 or is_stochastic(self.model):
            return None
        return defense.support(torch.Size((1, *shape[1:])))

    def forward(
        self, x: Tensor, keys: Tensor | None = None, *, draw: Tensor | None = None
    ) -> Tensor:
        """Logits, (B, K).

        Args:
            x: Images, (B, C, H, W), in [0, 1].
            keys: (B,) int64; without them a stochastic pipeline draws from the system's entropy.
            draw: (B,) numbers below `draws(x.shape)`: run these draws instead.
        """
        if draw is not None:
            return call(self.model, self._chosen(x, draw))
        if not self.stochastic:
            return self._once(x, None)
        if keys is None:
            keys = random.entropy_keys(len(x), x.device)
        if self.votes == 1:
            return self._once(x, keys)
        number = torch.arange(self.votes, device=x.device)
        wide = random.fold(keys, "vote", 0, number).flatten()
        votes = self._once(x.repeat_interleave(self.votes, 0), wide)
        return _combine(votes.view(len(x), self.votes, -1), self.combine)

    def _chosen(self, x: Tensor, draw: Tensor) -> Tensor:
        options = self._support(x.shape)
        if options is None or not isinstance(self.defense, (Defense, View)):
            raise ConfigError(
                "this pipeline's draws are too many to be numbered; give keys instead"
            )
        params = {
            name: torch.cat([option[name] for option in options]).to(x.device)[draw]
            for name in options[0]
        }
        return self.defense.replay(x, params)

    def _once(self, x: Tensor, keys: Tensor | None) -> Tensor:
        if self.defense is not None:
            drawn = None if keys is None else random.fold(keys, "defense")
            # nn.Module's own call: hooks fire, the checks of the public door are not repeated.
            x = nn.Module.__call__(self.defense, x, drawn)
        return call(self.model, x, None if keys is None else random.fold(keys, "model"))

    def view(self, backward: Any = None) -> Pipeline:
        """The attacker's view: the same forward pass, a backward rule for each defense part.

        Args:
            backward: A rule that the defense declares; by default the defense's own choice.
        """
        if not isinstance(self.defense, Defense):
            return self
        return Pipeline(
            self.model, self.defense.view(backward), votes=self.votes, combine=self.combine
        )

    def extra_repr(self) -> str:
        """The vote rule, where there is one."""
        return f"votes={self.votes}, combine={self.combine!r}" if self.votes > 1 else ""


def _combine(votes: Tensor, rule: str) -> Tensor:
    """(B, V, K) logits of the votes to (B, K)."""
    if rule == "mean_logits":
        return votes.mean(1)
    mean = votes.log_softmax(-1).logsumexp(1) - math.log(votes.shape[1])
    if rule == "mean_probability":
        return mean
    ballots = torch.zeros_like(votes).scatter_(-1, votes.argmax(-1, keepdim=True), 1.0).mean(1)
    majority = ballots + 0.5 / votes.shape[1] * mean.exp()  # a tie-break, below one ballot
    return majority.detach() + (mean - mean.detach())
