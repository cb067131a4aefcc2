"""HopSkipJump: walk along the boundary by decisions alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from feint.attacks._ascent import Stop, Trace
from feint.attacks._best import CHUNK, Best
from feint.attacks._minimal import check_count, check_number, column, flag
from feint.core import random
from feint.core.checks import check_images
from feint.core.errors import ShapeError
from feint.core.gradients import Model
from feint.core.norms import distance, norm_of, steepest_ascent
from feint.core.registry import attack

__all__ = ["hopskipjump"]

_NORMS = ("l2", "linf")
_HALVINGS = 10
"""Step lengths that are tried at once, each half of the one before."""
_BLOCK = 32
"""Directions in memory at a time, per sample."""
_FIRST = 8
"""Starts that are tried at once before all the others are."""


@attack(
    goal="minimal",
    knowledge="decision",
    norms=_NORMS,
    paper="Chen et al., 2020, arXiv:1904.02144",
    version=2,
)
def hopskipjump(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    norm: str = "l2",
    steps: int = 40,
    probes: int = 100,
    most_probes: int = 10000,
    gamma: float = 1.0,
    tries: int = 100,
    start: Tensor | None = None,
    chunk: int = CHUNK,
    targeted: bool = False,
    mask: Tensor | None = None,
    seed: int | Tensor = 0,
    stop: Stop | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """Decision-based walk: to the boundary by bisection, then along a direction of sampled votes.

    Convention:
        Images are float RGB, NCHW, in [0, 1]. Only the predicted class is used.

    Args:
        model: Maps images in [0, 1] to logits (B, K), of which the argmax counts; with `keys=` if
            it is stochastic (each query is then one draw).
        x: Images, (B, C, H, W), in [0, 1].
        y: True labels (B,), or targets if `targeted`.
        norm: `"l2"` or `"linf"`: the distance to make small.
        steps: Iterations.
        probes: Random directions of the first iteration; the t-th takes √t times as many.
        most_probes: At most so many in an iteration.
        gamma: Scale of the bisection's precision θ: γ/n^1.5 of the distance for l2, γ/n² for linf,
            with n values per image.
        tries: Random starting images per sample, of four kinds in turn: noise, black and white
            noise, coarse noise, a single color. The nearest adversarial one is taken.
        start: Adversarial starting images (B, C, H, W), such as one of the target class for each
            sample; those that are not adversarial are replaced by random ones.
        chunk: Images per forward pass.
        targeted: Seek the class `y` instead of any other.
        mask: Pixels that may change, bool (B or 1, 1 or C, H, W).
        seed: Integer, or one key per sample from `feint.core.random.keys`.
        stop: `"success"` leaves out samples that are adversarial as they are, `"never"` takes every
            step with them, too; by default `"success"` for a deterministic model.
        trace: Called as `trace(step, x_adv, logits, loss, active)` at every query, once per forward
            pass; steps count the rounds of queries. The loss is minus the distance to `x`.

    Returns:
        x_adv: Like `x`, in [0, 1]: the nearest adversarial image queried, or `x` itself where no
        start was adversarial or `x` is.

    Raises:
        ConfigError, RangeError, ShapeError, DtypeError, DeviceError: On bad arguments.
        ModelError: If the logits are NaN or have the wrong shape.

    Cost:
        Queries per sample: 1 for the clean image, 1 for a given start, 8 or `tries` random starts;
        then s for a bisection, s = ⌈log₂(1/θ)⌉ (l2: 18 on 3×32×32, 26 on 3×224×224; linf: 24, 35),
        and in iteration t min(probes·√t, most_probes) + 10 + s. With the default values 17 000 + 40
        (10 + s). No backward pass. One host synchronisation in all, after the first starts.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> x = torch.rand(2, 3, 2, 2)
        >>> hopskipjump(model, x, model(x).argmax(1), steps=2, probes=10).shape
        torch.Size([2, 3, 2, 2])

    References:
        Chen, Jordan, Wainwright, "HopSkipJumpAttack: a query-efficient decision-based attack",
        IEEE S&P 2020, Algorithms 1 and 2, §III-C.

    Deviations:
        The step lengths d/√t·2⁻ʲ, j < 10, are queried at once and the longest adversarial one is
        taken, instead of one after the other: ten queries instead of about two, among hundreds, and
        no sample waits for another. The nearest of several starts of four kinds is taken; the
        original takes the first adversarial noise image. Where a step is no use the point stays.
    """
    for name, value in (("steps", steps), ("probes", probes), ("tries", tries), ("chunk", chunk)):
        check_count(name, value)
    check_count("most_probes", most_probes)
    check_number("gamma", gamma, low=1e-6)
    check_images(x)

    def nearness(points: Tensor, owner: Tensor) -> Tensor:
        return -distance(points, x[owner], norm)

    best = Best(
        model,
        x,
        y,
        norm=norm,
        norms=_NORMS,
        targeted=targeted,
        loss="margin",
        mask=mask,
        seed=seed,
        stop=stop,
        trace=trace,
        measure=nearness,
    )
    if start is not None:
        check_images(start, "start")
        if start.shape != x.shape or start.dtype != x.dtype:
            raise ShapeError(
                f"start is {start.dtype} {tuple(start.shape)}; expected {x.dtype} "
                f"{tuple(x.shape)}, as x"
            )
    if len(x) == 0:
        return x.clone()
    walk = _Walk(best, chunk)
    rows = best.everyone
    walk.ask(best.x, rows)
    if best.early:
        rows = rows[best.standing(rows)]
    if len(rows):
        rows = walk.begin(rows, start, tries)
    if len(rows):
        walk.go(rows, steps, probes, most_probes, gamma)
    return best.result()


class _Walk:
    """The queries of a walk, numbered, and its parts."""

    def __init__(self, best: Best, chunk: int) -> None:
        self.best, self.chunk, self.number = best, chunk, 0

    def many(self, build: Callable[[Tensor], Tensor], count: int, rows: Tensor) -> Tensor:
        """Decisions on `count` points per row, (R, count) bool."""
        _, hit = self.best.try_many(build, count, rows, self.number, self.chunk)
        self.number += 1
        return hit

    def ask(self, point: Tensor, rows: Tensor) -> Tensor:
        """Decisions on a point per row, (R,) bool."""
        return self.many(lambda flat: point[flat], 1, rows)[:, 0]

    def begin(self, rows: Tensor, start: Tensor | None, tries: int) -> Tensor:
        """Find an adversarial image for each row, and give the rows that have one."""
        best = self.best
        if start is not None:
            self.ask(best.masked(start[rows], rows), rows)
        first = min(_FIRST, tries)
        keys = random.fold(best.keys, "starts", 0, torch.arange(tries, device=rows.device))
        for low, high in ((0, first), (first, tries)):
            lost = rows[best.standing(rows)]
            if low == high or len(lost) == 0:
                break
            count = high - low

            def build(
                flat: Tensor, low: int = low, count: int = count, lost: Tensor = lost
            ) -> Tensor:
                owner, number = lost[flat // count], low + flat % count
                image = _noise(keys[owner, number], number, best.x[owner])
                return best.masked(image, owner)

            self.many(build, count, lost)
        fell = best.worth[rows] < 0  # a clean image is at distance 0
        return rows[(fell & (best.share[rows] == 1)).nonzero()[:, 0]]

    def go(self, rows: Tensor, steps: int, probes: int, most_probes: int, gamma: float) -> None:
        """The walk of the rows, all of which have an adversarial image."""
        best = self.best
        x, n, norm = best.x[rows], best.x[0].numel(), best.norm
        theta = gamma / (n**1.5 if norm == "l2" else n**2)
        point = self.bisect(best.best[rows], rows, theta)
        for t in range(1, steps + 1):
            far = norm_of(point - x, norm)
            width = 0.1 * torch.ones_like(far)
            if t > 1:
                width = far * theta * (math.sqrt(n) if norm == "l2" else n)
            width = width.clamp_min(4 * torch.finfo(x.dtype).eps)
            count = min(int(probes * math.sqrt(t)), most_probes)
            direction = self.direction(point, rows, width, count, t)
            unit = steepest_ascent(direction, norm)
            point = self.jump(point, rows, unit, far / math.sqrt(t))
            point = self.bisect(point, rows, theta)

    def direction(self, point: Tensor, rows: Tensor, width: Tensor, count: int, t: int) -> Tensor:
        """Sum of random directions, weighted by the votes of the images there."""
        # Blocks of a fixed size, so that the order of the sums hangs on no batch.
        groups = torch.arange(len(rows), device=rows.device).split(max(1, self.chunk // _BLOCK))
        parts = [self._direction(point[g], rows[g], width[g], count, t) for g in groups]
        self.number += -(-count // _BLOCK)
        return torch.cat(parts)

    def _direction(self, point: Tensor, rows: Tensor, width: Tensor, count: int, t: int) -> Tensor:
        best, shape = self.best, point.shape[1:]
        number = torch.arange(count, device=rows.device)
        keys = random.fold(best.keys[rows], "probes", t, number)  # (R, count)
        wide = width.view(-1, 1, *[1] * len(shape))
        voted, summed, votes = torch.zeros_like(point), torch.zeros_like(point), []
        for turn, block in enumerate(keys.split(_BLOCK, dim=1), start=self.number):
            if best.norm == "l2":
                noise = random.normal(block, shape, point.dtype)
            else:
                noise = random.uniform(block, shape, -1.0, 1.0).to(point.dtype)
            if best.mask is not None:
                noise = noise * best.mask[rows][:, None]
            noise = steepest_ascent(noise.flatten(0, 1), "l2").view_as(noise)
            probes = (point[:, None] + wide * noise).clamp_(0, 1)
            flat = probes.flatten(0, 1)
            _, hit = best.try_many(flat.__getitem__, block.shape[1], rows, turn, self.chunk)
            vote = hit.to(point.dtype) * 2 - 1
            moved = (probes - point[:, None]) / wide
            summed += moved.sum(1)
            voted += (moved * vote.view(*vote.shape, *[1] * len(shape))).sum(1)
            votes.append(vote)
        mean = torch.cat(votes, 1).mean(1)
        # Where all votes agree there is nothing to compare, and their sum is the direction.
        return voted - column(torch.where(mean.abs() == 1, 0.0, mean), point) * summed

    def jump(self, point: Tensor, rows: Tensor, unit: Tensor, length: Tensor) -> Tensor:
        """The longest of ten steps along `unit` that is adversarial; none if none is."""
        best = self.best

        def build(flat: Tensor) -> Tensor:
            row = flat // _HALVINGS
            step = length[row] * 0.5 ** (flat % _HALVINGS)
            moved = point[row] + column(step, unit) * unit[row]
            return best.masked(moved.clamp(0, 1), rows[row])

        hit = self.many(build, _HALVINGS, rows)
        longest = hit.int().argmax(1)
        number = torch.arange(len(rows), device=rows.device) * _HALVINGS + longest
        return torch.where(flag(hit.any(1), point), build(number), point)

    def bisect(self, point: Tensor, rows: Tensor, theta: float) -> Tensor:
        """The adversarial end of a bisection between the clean image and `point`."""
        x, norm = self.best.x[rows], self.best.norm
        low = torch.zeros(len(rows), dtype=point.dtype, device=point.device)
        high = torch.ones_like(low)
        size = norm_of(point - x, "linf")
        end = point

        def between(share: Tensor) -> Tensor:
            if norm == "l2":
                return torch.lerp(x, point, column(share, point)).clamp(0, 1)
            reach = column(share * size, point)
            return torch.minimum(torch.maximum(point, x - reach), x + reach).clamp(0, 1)

        for _ in range(max(1, math.ceil(-math.log2(min(theta, 0.5))))):
            middle = (low + high) / 2
            tried = between(middle)
            hit = self.ask(tried, rows)
            low, high = torch.where(hit, low, middle), torch.where(hit, middle, high)
            end = torch.where(flag(hit, end), tried, end)
        return end


def _noise(keys: Tensor, number: Tensor, like: Tensor) -> Tensor:
    """Random images (N, C, H, W), their kinds in turn by their numbers."""
    channels, height, width = like.shape[1:]
    fine = random.uniform(random.fold(keys, "fine"), like.shape[1:])
    coarse = random.uniform(random.fold(keys, "coarse"), (channels, 4, 4))
    down = torch.arange(height, device=like.device) * 4 // height
    right = torch.arange(width, device=like.device) * 4 // width
    coarse = coarse[:, :, down][:, :, :, right]
    flat = coarse[:, :, :1, :1].expand_as(fine)
    kinds = torch.stack([fine, (fine >= 0.5).to(fine), coarse, flat])
    pick = (number % 4).view(1, -1, 1, 1, 1).expand(1, *fine.shape)
    return kinds.gather(0, pick)[0].to(like.dtype)
