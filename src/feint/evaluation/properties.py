"""The four properties that S1 asks of a preprocessing defense, measured."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from torch import Tensor, nn

from feint.core import random
from feint.core.checks import check_images, check_labels
from feint.core.errors import RangeError, ShapeError
from feint.core.gradients import call
from feint.core.similarity import ssim
from feint.defenses.base import Defense, Params, choose_rules
from feint.defenses.chain import Chain
from feint.evaluation.metrics import Rate, distances, rate

__all__ = ["Mean", "Properties", "mean", "measure", "properties", "summarise"]

SMALL, BUDGET = 1 / 255, 8 / 255
"""Sizes of the changes by which derivatives are tried out: what 8 bits show, what attacks use."""
_FINE = 1e-6
"""Distance over which a smooth stand-in is differentiated, in float64."""

Rows = dict[str, NDArray[np.float64]]
"""Per-sample facts, each (N,); NaN where a sample was not probed."""


@dataclass(frozen=True)
class Mean:
    """A mean over samples with its 95 % interval (Student's t)."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class Properties:
    """What was measured; the numbers are those of S1 §IV."""

    defense: str
    n: int
    draws: int
    model_draws: int
    clean: Rate
    """Accuracy of the classifier alone."""
    accuracy: Rate
    """Property 1: accuracy behind the defense, over `model_draws` draws per image."""
    agreement: Rate
    """Property 1 as it is written, f(g(x)) = f(x): share of predictions that stay."""
    rms: Mean
    """Property 2: √mean (g(x) − x)², over `draws` draws per image."""
    ssim: Mean
    """Property 2: structural similarity of g(x) and x."""
    spread: Mean
    """Property 3: √mean over the pixels of the variance over draws; 0 without randomness."""
    gradient: Mean
    """Property 4: the share of a change by 1/255 that autograd foretells; 0 if it says nothing."""
    fidelity: dict[str, Mean]
    """Property 4, seen by an attacker: for each backward rule, the cosine between the change that
    it foretells and the one that happens when x changes by 8/255. 1: nothing is hidden from him."""

    @property
    def differentiable(self) -> bool:
        """Whether autograd foretells at least half of what happens."""
        return self.gradient.value > 0.5

    @property
    def stochastic(self) -> bool:
        """Whether draws differ."""
        return self.spread.value > 0

    def as_dict(self) -> dict[str, object]:
        """Plain data."""
        found = asdict(self)
        return {**found, "differentiable": self.differentiable, "stochastic": self.stochastic}


def mean(values: ArrayLike) -> Mean:
    """Mean of per-sample values with a 95 % interval; NaN is left out.

    Raises:
        RangeError: If no value is left.
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    if not len(known):
        raise RangeError("a mean of no values; expected at least one sample")
    centre = float(known.mean())
    if len(known) == 1:
        return Mean(centre, float("-inf"), float("inf"), 1)
    half = float(stats.t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / len(known) ** 0.5)
    return Mean(centre, centre - half, centre + half, len(known))


def properties(
    defense: Defense,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    draws: int = 8,
    model_draws: int = 1,
    probed: int = 16,
    seed: int = 0,
    index: Tensor | None = None,
    batch_size: int = 16,
) -> Properties:
    """Measure the four properties of S1 §IV for any defense, on any model and images.

    1. It keeps the classifier's predictions: accuracy and agreement.
    2. It moves images far: rms and SSIM between g(x) and x.
    3. It is random: the spread of g(x) over draws.
    4. It has no derivative: whether autograd foretells the change of g(x) that a change of x by
       ±1/255 (a random sign for each value) makes, and how well each declared backward rule
       foretells that of ±8/255, which is what counts.

    Args:
        defense: g. One that needs its classifier gets `model`.
        model: f: maps images in [0, 1] to logits.
        x: Images, (N, C, H, W), with sides of at least 7 pixels (SSIM's window).
        y: True labels, (N,).
        draws: Draws per image for distances and spread, at least 2.
        model_draws: How many of them the classifier sees; S1's tables are made with one.
        probed: On how many images, the first ones, derivatives are tried out.
        seed: Seed of every draw.
        index: Indices of the samples in their data set, (N,); by default 0 … N−1.
        batch_size: Images per forward pass.

    Returns:
        Means and rates with 95 % intervals over the images.

    Raises:
        RangeError: If a count is out of range, or there are no images.
        ShapeError: If the images are too small for SSIM, or the defense changes their shape.

    Cost: N·(1 + `model_draws`) forward passes of the model, N·`draws` of the defense, and for each
        probed image three passes of every stand-in in float64.

    Example:
        >>> from feint.defenses import parse
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).eval()
        >>> x = torch.rand(4, 3, 8, 8)
        >>> found = properties(parse("pixel_shift"), model, x, model(x).argmax(1))
        >>> found.clean.value, found.differentiable, found.stochastic
        (1.0, True, False)

    References:
        Qiu, Zeng, Zheng, Gong, Zhang, Qiu, "Mitigating advanced adversarial attacks with more
        advanced gradient obfuscation techniques", arXiv 2005.13712, §IV and Table I.

    Deviations:
        S1 measures properties 1 and 2 and asserts 3 and 4. Property 2 is meant to make the identity
        a bad stand-in; a defense that merely translates the image has it, and `fidelity` shows
        that undoing the translation restores everything.
    """
    rows = measure(
        defense,
        model,
        x,
        y,
        draws=draws,
        model_draws=model_draws,
        probed=probed,
        seed=seed,
        index=index,
        batch_size=batch_size,
    )
    return summarise([rows], str(defense), draws=draws, model_draws=model_draws)


def summarise(
    parts: Sequence[Mapping[str, ArrayLike]], defense: str, *, draws: int = 8, model_draws: int = 1
) -> Properties:
    """Properties from the rows of one or more calls of `measure`.

    Args:
        parts: Rows, in any order.
        defense: The defense's expression, for the record.
        draws: As given to `measure`.
        model_draws: As given to `measure`.
    """
    rows = {k: np.concatenate([np.asarray(p[k], np.float64) for p in parts]) for k in parts[0]}
    rules = [k.removeprefix("fidelity ") for k in rows if k.startswith("fidelity ")]
    return Properties(
        defense=defense,
        n=len(rows["clean"]),
        draws=draws,
        model_draws=model_draws,
        clean=rate(rows["clean"]),
        accuracy=rate(rows["accuracy"], model_draws),
        agreement=rate(rows["agreement"], model_draws),
        rms=mean(rows["rms"]),
        ssim=mean(rows["ssim"]),
        spread=mean(rows["spread"]),
        gradient=mean(rows["gradient"]),
        fidelity={rule: mean(rows[f"fidelity {rule}"]) for rule in rules},
    )


def measure(
    defense: Defense,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    draws: int = 8,
    model_draws: int = 1,
    probed: int = 16,
    seed: int = 0,
    index: Tensor | None = None,
    batch_size: int = 16,
) -> Rows:
    """Per-sample facts behind `properties`, so that a long measurement can be made in pieces.

    Args:
        defense: As for `properties`.
        model: As for `properties`.
        x: As for `properties`.
        y: As for `properties`.
        draws: As for `properties`.
        model_draws: As for `properties`.
        probed: Samples whose index is below this number are probed.
        seed: As for `properties`.
        index: As for `properties`.
        batch_size: As for `properties`.

    Returns:
        Arrays (N,): `clean`, `accuracy`, `agreement`, `rms`, `ssim`, `spread`, `gradient`, and
        `fidelity RULE` for each backward rule.
    """
    check_images(x)
    check_labels(y, len(x))
    if len(x) == 0:
        raise RangeError("there are no images to measure on; expected at least one")
    if draws < 2 or not 1 <= model_draws <= draws or probed < 1 or batch_size < 1:
        raise RangeError(
            f"draws, model_draws, probed, batch_size are {draws}, {model_draws}, {probed}, "
            f"{batch_size}; expected draws ≥ 2, 1 ≤ model_draws ≤ draws, the others ≥ 1"
        )
    index = torch.arange(len(x), device=x.device) if index is None else index
    defense = defense.bind(model)
    parts = []
    for rows in torch.arange(len(x), device=x.device).split(batch_size):
        keys = random.keys(seed, index[rows])
        part = _images(defense, model, x[rows], y[rows], keys, draws, model_draws)
        wanted = index[rows] < probed
        for name, values in _derivatives(defense, x[rows][wanted], keys[wanted]).items():
            part[name] = torch.full_like(part["rms"], torch.nan).masked_scatter(wanted, values)
        parts.append(part)
    return {k: np.concatenate([p[k].double().cpu().numpy() for p in parts]) for k in parts[0]}


@torch.no_grad()
def _images(
    defense: Defense,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    keys: Tensor,
    draws: int,
    model_draws: int,
) -> dict[str, Tensor]:
    """Properties 1 to 3 of a batch. Draw by draw: all of them at once need too much memory."""
    before = call(model, x, random.fold(keys, "model")).argmax(1)
    totals = {n: torch.zeros(len(x), dtype=torch.float64, device=x.device) for n in _TOTALS}
    first, sums = None, torch.zeros_like(x, dtype=torch.float64)
    squares = torch.zeros_like(sums)
    count = draws if defense.stochastic else 2  # two, in case it is random all the same
    judged = model_draws if defense.stochastic else 1
    for d in range(count):
        own = random.fold(keys, "property", draw=d)
        out = defense(x, random.fold(own, "defense"))
        if out.shape != x.shape:
            raise ShapeError(
                f"{defense} turned images of {tuple(x.shape)} into {tuple(out.shape)}; expected "
                "the same shape, or there is no distance between them"
            )
        if d < judged:
            guess = call(model, out, random.fold(own, "model")).argmax(1)
            totals["accuracy"] += (guess == y) / judged
            totals["agreement"] += (guess == before) / judged
        totals["rms"] += torch.as_tensor(distances(out, x)["rms"]).to(x.device) / count
        totals["ssim"] += ssim(out, x) / count
        first = out if first is None else first
        change = out.double() - first.double()
        sums += change
        squares += change.square()
    variance = (squares - sums.square() / count).clamp_min(0) / (count - 1)
    spread = variance.flatten(1).mean(1).sqrt()
    return {"clean": (before == y).double(), **totals, "spread": spread}


_TOTALS = ("accuracy", "agreement", "rms", "ssim")


def _derivatives(defense: Defense, x: Tensor, keys: Tensor) -> dict[str, Tensor]:
    """Property 4 of a batch: what autograd and every backward rule foretell of a small change.

    In float64 and a little inside of [0, 1], so that neither rounding nor clipping disturbs.
    """
    double = copy.deepcopy(defense).double()
    x = 0.05 + 0.9 * x.double()
    params = double.sample(x, random.fold(keys, "probe draw"))
    sign = 2.0 * random.integers(random.fold(keys, "probe"), 0, 2, x.shape[1:]) - 1
    with torch.no_grad():
        here = double.replay(x, params)
        little = double.replay(x + SMALL * sign, params) - here
        much = double.replay(x + BUDGET * sign, params) - here
    found = {"gradient": _foretold(double, x, params, SMALL * sign, little)}
    parts = double.members if isinstance(double, Chain) else [double]
    for rule in double.backward_rules():
        with torch.no_grad():
            pushed = _pushed(double, choose_rules(parts, rule), x, params, sign)
            found[f"fidelity {rule}"] = _cosine(pushed, much)
    return found


def _pushed(
    defense: Defense, rules: Sequence[str], x: Tensor, params: Params, direction: Tensor
) -> Tensor:
    """Derivative of the rules' stand-ins along a direction, part by part; one rule for each."""
    if isinstance(defense, Chain):
        for part, own, name in zip(defense.members, defense.split(params), rules, strict=True):
            direction = _pushed(part, [name], x, own, direction)
            x = part.replay(x, own)
        return direction
    stand_in = defense.stand_in(rules[0])
    with defense.precision(x):
        up, down = (stand_in(x + s * _FINE * direction, params) for s in (1, -1))
    return (up - down) / (2 * _FINE)


def _foretold(defense: Defense, x: Tensor, params: Params, step: Tensor, there: Tensor) -> Tensor:
    """⟨J·step, change⟩ / ⟨change, change⟩ by autograd; 0 where no gradient comes."""
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        out = defense.replay(leaf, params)
    gradient = None
    if out.requires_grad and len(x):
        (gradient,) = torch.autograd.grad((out * there).sum(), leaf, allow_unused=True)
    if gradient is None:
        return torch.zeros(len(x), dtype=torch.float64, device=x.device)
    size = there.square().flatten(1).sum(1)
    inner = (gradient * step).flatten(1).sum(1)
    return torch.where(size > 0, inner / size.clamp_min(1e-300), 0.0)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine per sample; 0 where nothing changes."""
    inner = (a * b).flatten(1).sum(1)
    size = a.flatten(1).norm(dim=1) * b.flatten(1).norm(dim=1)
    return torch.where(size > 0, inner / size.clamp_min(1e-300), 0.0)
