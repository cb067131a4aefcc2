"""Randomness that a model does not declare, or does not key: measured, wrapped and reported."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.gradients import call, is_stochastic, takes_keys
from feint.evaluation.findings import Finding

__all__ = ["DIFFERENT", "Undeclared", "declare", "unlike"]

PASSES, COPIES = 64, 8
"""Forward passes, each of so many copies of an image, that may show how a module draws."""
DIFFERENT = 1e-4
"""Logits that differ by more than this share of the largest one are different."""


def unlike(first: Tensor, second: Tensor) -> float:
    """Largest difference of two sets of logits, as a share of the largest finite logit."""
    scale = torch.cat([first, second]).abs().nan_to_num(0, 0, 0).amax() if first.numel() else 1.0
    difference = (first - second).abs()
    # Two infinite logits of one sign are the same.
    difference = difference.masked_fill(first == second, 0).nan_to_num(torch.inf)
    return float(difference.max() / max(float(scale), 1e-30)) if first.numel() else 0.0


class Undeclared(nn.Module):
    """A model whose randomness is not declared or takes no keys; declares it and decides the draws.

    A model that takes keys gets them. For one that does not, torch's global generator is seeded
    from the keys and put back: draws repeat for the same keys in the same batch, but depend on the
    batch; a finding says so.

    Args:
        model: The user's model.
        alone: Whether one draw would serve a whole batch; then every sample is asked alone, seeded
            by its own key, since draws of one sample would otherwise be no draws at all.
    """

    stochastic = True

    def __init__(self, model: nn.Module, alone: bool = False) -> None:
        super().__init__()
        self.model, self.alone = model, alone
        self.training = model.training

    @property
    def keyed(self) -> bool:
        """Whether each sample's draw is decided by its own key."""
        return self.alone or takes_keys(self.model)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """The module's own forward pass, under a seed that the keys decide."""
        if takes_keys(self.model):
            keys = random.entropy_keys(len(x), x.device) if keys is None else keys
            return call(self.model, x, keys)
        if keys is None:
            keys = random.entropy_keys(len(x), x.device)
        seeds = random.fold(keys, "global")
        if self.alone and len(x):
            one = [self._seeded(x[i : i + 1], seed) for i, seed in enumerate(seeds.tolist())]
            return torch.cat(one)
        return self._seeded(x, int(seeds.sum()) if len(x) else 0)

    def _seeded(self, x: Tensor, seed: int) -> Tensor:
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            return call(self.model, x)


def declare(model: nn.Module, x: Tensor) -> tuple[nn.Module, list[Finding]]:
    """Measure whether a model is random; wrap it if it is and does not say so, or takes no keys.

    Args:
        model: The user's model.
        x: A few images.

    Returns:
        The model, wrapped in `Undeclared` where needed, and what was found.

    Cost: five forward passes; if the model is random, at most 64 more of eight copies of one
        image, mostly two.
    """
    if len(x) == 0 or (takes_keys(model) and is_stochastic(model)):
        return model, []
    name = type(model).__name__
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(0)  # the evidence is the same in every run
        keys = random.keys(0, len(x)).to(x.device)
        logits = [call(model, x, random.fold(keys, "declare", n)) for n in range(5)]
        spread = max(unlike(other, logits[0]) for other in logits[1:])
        if spread <= DIFFERENT and not is_stochastic(model):
            return model, []
        alone = not takes_keys(model) and _one_draw_a_batch(model, x[:1])
    evidence = (
        f"logits of the same images differ by up to {spread:.2g} of the largest between five "
        f"forward passes (threshold {DIFFERENT:g})"
    )
    if takes_keys(model):
        evidence += "; forward takes keys, but the model does not declare stochastic = True"
        return Undeclared(model), [Finding("undeclared-randomness", "warn", name, evidence)]
    evidence += (
        ", and forward takes no keys: "
        + (
            "one draw serves a whole batch, so every sample is asked alone, which is slow"
            if alone
            else "judged by the random protocol, with draws that depend on the batch"
        )
        + "; let forward take keys (B,) and draw with feint.core.random"
    )
    if not is_stochastic(model):
        evidence += "; it was not declared (stochastic = True)"
    return Undeclared(model, alone), [Finding("unkeyed-randomness", "warn", name, evidence)]


def _one_draw_a_batch(model: nn.Module, x: Tensor) -> bool:
    """Whether a random module draws once for a whole batch.

    Then copies of an image always get the same logits while passes differ. A draw of its own for
    each copy shows as soon as two copies differ; what shows neither is taken to draw for each.
    """
    copies, first = x.repeat(COPIES, 1, 1, 1), None
    for _ in range(PASSES):
        logits = call(model, copies)
        if unlike(logits, logits[:1].expand_as(logits)) > DIFFERENT:
            return False
        first = logits if first is None else first
        if unlike(logits, first) > DIFFERENT:
            return True
    return False
