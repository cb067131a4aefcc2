"""Judge kept examples again: are they what they claim to be, and do the stored outcomes hold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from feint.core import random
from feint.core.gradients import call, is_stochastic
from feint.core.quantise import quantise
from feint.evaluation.attackers import Attacked
from feint.evaluation.cell import Cell
from feint.evaluation.judge import VOTES, judge
from feint.evaluation.shard import Batch, Rows, Subject, judge_shard

__all__ = ["TOLERANCE", "Fresh", "Rejudged", "compare_fresh", "fresh_draws", "rejudge"]

TOLERANCE = 1e-4
"""Two logits that differ by less, as a share of the largest, may change places on another machine:
the last bits of a convolution depend on the back end."""
_SLACK = 1e-6
"""Share by which a float32 perturbation measured in float64 may exceed its budget."""
_GIVEN = ("index", "label", "target", "draws")
_MEASURED = ("size", "size_8bit", "outside", "rms", "abs_l2", "relative_l2", "linf", "unchanged")
_TRACED = ("first_hit", "late_gain", "rounds", "queries", "gradients")
_ON_FLOATS = ("correct", "target_hits")
_ON_BYTES = ("correct_8bit", "correct_png")
_DERIVED = ("correct_even", "correct_odd", "prediction", *(f"vote_{n}" for n in VOTES))
_SHOWN = 3
"""Samples that a sentence names."""


@dataclass(frozen=True)
class Rejudged:
    """A shard that was judged again.

    Attributes:
        rows: What the judge says now.
        flipped: (N,) bool: samples with another outcome than the stored one.
        gaps: (N,) the smallest gap between the two largest logits of a draw, as a share of the
            largest logit; NaN for samples whose outcome is the stored one.
        explained: (N,) bool: flipped samples whose logits are so near a tie on as many draws that
            the last bit can have decided them.
        problems: Sentences about what cannot be explained so: examples outside of their budget or
            of [0, 1], other samples, distances that are not those of the examples.
    """

    rows: Rows
    flipped: NDArray[np.bool_]
    gaps: NDArray[np.float64]
    explained: NDArray[np.bool_]
    problems: tuple[str, ...]


def rejudge(
    cell: Cell,
    subject: Subject,
    batch: Batch,
    found: Attacked,
    stored: Rows,
    *,
    batch_size: int = 128,
    tolerance: float = TOLERANCE,
) -> Rejudged:
    """Judge a shard's kept examples again, on the very draws of the first time, and compare.

    Convention:
        The judge's draws hang on the cell's seed and the samples' indices, so that on the same
        machine every outcome is the stored one. Elsewhere logits differ in their last bits, and an
        outcome may flip where two of them are nearly equal: such a flip is counted and explained,
        any other is a disagreement.

    Args:
        cell: The cell.
        subject: Its objects, as loaded here.
        batch: The shard's clean samples, as read here.
        found: The kept examples.
        stored: The kept rows.
        batch_size: Images per forward pass.
        tolerance: Gap of the two largest logits, as a share of the largest, up to which a flip is
            explained.

    Cost: as `judge_shard`; for flipped samples the judge's draws twice more.
    """
    device = batch.x.device
    x_adv = found.x_adv.to(device)
    rows = judge_shard(cell, subject, batch, found, batch_size)
    problems = [*_facts(stored, rows), *_kept(cell, stored, rows, found, batch)]
    # Columns of a later version than the run's are NaN throughout.
    columns = [
        name
        for name in (*_ON_FLOATS, *_ON_BYTES, *_DERIVED)
        if not np.isnan(stored[name].astype(float)).all()
    ]
    flipped = np.any([_unlike(stored[name], rows[name]) for name in columns], axis=0)
    explained = np.zeros_like(flipped)
    gaps = np.full(len(flipped), np.nan)
    places = np.flatnonzero(flipped)
    if len(places):
        pick = torch.from_numpy(places).to(device)
        pipeline, keys = subject.judged(cell), random.keys(cell.seed, batch.index[pick])
        on_floats = _gaps(pipeline, x_adv[pick], keys, cell.judge_draws, batch_size)
        on_bytes = _gaps(pipeline, quantise(x_adv[pick]), keys, cell.judge_draws, batch_size)
        gaps[places] = np.minimum(on_floats.min(1), on_bytes.min(1))
        ties, ties_8bit = (on_floats <= tolerance).sum(1), (on_bytes <= tolerance).sum(1)
        enough = np.ones(len(places), dtype=bool)
        for name in columns:
            then, now = stored[name][places].astype(float), rows[name][places].astype(float)
            if name in _DERIVED:
                enough &= (ties > 0) | ~_unlike(then, now)
            else:
                enough &= np.abs(then - now) <= (ties_8bit if name in _ON_BYTES else ties)
        explained[places] = enough
    return Rejudged(rows, flipped, gaps, explained, tuple(problems))


@dataclass(frozen=True)
class Fresh:
    """A cell on draws that nobody has used: how far from the stored share, in standard errors."""

    shares: NDArray[np.float64]
    """(N,) share of the fresh draws on which the pipeline was right."""
    z: float
    """Difference of the two means over its standard error; 0 if nothing is random."""

    @property
    def agrees(self) -> bool:
        """Whether chance alone can have made the difference: below four standard errors."""
        return abs(self.z) < 4


def fresh_draws(
    cell: Cell, subject: Subject, batch: Batch, found: Attacked, *, batch_size: int = 128
) -> NDArray[np.float64]:
    """(N,) share right on fresh draws, which neither the attack nor the first judgement used.

    Cost: `judge_draws` forward passes per sample, or one if nothing is random.
    """
    keys = random.keys(cell.seed, batch.index)
    again = judge(
        subject.judged(cell),
        found.x_adv.to(batch.x.device),
        batch.y,
        keys,
        draws=cell.judge_draws,
        batch_size=batch_size,
        purpose="verify",
    )
    return cast("NDArray[np.float64]", (again.correct.double() / again.draws).numpy())


def compare_fresh(stored: Rows, shares: NDArray[np.float64]) -> Fresh:
    """Set fresh shares beside the stored ones.

    The variance of a sample's difference is that of two binomial shares of one probability, which
    both estimate, with a success and a failure added to each so that it is never zero.
    """
    draws = stored["draws"].astype(float)
    if (draws <= 1).all():
        same = float((stored["correct"] / draws - shares).sum())
        return Fresh(shares, math.copysign(math.inf, same) if same else 0.0)
    right = stored["correct"] + shares * draws
    p = (right + 2) / (2 * draws + 4)
    variance = (2 * p * (1 - p) / draws).sum()
    return Fresh(shares, float((shares - stored["correct"] / draws).sum() / math.sqrt(variance)))


@torch.no_grad()
def _gaps(
    pipeline: nn.Module, x: Tensor, keys: Tensor, draws: int, batch_size: int
) -> NDArray[np.float64]:
    """(N, D) gaps between the two largest logits over the largest |logit|, on the judge's draws."""
    wide = keys[:, None]
    if is_stochastic(pipeline):
        wide = random.fold(keys, "judge", 0, torch.arange(draws, device=x.device))
    rows = torch.arange(len(x), device=x.device).repeat_interleave(wide.shape[1])
    flat, parts = wide.flatten(), []
    for start in range(0, len(flat), batch_size):
        pick = slice(start, start + batch_size)
        logits = call(pipeline, x[rows[pick]], flat[pick]).double()
        two = logits.topk(min(2, logits.shape[1]), 1).values
        scale = logits.abs().amax(1).clamp_min(1e-300)
        parts.append(((two[:, 0] - two[:, -1]) / scale).cpu())
    return cast("NDArray[np.float64]", torch.cat(parts).view(len(x), -1).numpy())


def _unlike(a: NDArray[np.float64], b: NDArray[np.float64], close: float = 0.0) -> np.ndarray:
    """Where two columns differ; NaN equals NaN."""
    first, second = a.astype(float), b.astype(float)
    return ~np.isclose(first, second, rtol=close, atol=close, equal_nan=True)


def _facts(stored: Rows, rows: Rows) -> list[str]:
    """What the rows say of samples and examples, against the samples and examples themselves."""
    sentences = []
    for names, close, what in (
        (_GIVEN, 0.0, "the samples, the targets or the judge's draws are others"),
        (_MEASURED, 1e-6, "the rows are not those of these examples"),
        (_TRACED, 0.0, "the rows are not those of these examples"),
    ):
        for name in names:
            places = np.flatnonzero(_unlike(stored[name], rows[name], close))
            if len(places):
                then, now = stored[name][places[0]], rows[name][places[0]]
                sentences.append(
                    f"{_samples(stored, places)}: {name} is {_number(then)} in the rows and "
                    f"{_number(now)} here: {what}"
                )
    return sentences


def _kept(cell: Cell, stored: Rows, rows: Rows, found: Attacked, batch: Batch) -> list[str]:
    """Whether the examples keep to the threat model."""
    sentences = []
    finite = np.asarray(torch.isfinite(found.x_adv).flatten(1).all(1).cpu())
    if not finite.all():
        sentences.append(f"{_samples(stored, np.flatnonzero(~finite))}: the image is not finite")
    outside = np.flatnonzero(rows["outside"] > 0)
    if len(outside):
        most = float(rows["outside"].max())
        sentences.append(f"{_samples(stored, outside)}: the image leaves [0, 1] by {most:.3g}")
    if cell.attack == "none":
        other = np.flatnonzero(~rows["unchanged"].astype(bool))
        if len(other):
            sentences.append(f"{_samples(stored, other)}: not the clean image")
        return sentences
    over = np.flatnonzero(rows["size"] > cell.eps * (1 + _SLACK))
    if len(over):
        most = float(rows["size"].max())
        sentences.append(
            f"{_samples(stored, over)}: the perturbation is {most:.8g} in {cell.norm}, more than "
            f"eps {cell.eps:.8g}"
        )
    return sentences


def _number(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _samples(rows: Rows, places: NDArray[np.intp]) -> str:
    shown = ", ".join(str(int(rows["index"][p])) for p in places[:_SHOWN])
    more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    return f"{'sample' if len(places) == 1 else 'samples'} {shown}{more}"
