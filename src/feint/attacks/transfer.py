"""Transfer attacks: momentum, diversity, translations and scales on one or several sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feint.attacks._ascent import EPS, Stop, Trace, ascend
from feint.attacks._minimal import check_count, check_number
from feint.core import random
from feint.core.errors import ConfigError, ModelError
from feint.core.gradients import (
    Estimate,
    GradientEstimator,
    Model,
    backprop,
    call,
    is_stochastic,
)
from feint.core.losses import Loss
from feint.core.registry import attack

__all__ = ["transfer"]

_NORMS = ("linf", "l2")
Fuse = Literal["logits", "probability"]


@attack(
    goal="budget",
    knowledge="gradient",
    norms=_NORMS,
    paper="Dong et al., 2018, arXiv:1710.06081",
    version=2,
    presets={
        "mi": {"diversity": 0.0, "kernel": 1, "scales": 1},
        "di": {"diversity": 0.5, "kernel": 1, "scales": 1},
        "ti": {"diversity": 0.0, "kernel": 15, "scales": 1},
        "si": {"diversity": 0.0, "kernel": 1, "scales": 5, "nesterov": True},
    },
)
def transfer(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    preset: str | None = None,
    sources: Sequence[Model] | None = None,
    fuse: Fuse = "logits",
    eps: float | None = None,
    norm: str = "linf",
    steps: int = 10,
    step_size: float | None = None,
    decay: float = 1.0,
    diversity: float = 0.5,
    resize: float = 0.1,
    kernel: int = 7,
    scales: int = 1,
    nesterov: bool = False,
    targeted: bool = False,
    loss: str | Loss = "cross_entropy",
    gradient: GradientEstimator | None = None,
    mask: Tensor | None = None,
    seed: int | Tensor = 0,
    stop: Stop | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """Iterated steps whose gradients are blurred so that the result fools models not seen.

    Momentum (MI) averages over the path and may look ahead (NI), input diversity (DI) over random
    reductions of the image, a kernel (TI) over translations, and scale copies (SI) over brightness;
    a gradient is taken on one source or on an ensemble.

    Convention:
        Images are float RGB, NCHW, in [0, 1]; `eps` and `step_size` are in the same units.

    Args:
        model: The source, if no `sources` are given: maps images in [0, 1] to logits (B, K); with
            `keys=` if it is stochastic.
        x: Images, (B, C, H, W), in [0, 1].
        y: True labels (B,), or targets if `targeted`.
        preset: `"mi"`, `"di"`, `"ti"` or `"si"` alone, with the constants of its paper; keywords
            that are given win over it. None by default: momentum, diversity and a small kernel.
        sources: Models to take gradients on, with the same classes. `model` is then not asked at
            all, so that it may be the target; loss and success are the ensemble's.
        fuse: What is averaged over the sources: `"logits"` (Dong et al.'s best) or
            `"probability"`.
        eps: Budget in image units; by default 8/255 (linf) or 0.5 (l2).
        norm: `"linf"` or `"l2"`.
        steps: Number of steps.
        step_size: Length of a step in `norm`; by default eps/steps.
        decay: Momentum's factor μ; 0 for none.
        diversity: Probability that a step sees a reduced, randomly placed copy of the image.
        resize: Largest reduction of a side, as a share of it (original: 29 of 299 pixels, 0.1).
        kernel: Odd side of the Gaussian that the gradient is convolved with; 1 for none.
        scales: Copies x/2⁰ … x/2^(scales − 1) that the gradient is averaged over.
        nesterov: Take the gradient where the momentum alone would lead (NI).
        targeted: Minimise the loss towards `y` instead.
        loss: `"cross_entropy"`, `"margin"`, `"dlr"`, or a function to maximise.
        gradient: Estimator; by default `backprop`. `eot(30)` for stochastic models.
        mask: Pixels that may change, bool (B or 1, 1 or C, H, W).
        seed: Integer, or one key per sample from `feint.core.random.keys`.
        stop: `"success"` drops a sample once it fools the source, which transfers less well;
            `"never"` takes every step. By default `"success"` for a deterministic model.
        trace: Called as `trace(step, x_adv, logits, loss, active)` at every evaluated point.

    Returns:
        x_adv: Like `x`, in [0, 1], within `eps` measured in float64: the point with the most
        adversarial draws on the sources, then of the highest loss there.

    Raises:
        ConfigError, RangeError, ShapeError, DtypeError, DeviceError: On bad arguments.
        GradientError: If no gradient reaches the input, or one that is not finite.
        ModelError: If the logits are NaN or have the wrong shape.

    Cost:
        Per sample and source `steps`·`scales` forward and backward passes and 1 forward pass;
        `steps` forward passes more for diversity, and for Nesterov's step: the point itself is
        evaluated, too.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
        >>> x, y = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
        >>> bool(((transfer(model, x, y, eps=0.1) - x).abs() <= 0.1).all())
        True

    References:
        MI: Dong, Liao, Pang, Su, Zhu, Hu, Li, CVPR 2018. DI: Xie, Zhang, Zhou, Bai, Wang, Ren,
        Yuille, CVPR 2019. TI: Dong, Pang, Su, Zhu, CVPR 2019. SI and NI: Lin, Song, He, Wang,
        Hopcroft, ICLR 2020, §3.

    Deviations:
        The best evaluated point is returned, not the last. DI reduces the image and places it on
        black inside the same size; the original enlarges to 330 and pads, for networks that take
        any size. The kernel's standard deviation is (side − 1)/6, so that it spans ±3.
    """
    budget = EPS.get(norm, 0.0) if eps is None else eps
    if step_size is None:
        step_size = budget / max(1, steps)
    check_number("decay", decay)
    check_number("diversity", diversity, high=1.0)
    check_number("resize", resize, high=0.9)
    check_count("scales", scales)
    check_count("kernel", kernel)
    if kernel % 2 == 0:
        raise ConfigError(f"kernel is {kernel}; expected an odd side")
    source = model if sources is None else _source(sources, fuse)
    base = gradient or backprop
    plain = diversity == 0 and kernel == 1 and scales == 1
    return ascend(
        source,
        x,
        y,
        eps=budget,
        norm=norm,
        norms=_NORMS,
        steps=steps,
        step_size=step_size,
        targeted=targeted,
        loss=loss,
        gradient=base if plain else _blurred(base, diversity, resize, kernel, scales),
        mask=mask,
        seed=seed,
        stop=stop,
        trace=trace,
        decay=decay,
        lookahead=nesterov,
    )


# --- ensemble -------------------------------------------------------------------------------------


class _Ensemble(nn.Module):
    """The mean of several models' logits, or the log of their mean probability."""

    def __init__(self, models: Sequence[Model], fuse: Fuse) -> None:
        super().__init__()
        self.parts, self.fuse = list(models), fuse
        self.stochastic = any(is_stochastic(m) for m in models)
        modules = {f"source {i}": m for i, m in enumerate(models) if isinstance(m, nn.Module)}
        self.sources = nn.ModuleDict(modules)  # for the error that names a module
        self.training = False

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        logits = []
        for i, part in enumerate(self.parts):
            logits.append(call(part, x, None if keys is None else random.fold(keys, "source", i)))
            if logits[i].shape != logits[0].shape:
                raise ModelError(
                    f"source {i} gives {logits[i].shape[1]} classes, the first one "
                    f"{logits[0].shape[1]}; an ensemble needs the same classes"
                )
        stacked = torch.stack(logits)
        if self.fuse == "logits":
            return stacked.mean(0)
        return stacked.log_softmax(-1).logsumexp(0)


def _source(sources: Sequence[Model], fuse: Fuse) -> Model:
    if fuse not in ("logits", "probability"):
        raise ConfigError(f"fuse is {fuse!r}; expected 'logits' or 'probability'")
    if not isinstance(sources, Sequence) or not sources or not all(map(callable, sources)):
        raise ConfigError("sources is no list of models; expected at least one, or leave it out")
    return sources[0] if len(sources) == 1 else _Ensemble(sources, fuse)


# --- gradients that transfer ----------------------------------------------------------------------


def _blurred(
    base: GradientEstimator, diversity: float, resize: float, kernel: int, scales: int
) -> GradientEstimator:
    """`base`, averaged over transformed copies of the image that are folded into the batch."""
    taps = _gaussian(kernel)

    def estimate(
        model: Model, x: Tensor, y: Tensor, loss: Loss, keys: Tensor, *, forward_only: bool = False
    ) -> Estimate:
        if forward_only:
            return base(model, x, y, loss, keys, forward_only=True)
        seen = _Diverse(model, diversity, resize) if diversity else model
        factor = 0.5 ** torch.arange(scales, device=x.device).to(x.dtype).view(-1, 1, 1, 1)
        wide = base(
            seen,
            (x[:, None] * factor).flatten(0, 1),
            y.repeat_interleave(scales, 0),
            loss,
            keys.repeat_interleave(scales, 0),
        )
        slope = (wide.gradient.unflatten(0, (-1, scales)) * factor).mean(1)
        if kernel > 1:
            each = taps.to(x).expand(x.shape[1], 1, kernel, kernel)
            slope = F.conv2d(slope, each, padding=kernel // 2, groups=x.shape[1])
        if diversity:
            own = base(model, x, y, loss, keys, forward_only=True)
            return Estimate(own.logits, slope, own.loss)
        # The first of the copies is the image itself.
        return Estimate(wide.logits[::scales], slope, wide.loss[::scales])

    estimate.scores_only = getattr(base, "scores_only", False)  # type: ignore[attr-defined]
    return estimate


class _Diverse(nn.Module):
    """A model behind a keyed reduction of the image, placed at random on black."""

    stochastic = True

    def __init__(self, model: Model, probability: float, resize: float) -> None:
        super().__init__()
        self.model, self.probability, self.resize = model, probability, resize

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        drawn = random.uniform(random.fold(keys, "diversity"), (4,), dtype=torch.float64)
        whole = drawn[:, 0] >= self.probability
        rows = self._matrix(x.shape[2], whole, drawn[:, 1], drawn[:, 2]).to(x.dtype)
        columns = self._matrix(x.shape[3], whole, drawn[:, 1], drawn[:, 3]).to(x.dtype)
        seen = rows[:, None] @ x @ columns[:, None].transpose(-1, -2)
        return call(self.model, seen, keys)

    def _matrix(self, n: int, whole: Tensor, size: Tensor, place: Tensor) -> Tensor:
        """Bilinear reduction along one axis, (B, n, n), from sizes and places in [0, 1)."""
        least = max(1, round(n * (1 - self.resize)))
        side = torch.where(whole, n, least + (size * (n - least + 1)).floor())
        start = (place * (n - side + 1)).floor()
        i = torch.arange(n, dtype=torch.float64, device=size.device)
        own = i - start[:, None]
        at = ((own + 0.5) * (n / side)[:, None] - 0.5).clamp(0, n - 1)
        inside = (own >= 0) & (own < side[:, None])
        return (1 - (at[:, :, None] - i).abs()).clamp_min(0) * inside[:, :, None]


def _gaussian(side: int) -> Tensor:
    """Normalised Gaussian taps, (1, 1, side, side) float64, that span three deviations."""
    line = torch.linspace(-3, 3, side, dtype=torch.float64) if side > 1 else torch.zeros(1)
    taps = torch.exp(-line.square() / 2)
    flat = torch.outer(taps, taps)
    return (flat / flat.sum())[None, None]
