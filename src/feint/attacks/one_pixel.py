"""One-pixel and few-pixel attack: differential evolution over places and colors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from feint.attacks._ascent import Stop, Trace
from feint.attacks._best import CHUNK, Best
from feint.attacks._minimal import Rows, check_count, check_number, flag, goal_log_odds
from feint.core import random
from feint.core.checks import check_images
from feint.core.errors import ConfigError, RangeError
from feint.core.gradients import Model
from feint.core.registry import attack

__all__ = ["one_pixel"]

_NORMS = ("l0",)
_CPU_CHUNK = 64 * 3 * 32 * 32
"""Values per forward pass on a CPU: 320 CIFAR-10 images at a time cost half as much again as 64."""
_SU = {"strategy": "rand1bin", "popsize": 400, "generations": 100, "scale": 0.5, "crossover": 1.0}


@dataclass
class _State(Rows):
    """Samples in the loop: their populations and how good each member is."""

    rows: Tensor
    genes: Tensor
    """(R, P, pixels, 2 + C) in [0, 1): row, column, color."""
    worth: Tensor
    """(R, P)."""


@attack(
    goal="budget",
    knowledge="score",
    norms=_NORMS,
    paper="Su et al., 2019, arXiv:1710.08864",
    presets={
        "original": {**_SU, "start": "normal"},
        "ace": {**_SU, "start": "normal", "pixels": 1},
        # The widespread reimplementation with scipy's dithered best1bin.
        "keras": {
            **_SU,
            "strategy": "best1bin",
            "scale": (0.5, 1.0),
            "generations": 75,
            "start": "uniform",
        },
    },
)
def one_pixel(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    preset: str | None = None,
    pixels: int | None = None,
    eps: float | None = None,
    strategy: Literal["rand1bin", "best1bin"] = "rand1bin",
    popsize: int = 400,
    generations: int = 100,
    scale: float | tuple[float, float] = 0.5,
    crossover: float = 1.0,
    start: Literal["normal", "uniform"] = "normal",
    levels: int | None = 256,
    chunk: int | None = None,
    targeted: bool = False,
    mask: Tensor | None = None,
    seed: int | Tensor = 0,
    stop: Stop | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """Change one pixel, or a few, where and how differential evolution finds best.

    The populations of all images evolve side by side; an image leaves once a member of its
    population is adversarial.

    Convention:
        Images are float RGB, NCHW, in [0, 1]. l0 counts pixels, all channels of one as one.

    Args:
        model: Maps images in [0, 1] to logits (B, K); with `keys=` if it is stochastic.
            Probabilities are ranked as if they were logits.
        x: Images, (B, C, H, W), in [0, 1].
        y: True labels (B,), or targets if `targeted`.
        preset: `"original"` (Su et al., the default values), `"ace"` (S0: the same with one pixel)
            or `"keras"` (best1bin with dither, 75 generations, uniform start); keywords that are
            given win over it. None by default: the values below.
        pixels: Pixels that each candidate changes; by default as many as `eps` allows, or 1.
        eps: Budget in pixels; by default `pixels`. Below 1, nothing may change.
        strategy: `"rand1bin"` mutates from a random member (Su et al., S0), `"best1bin"` from the
            best one.
        popsize: Members of the population, at least 4.
        generations: Generations after the first population.
        scale: Weight F of the difference; a pair (low, high) draws it anew for every generation.
        crossover: Probability CR that a gene comes from the mutant; 1: all do (Su et al. have no
            crossover).
        start: Colors of the first population: `"normal"` N(128, 127) of 255, clipped, or
            `"uniform"`. Places are uniform.
        levels: Colors are rounded down to so many levels, 256 for 8-bit images; None for none.
        chunk: Images per forward pass; by default 4096, on a CPU as many as fit its caches
            (64 of CIFAR-10).
        targeted: Seek the class `y` instead of any other.
        mask: Pixels that may change, bool (B or 1, 1 or C, H, W): places are mapped into them.
        seed: Integer, or one key per sample from `feint.core.random.keys`.
        stop: `"success"` drops a sample once adversarial, `"never"` takes every generation; by
            default `"success"` for a deterministic model.
        trace: Called as `trace(step, x_adv, logits, loss, active)` at every evaluated point, once
            per forward pass: step 0 are the clean images, step 1 the first population. The loss is
            the log odds of the attacker's classes.

    Returns:
        x_adv: Like `x`, in [0, 1], with at most `eps` pixels changed: the best candidate, or `x`
        where none is better.

    Raises:
        ConfigError, RangeError, ShapeError, DtypeError, DeviceError: On bad arguments.
        ModelError: If the logits are NaN or have the wrong shape.

    Cost:
        Per sample at most 1 + popsize·(generations + 1) forward passes, no backward pass. One host
        synchronisation per generation if samples may stop.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
        >>> x, y = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
        >>> x_adv = one_pixel(model, x, y, popsize=20, generations=3)
        >>> bool(((x_adv != x).any(1).flatten(1).sum(1) <= 1).all())
        True

    References:
        Su, Vargas, Sakurai, "One pixel attack for fooling deep neural networks", IEEE TEVC 2019,
        §III. Storn and Price, J. Global Optimization 1997.

    Deviations:
        Candidates are ranked by log odds, which order like the probability of `y` and do not
        saturate. Genes that leave their range are drawn anew, as in scipy. S0 maps places into a
        mask by a compressed grid; here a gene picks among the mask's rows, then among a row's
        pixels, so that each one can be reached.
    """
    many = _pixels(pixels, eps)
    low, high = (scale, scale) if isinstance(scale, (int, float)) else scale
    check_number("scale", low)
    check_number("scale", high, low=low)
    check_number("crossover", crossover, high=1.0)
    check_count("popsize", popsize, least=4)
    check_count("generations", generations)
    if chunk is not None:
        check_count("chunk", chunk)
    if levels is not None:
        check_count("levels", levels, least=2)
    if strategy not in ("rand1bin", "best1bin"):
        raise ConfigError(f"strategy is {strategy!r}; expected 'rand1bin' or 'best1bin'")
    if start not in ("normal", "uniform"):
        raise ConfigError(f"start is {start!r}; expected 'normal' or 'uniform'")
    check_images(x)
    best = Best(
        model,
        x,
        y,
        eps=float(many),
        norm="l0",
        norms=_NORMS,
        targeted=targeted,
        loss=goal_log_odds(targeted),
        mask=mask,
        seed=seed,
        stop=stop,
        trace=trace,
    )
    if len(x) == 0:
        return x.clone()
    if chunk is None:
        chunk = CHUNK if x.is_cuda else min(CHUNK, max(1, _CPU_CHUNK // x[0].numel()))
    rows = best.everyone
    best.look(rows)
    if best.early:
        rows = best.standing(rows)
    if many == 0 or len(rows) == 0:
        return best.result()
    places = _Places(best, levels)
    genes = _first(best.keys[rows], popsize, many, x.shape[1], start)
    worth, _ = places.evaluate(genes, rows, 1, chunk)
    state = _State(rows, genes, worth)
    for generation in range(1, generations + 1):
        if best.early:
            left = best.standing(state.rows)
            if len(left) == 0:
                break
            if len(left) < len(state.rows):
                state.keep(left)
        keys = random.fold(best.keys[state.rows], "generation", generation)
        trial = _trial(state, keys, strategy, low, high, crossover)
        worth, _ = places.evaluate(trial, state.rows, generation + 1, chunk)
        better = worth >= state.worth
        state.genes = torch.where(better[:, :, None, None], trial, state.genes)
        state.worth = torch.where(better, worth, state.worth)
    return best.result()


def _pixels(pixels: int | None, eps: float | None) -> int:
    """How many pixels a candidate changes."""
    if pixels is not None:
        check_count("pixels", pixels)
    if eps is None:
        return pixels or 1
    if not 0 <= eps < float("inf"):
        raise RangeError(f"eps is {eps}; expected a number of pixels ≥ 0")
    if pixels is not None and pixels > eps:
        raise RangeError(f"pixels is {pixels}, more than the budget eps of {eps:g}; lower it")
    return int(eps) if pixels is None else pixels


def _first(keys: Tensor, popsize: int, pixels: int, channels: int, start: str) -> Tensor:
    """The first population, (R, P, pixels, 2 + C)."""
    shape = (popsize, pixels, 2 + channels)
    genes = random.uniform(random.fold(keys, "population"), shape)
    if start == "normal":
        colors = random.normal(random.fold(keys, "colors"), (popsize, pixels, channels))
        genes[..., 2:] = ((128 + 127 * colors) / 256).clamp(0, _TOP)
    return genes


_TOP = 1 - 2.0**-24
"""The largest number below 1 in float32."""


def _trial(
    state: _State, keys: Tensor, strategy: str, low: float, high: float, crossover: float
) -> Tensor:
    """Mutation and crossover: one trial for each member."""
    genes = state.genes
    size = genes.shape[1]
    # Three members, different from each other and from the one they are for: the first three of a
    # random order of the others, drawn one after the other.
    a, b, c = _three(random.fold(keys, "members"), size)
    if strategy == "best1bin":
        base = _take(genes, state.worth.argmax(1)[:, None]).expand_as(genes)
    else:
        base = _take(genes, a)
    factor = low + (high - low) * random.uniform(random.fold(keys, "scale"))
    mutant = base + flag(factor, genes) * (_take(genes, b) - _take(genes, c))
    fresh = random.uniform(random.fold(keys, "fresh"), genes.shape[1:])
    mutant = torch.where((mutant >= 0) & (mutant <= _TOP), mutant, fresh)
    if crossover >= 1:
        return mutant
    shape = genes.shape[1:]
    drawn = random.uniform(random.fold(keys, "crossover"), shape) < crossover
    forced = random.integers(random.fold(keys, "forced"), 0, shape[1] * shape[2], (size,))
    one = torch.nn.functional.one_hot(forced, shape[1] * shape[2]).bool()
    return torch.where(drawn | one.view(-1, *shape), mutant, genes)


def _three(keys: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three different members for each of `size`, none of them itself: (R, P) each."""
    word = random.words(keys, 3 * size).view(len(keys), 3, size)
    own = torch.arange(size, device=keys.device).expand(len(keys), size)
    taken = [own]
    for i in range(3):
        pick = (word[:, i] * (size - 1 - i)) >> 32
        # The pick-th of those not taken: skip over the taken ones in rising order.
        for other in torch.stack(taken).sort(0).values:
            pick = pick + (pick >= other)
        taken.append(pick)
    return taken[1], taken[2], taken[3]


def _take(genes: Tensor, members: Tensor) -> Tensor:
    """Genes of the given members, (R, M) to (R, M, pixels, 2 + C)."""
    return genes.gather(1, members[:, :, None, None].expand(-1, -1, *genes.shape[2:]))


class _Places:
    """From genes to images: where a place lies within the mask, and which color it gets."""

    def __init__(self, best: Best, levels: int | None) -> None:
        self.best, self.levels = best, levels
        _, _, self.height, self.width = best.x.shape
        self.order: tuple[Tensor, Tensor] | None = None
        if best.mask is not None:
            open_ = best.mask.any(1)
            # Allowed rows first, in their order; in each row the allowed columns first.
            self.rows = open_.any(2).sum(1)
            self.columns = open_.sum(2)
            self.order = (
                (~open_.any(2)).int().argsort(dim=1, stable=True),
                (~open_).int().argsort(dim=2, stable=True),
            )

    def evaluate(self, genes: Tensor, rows: Tensor, step: int, chunk: int) -> tuple[Tensor, Tensor]:
        """Worth and success of every member of the rows' populations, (R, P) each."""
        size = genes.shape[1]
        flat = genes.flatten(0, 1)

        def build(part: Tensor) -> Tensor:
            return self.images(flat[part], rows[part // size])

        return self.best.try_many(build, size, rows, step, chunk)

    def images(self, genes: Tensor, owner: Tensor) -> Tensor:
        """Images of candidates (N, pixels, 2 + C) of the samples `owner`."""
        place = self._place(genes[..., 0], genes[..., 1], owner)
        color = genes[..., 2:]
        if self.levels is not None:
            color = (color * self.levels).floor() / (self.levels - 1)
        if place.shape[1] > 1:  # where several meet in a place, the last one counts for all
            number = torch.arange(place.shape[1], device=place.device)
            last = ((place[:, :, None] == place[:, None]) * number).amax(2)
            color = color.gather(1, last[..., None].expand_as(color))
        image = self.best.x[owner]  # a copy
        image.flatten(2).scatter_(
            2, place[:, None].expand(-1, image.shape[1], -1), color.transpose(1, 2).to(image.dtype)
        )
        return self.best.masked(image, owner)

    def _place(self, row: Tensor, column: Tensor, owner: Tensor) -> Tensor:
        """Number of the pixel that two genes stand for, (N, pixels)."""
        if self.order is None:
            return (row * self.height).long() * self.width + (column * self.width).long()
        owner = owner[:, None]
        at_row = self.order[0][owner, (row * self.rows[owner]).long()]
        at_column = self.order[1][owner, at_row, (column * self.columns[owner, at_row]).long()]
        return at_row * self.width + at_column
