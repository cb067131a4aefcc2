"""SPSA: gradient ascent on slopes that are measured from scores alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from feint.attacks._ascent import EPS, Stop, Trace, _check_walk
from feint.attacks._best import CHUNK, Best
from feint.attacks._minimal import Rows
from feint.core import gradients
from feint.core.errors import ConfigError
from feint.core.gradients import Model
from feint.core.losses import Loss
from feint.core.norms import steepest_ascent
from feint.core.registry import attack

__all__ = ["spsa"]

_NORMS = ("linf", "l2")
_BETAS = (0.9, 0.999)
_ESTIMATORS = {"spsa": gradients.spsa, "nes": gradients.nes}


@dataclass
class _State(Rows):
    rows: Tensor
    point: Tensor
    first: Tensor
    second: Tensor


@attack(
    goal="budget",
    knowledge="score",
    norms=_NORMS,
    paper="Uesato et al., 2018, arXiv:1802.05666",
    version=2,
    presets={
        # Ilyas et al. 2018: Gaussian directions, 50 pairs, momentum-free sign steps.
        "nes": {"estimator": "nes", "samples": 50, "sigma": 0.001, "optimizer": "steepest"},
    },
)
def spsa(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    preset: str | None = None,
    eps: float | None = None,
    norm: str = "linf",
    steps: int = 100,
    step_size: float | None = None,
    samples: int = 128,
    sigma: float = 0.01,
    estimator: Literal["spsa", "nes"] = "spsa",
    optimizer: Literal["adam", "steepest"] = "adam",
    targeted: bool = False,
    loss: str | Loss = "margin",
    mask: Tensor | None = None,
    seed: int | Tensor = 0,
    stop: Stop | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """Projected Adam on gradients estimated by simultaneous perturbation; needs scores alone.

    It gets through roundings, dead gradients and random parts, which is why Uesato et al. use it to
    tell a robust model from one that hides its gradient.

    Convention:
        Images are float RGB, NCHW, in [0, 1]; `eps`, `step_size` and `sigma` are in the same units.

    Args:
        model: Maps images in [0, 1] to logits (B, K); with `keys=` if it is stochastic.
        x: Images, (B, C, H, W), in [0, 1].
        y: True labels (B,), or targets if `targeted`.
        preset: `"nes"` (Ilyas et al. 2018: Gaussian directions, no momentum); keywords that are
            given win over it. None by default: Uesato et al.
        eps: Budget in image units; by default 8/255 (linf) or 0.5 (l2).
        norm: `"linf"` or `"l2"`.
        steps: Number of steps.
        step_size: Length of a step in `norm`; by default 0.01 for linf, 2.5·eps/steps for l2.
        samples: Pairs of evaluations per step.
        sigma: Half the distance of a pair's two images (`"nes"`: its standard deviation).
        estimator: `"spsa"` perturbs by random signs, `"nes"` by Gaussian noise.
        optimizer: `"adam"`, or `"steepest"`: the sign (linf) or the normalised gradient (l2).
        targeted: Seek the class `y` instead of any other.
        loss: `"margin"` (Uesato et al.), `"cross_entropy"`, `"dlr"`, or a function to maximise.
        mask: Pixels that may change, bool (B or 1, 1 or C, H, W). The probes change all pixels.
        seed: Integer, or one key per sample from `feint.core.random.keys`.
        stop: `"success"` drops a sample once adversarial, `"never"` takes every step; by default
            `"success"` for a deterministic model.
        trace: Called as `trace(step, x_adv, logits, loss, active)` at every point of the ascent;
            the estimator's probes, which may leave the ball and the box by `sigma`, are not shown.

    Returns:
        x_adv: Like `x`, in [0, 1], within `eps` measured in float64: the best point of the ascent.

    Raises:
        ConfigError, RangeError, ShapeError, DtypeError, DeviceError: On bad arguments.
        ModelError: If the logits are NaN or have the wrong shape.

    Cost:
        Per sample steps·(1 + 2·samples) + 1 forward passes, fewer if it stops early.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> x, y = torch.rand(2, 3, 2, 2), torch.tensor([0, 1])
        >>> bool(((spsa(model, x, y, eps=0.1, steps=3) - x).abs() <= 0.1).all())
        True

    References:
        Uesato, O'Donoghue, van den Oord, Kohli, "Adversarial risk and the dangers of evaluating
        against weak attacks", ICML 2018, Algorithm 1. Ilyas, Engstrom, Athalye, Lin, "Black-box
        adversarial attacks with limited queries and information", ICML 2018, §2.

    Deviations:
        The best evaluated point is returned, not the last. l2 is added: its direction is Adam's
        running mean, without the scaling by value, which would settle away from the steepest one.
        Uesato et al. draw up to 8192 directions a step.
    """
    if estimator not in _ESTIMATORS:
        raise ConfigError(f"estimator is {estimator!r}; expected 'spsa' or 'nes'")
    if optimizer not in ("adam", "steepest"):
        raise ConfigError(f"optimizer is {optimizer!r}; expected 'adam' or 'steepest'")
    budget = EPS.get(norm, 0.0) if eps is None else eps
    if step_size is None:
        step_size = 0.01 if norm == "linf" else 2.5 * budget / max(1, steps)
    gradient = _ESTIMATORS[estimator](samples, sigma, CHUNK)
    best = Best(
        model,
        x,
        y,
        eps=budget,
        norm=norm,
        norms=_NORMS,
        targeted=targeted,
        loss=loss,
        mask=mask,
        seed=seed,
        stop=stop,
        trace=trace,
        gradient=gradient,
    )
    _check_walk(norm, steps, step_size, False, 1, "sign")
    if len(x) == 0:
        return x.clone()
    zero = torch.zeros_like(best.x)
    state = _State(best.everyone, best.x, zero, zero)
    for step in range(steps + 1):
        slope = best.ask(state.point, state.rows, step, forward_only=step == steps)
        if step == steps:
            break
        if best.early:
            left = best.standing(state.rows)
            if len(left) == 0:
                break
            if len(left) < len(state.rows):
                state.keep(left)
                slope = slope[left]
        unit = _adam(state, slope, step, norm) if optimizer == "adam" else None
        if unit is None:
            unit = steepest_ascent(slope, norm)
        state.point = best.confine(state.point.add(unit, alpha=step_size), state.rows)
    return best.result()


def _adam(state: _State, slope: Tensor, step: int, norm: str) -> Tensor:
    """Adam's direction, at most 1 in each value (linf) or of unit length (l2)."""
    a, b = _BETAS
    state.first = a * state.first + (1 - a) * slope
    if norm == "l2":
        return steepest_ascent(state.first, "l2")
    state.second = b * state.second + (1 - b) * slope.square()
    mean, square = state.first / (1 - a ** (step + 1)), state.second / (1 - b ** (step + 1))
    unit = mean / square.sqrt().clamp_min(torch.finfo(slope.dtype).tiny)
    return unit.clamp(-1, 1)
