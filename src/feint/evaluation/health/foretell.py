"""Does the view's gradient foretell what the deployed pipeline does, and is its loss stable."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.gradients import call, is_stochastic
from feint.core.losses import margin
from feint.evaluation.findings import Finding, Status
from feint.evaluation.shard import Batch

__all__ = ["check_slopes", "check_stability", "inside"]

STEP = 4 / 255
"""Length of a random move, in image units: rounding to 8 bits lies far below."""
DIRECTIONS = 4
"""Random directions per sample."""
RADIUS, MOVES, UNSTABLE = 1e-3, 8, 0.1
"""Size and number of the moves that must not change the loss by more than this share of it."""
ALIKE, UNLIKE = 0.3, 0.1
"""Correlation below which the gradient is doubtful, and useless."""
OFF, FAR = 10.0, 100.0
"""Factor by which the gradient's size may be wrong: beyond the first a warning, beyond the second
a failure."""


def inside(x: Tensor) -> Tensor:
    """Images so far inside of the box that a move along a random direction stays in it."""
    return x.clamp(STEP, 1 - STEP)


def _signs(keys: Tensor, purpose: str, count: int, like: Tensor) -> Tensor:
    number = torch.arange(count, device=keys.device)
    drawn = random.fold(keys, purpose, 0, number)
    return (random.integers(drawn, 0, 2, like.shape[1:]) * 2 - 1).to(like.dtype)


def _losses(
    pipeline: nn.Module, points: Tensor, y: Tensor, keys: Tensor, batch_size: int
) -> Tensor:
    """Margin losses (B, N) of points (B, N, C, H, W), each sample under one and the same draw."""
    count = points.shape[1]
    flat, wide, label = (
        points.flatten(0, 1),
        keys.repeat_interleave(count),
        y.repeat_interleave(count),
    )
    parts = [
        margin(
            call(pipeline, flat[i : i + batch_size], wide[i : i + batch_size]),
            label[i : i + batch_size],
        )
        for i in range(0, len(flat), batch_size)
    ]
    return torch.cat(parts).double().view(-1, count)


def _repeats(pipeline: nn.Module, points: Tensor, y: Tensor, keys: Tensor, losses: Tensor) -> bool:
    """Whether the keys hold the draws: the same points, with the same keys, have the same loss."""
    again = _losses(pipeline, points[:, :1], y, keys, len(points))
    return torch.allclose(again, losses[:, :1], rtol=1e-3, atol=1e-4)


def _error(values: Tensor) -> float:
    """Standard error of a mean of cosines; of one alone, that of as many random directions."""
    if len(values) < 2:
        return DIRECTIONS**-0.5
    return float(values.std() / len(values) ** 0.5)


def check_slopes(
    pipeline: nn.Module,
    gradient: Tensor,
    batch: Batch,
    keys: Tensor,
    name: str,
    batch_size: int,
) -> Iterator[Finding]:
    """Changes of the margin loss along random directions, foretold and measured.

    Args:
        pipeline: The deployed pipeline.
        gradient: The view's gradient of the margin loss at `inside(batch.x)`, under the draws of
            `keys`.
        batch: A few samples.
        keys: Keys of the samples: every pass of a sample sees the same draw.
        name: The pipeline in words.
        batch_size: Images per pass.

    Returns:
        One finding; none for a pipeline whose draws the keys do not hold.

    Cost: 8 forward passes per sample; one more if the pipeline is random.
    """
    x = inside(batch.x)
    signs = _signs(keys, "slopes", DIRECTIONS, x)
    with torch.no_grad():
        ends = torch.cat([x[:, None] + STEP * signs, x[:, None] - STEP * signs], 1)
        losses = _losses(pipeline, ends, batch.y, keys, batch_size)
        if not is_stochastic(pipeline) or _repeats(pipeline, ends, batch.y, keys, losses):
            up, down = losses.chunk(2, 1)
        else:
            return  # draws that keys do not hold: `unkeyed-randomness` says so
    happens = (up - down) / 2
    foretold = STEP * (gradient[:, None] * signs).flatten(2).double().sum(2)
    size = happens.square().mean(1).sqrt()
    scale = 1e-6 * (1 + (up + down).abs().mean(1))
    moved = size > scale
    check = "gradient-foretells"
    if not bool(moved.any()):
        evidence = (
            f"{2 * DIRECTIONS} moves of ±{STEP:.3g} leave the loss of all {len(x)} samples as it "
            "was: there is nothing to foretell"
        )
        yield Finding(check, "pass", name, evidence)
        return
    a, b = foretold[moved], happens[moved]
    lengths = a.norm(dim=1) * b.norm(dim=1)
    cosines = torch.where(lengths > 0, (a * b).sum(1) / lengths.clamp_min(1e-300), 0.0)
    alike, error = float(cosines.mean()), _error(cosines)
    ratios = a.square().mean(1).sqrt() / size[moved]
    ratio = float(ratios.median())
    wrong = max(ratio, 1 / max(ratio, 1e-300))
    status: Status = "pass"
    # Few samples say little of a correlation: what is below must clearly be so.
    if not (alike >= UNLIKE or alike + 2 * error >= ALIKE) or not wrong <= FAR:
        status = "fail"
    elif alike + error < ALIKE or wrong > OFF:
        status = "warn"
    evidence = (
        f"over {DIRECTIONS} random directions of ±{STEP:.3g} what the gradient foretells and what "
        f"happens to the deployed pipeline correlate with {alike:.2f} ± {error:.2f} (warn if "
        f"clearly below {ALIKE:g}, fail if also below {UNLIKE:g}), and the first is {ratio:.3g} "
        "times the second (warn beyond a factor "
        f"of {OFF:g}, fail beyond {FAR:g}: vanishing, exploding or shattered gradients)"
    )
    yield Finding(check, status, name, evidence)


@torch.no_grad()
def check_stability(
    pipeline: nn.Module, batch: Batch, keys: Tensor, name: str, batch_size: int
) -> Iterator[Finding]:
    """Pintor et al.'s second indicator: does the loss jump about under tiny random moves?

    Args:
        pipeline: The deployed pipeline.
        batch: A few samples.
        keys: Keys of the samples: every pass of a sample sees the same draw.
        name: The pipeline in words.
        batch_size: Images per pass.

    Cost: nine forward passes per sample.
    """
    number = torch.arange(MOVES, device=keys.device)
    drawn = random.fold(keys, "stability", 0, number)
    noise = (2 * random.uniform(drawn, batch.x.shape[1:]) - 1).to(batch.x.dtype) * RADIUS
    points = torch.cat([batch.x[:, None], (batch.x[:, None] + noise).clamp(0, 1)], 1)
    losses = _losses(pipeline, points, batch.y, keys, batch_size)
    base = losses[:, :1]
    share = ((losses[:, 1:] - base).abs() / base.abs().clamp_min(1e-12)).nan_to_num(1.0)
    # A median: on the boundary the loss is zero, and any change of it infinitely large.
    value = float(share.clamp_max(1).mean(1).median())
    evidence = (
        f"{MOVES} random moves of {RADIUS:g} change the margin loss by {100 * value:.2g} % of it "
        f"(median of {len(base)} samples; warn above {100 * UNSTABLE:g} %)"
    )
    yield Finding("stable-loss", "warn" if value > UNSTABLE else "pass", name, evidence)
