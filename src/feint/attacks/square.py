"""Square: random search with square windows, from scores alone."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from feint.attacks._ascent import (
    EPS,
    Stop,
    Trace,
    _check,
    _column,
    _confine,
    _objective,
    _radius,
    _Result,
    _Rows,
    _start,
    sample_keys,
    stops_early,
)
from feint.attacks._minimal import check_count, check_number
from feint.attacks._targets import chunked, rows_at_once
from feint.attacks._windows import bump, inside, place, share_of_window, side
from feint.core import random
from feint.core.errors import ModelError
from feint.core.gradients import Model, backprop, eot, takes_keys
from feint.core.losses import Loss, success_share
from feint.core.norms import norm_of
from feint.core.registry import attack

__all__ = ["square"]

_NORMS = ("linf", "l2")
_BLOCK = 64
"""Queries whose random numbers are drawn at once."""


@dataclass
class _Search(_Rows):
    """Rows of a random search; `best` is where each stands, `point` what it tries."""

    drawn: Tensor
    """(R, queries, numbers): 32-bit words for the block's queries."""


@attack(
    goal="budget",
    knowledge="score",
    norms=_NORMS,
    paper="Andriushchenko et al., 2020, arXiv:1912.00049",
)
def square(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | None = None,
    norm: str = "linf",
    queries: int = 5000,
    share: float = 0.8,
    schedule: int | None = None,
    restarts: int = 1,
    draws: int = 1,
    targeted: bool = False,
    loss: str | Loss = "margin",
    mask: Tensor | None = None,
    seed: int | Tensor = 0,
    stop: Stop | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """Square: a random search that changes one square window at a time and asks for scores only.

    linf: starts from vertical stripes at ±eps; every query sets a window to ±eps, one sign per
    channel. l2: starts from a grid of bumps; every query moves the budget of a second window into
    the first, as a bump of random sign. A change stays if the loss does not fall. The windows
    shrink on a fixed schedule.

    Convention:
        Images are float RGB, NCHW, in [0, 1]; `eps` is in the same units.

    Args:
        model: Maps images in [0, 1] to logits (B, K); with `keys=` if it is stochastic. It is never
            differentiated.
        x: Images, (B, C, H, W), in [0, 1].
        y: True labels (B,), or targets if `targeted`.
        eps: Budget in image units; by default 8/255 (linf) or 0.5 (l2).
        norm: `"linf"` or `"l2"`.
        queries: Evaluations per sample, the first one included.
        share: Share of the image that the first windows cover, p, in (0, 1].
        schedule: Queries over which the windows shrink (halved in area after 0.1, 0.5, 2, 5, 10,
            20, 40, 60, 80 % of them); by default `queries`.
        restarts: Independent searches per sample, folded into the batch.
        draws: Draws of a stochastic model per query, over which the loss is averaged.
        targeted: Raise the score of the class `y` instead of any other.
        loss: `"margin"`, `"cross_entropy"`, `"dlr"`, or a function to maximise.
        mask: Pixels that may change, bool (B or 1, 1 or C, H, W).
        seed: Integer, or one key per sample from `feint.core.random.keys`.
        stop: `"success"` drops a sample once adversarial, `"never"` asks every query; by default
            `"success"` for a deterministic model.
        trace: Called as `trace(step, x_adv, logits, loss, active)` at every evaluated point.

    Returns:
        x_adv: Like `x`, in [0, 1], within `eps` measured in float64: the evaluated point that is
        adversarial on most draws, then the one with the highest loss.

    Raises:
        ConfigError, RangeError, ShapeError, DtypeError, DeviceError: On bad arguments.
        ModelError: If the logits are NaN or have the wrong shape.

    Cost:
        Per sample and restart at most `queries` forward passes, times `draws`; no backward pass.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
        >>> x, y = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
        >>> bool(((square(model, x, y, eps=0.1, queries=20) - x).abs() <= 0.1).all())
        True

    References:
        Andriushchenko, Croce, Flammarion, Hein, "Square Attack: a query-efficient black-box
        adversarial attack via random search", ECCV 2020, Algorithms 1 to 3.

    Deviations:
        A change that leaves the loss as it was is kept, which helps where scores are rounded; the
        original keeps only what is better. The images themselves are not evaluated (as in the
        authors' code). Positions are drawn per sample, theirs once for the whole batch.
    """
    budget = EPS.get(norm, 0.0) if eps is None else eps
    _check(x, y, budget, norm, _NORMS, mask)
    for name, number in (("queries", queries), ("restarts", restarts), ("draws", draws)):
        check_count(name, number)
    check_count("schedule", queries if schedule is None else schedule)
    check_number("share", share, high=1.0)
    objective = _objective(loss, targeted, y)
    early = stops_early(stop, model)
    estimator = backprop if draws == 1 else eot(draws)
    keyed = draws > 1 or takes_keys(model)
    keys = sample_keys(seed, x)
    if len(x) == 0:
        return x.clone()
    base = _start(x.detach(), y, norm, budget, mask, keys, restarts, False)
    none = torch.empty(0, dtype=torch.int64, device=x.device)
    rows = _Search(
        **{f.name: getattr(base, f.name) for f in fields(base)},
        drawn=none.expand(len(base.x), 0, 0),
    )
    radius = _radius(x, norm, budget)
    result = _Result(*(getattr(rows, f.name).clone() for f in fields(_Result)))
    estimator = chunked(estimator, rows_at_once(x, restarts))
    finished = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    begin, change = (_stripes, _window) if norm == "linf" else (_bumps, _exchange)
    for query in range(queries):
        if query == 0:
            point = begin(rows, budget)
        else:
            if (query - 1) % _BLOCK == 0:
                _draw(rows, (query - 1) // _BLOCK, min(_BLOCK, queries - query))
            covered = share_of_window(query - 1, schedule or queries, share)
            length = side(covered, x.shape[2], x.shape[3], norm)
            point = change(rows, budget, length, rows.drawn[:, (query - 1) % _BLOCK])
        rows.point = _confine(rows, point, norm, radius)
        drawn = random.fold(rows.keys, "query", query) if keyed else rows.keys
        answer = estimator(model, rows.point, rows.y, objective, drawn, forward_only=True)
        if query == 0 and bool(answer.logits.isnan().any()):
            raise ModelError("the model gives NaN logits for valid images; check its weights")
        hit = success_share(answer.logits, rows.y, targeted)
        rows.record(hit, answer.loss.to(x.dtype))
        if trace is not None:
            trace(query, rows.point, answer.logits, answer.loss, rows.sample)
        if early and query + 1 < queries:
            finished.index_add_(0, rows.sample, (hit == 1).int())
            left = (finished[rows.sample] == 0).nonzero()[:, 0]
            if len(left) < len(rows.sample):
                result.write(rows)
                rows.keep(left)
            if len(left) == 0:
                break
    result.write(rows)
    return result.pick(restarts)


def _draw(rows: _Search, block: int, count: int) -> None:
    """Random words for the next `count` queries: four positions, a turn, a sign per channel."""
    number = torch.arange(count, device=rows.x.device)
    keys = random.fold(rows.keys, "windows", block, number)
    rows.drawn = random.words(keys, 5 + rows.x.shape[1])


def _below(words: Tensor, count: int) -> Tensor:
    """Words as integers in [0, count)."""
    return (words * count) >> 32


def _signs(words: Tensor, like: Tensor) -> Tensor:
    """Words (R, …) as signs."""
    return (_below(words, 2) * 2 - 1).to(like.dtype)


def _stripes(rows: _Search, eps: float) -> Tensor:
    """linf: vertical stripes of one value, ±eps."""
    channels, _, width = rows.x.shape[1:]
    words = random.words(random.fold(rows.keys, "stripes"), channels * width)
    return rows.x + eps * _signs(words, rows.x).view(-1, channels, 1, width)


def _window(rows: _Search, eps: float, length: int, words: Tensor) -> Tensor:
    """linf: one window at ±eps, a sign per channel."""
    height, width = rows.x.shape[2:]
    top, left = _below(words[:, 0], height - length + 1), _below(words[:, 1], width - length + 1)
    sign = _signs(words[:, 5:], rows.x)[:, :, None, None]
    return torch.where(inside(top, left, length, height, width), rows.x + eps * sign, rows.best)


def _scaled(rows: _Search, delta: Tensor, eps: float) -> Tensor:
    """`x` and a perturbation of l2 norm `eps`."""
    if rows.mask is not None:
        delta = delta * rows.mask
    size = _column(norm_of(delta, "l2"), delta).clamp_min(1e-12)
    return rows.x + delta * (eps / size)


def _bumps(rows: _Search, eps: float) -> Tensor:
    """l2: a grid of five by five bumps, each with a sign per channel."""
    channels, height, width = rows.x.shape[1:]
    length = max(1, min(height, width) // 5)
    down, across = height // length, width // length
    words = random.words(random.fold(rows.keys, "bumps"), (channels + 1) * down * across)
    words = words.view(-1, channels + 1, down, across)
    pattern = bump(length).to(rows.x)
    turned = (_below(words[:, :1], 2) > 0)[..., None, None]
    tile = torch.where(turned, pattern.T, pattern) * _signs(words[:, 1:], rows.x)[..., None, None]
    tiles = tile.permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)
    delta = torch.zeros_like(rows.x)
    top, left = (height - down * length) // 2, (width - across * length) // 2
    delta[:, :, top : top + down * length, left : left + across * length] = tiles
    return _scaled(rows, delta, eps)


def _exchange(rows: _Search, eps: float, length: int, words: Tensor) -> Tensor:
    """l2: a window gets a bump and the budget of another one, which is emptied."""
    channels, height, width = rows.x.shape[1:]
    most = (height - length + 1, width - length + 1)
    top, left, top2, left2 = (_below(words[:, i], most[i % 2]) for i in range(4))
    first = inside(top, left, length, height, width)
    second = inside(top2, left2, length, height, width)
    delta = rows.best - rows.x
    sign = _signs(words[:, 5:], delta)[:, :, None, None]
    pattern = bump(length).to(delta)
    new = place(pattern, _below(words[:, 4], 2) > 0, top, left, height, width) * sign
    own = delta * first
    new = new + own / _plane_norm(own).clamp_min(1e-12)
    if rows.mask is not None:
        new = new * rows.mask
    new = new / _plane_norm(new).clamp_min(1e-12)
    unspent = (eps**2 - _column(norm_of(delta, "l2"), delta).square()).clamp_min(0) / channels
    size = (unspent + _plane_norm(delta * (first | second)).square()).sqrt()
    return _scaled(rows, torch.where(first, new * size, delta.masked_fill(second, 0)), eps)


def _plane_norm(delta: Tensor) -> Tensor:
    """l2 norm of each channel, (R, C, 1, 1)."""
    return delta.square().sum((2, 3), keepdim=True).sqrt()
