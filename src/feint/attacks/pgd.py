"""Projected gradient descent (PGD)."""

from __future__ import annotations

from torch import Tensor

from feint.attacks._ascent import EPS, Direction, Stop, Trace, ascend
from feint.core.gradients import GradientEstimator, Model
from feint.core.losses import Loss
from feint.core.registry import attack

__all__ = ["pgd"]

_NORMS = ("linf", "l2", "l1")


@attack(
    goal="budget",
    knowledge="gradient",
    norms=_NORMS,
    paper="Madry et al., 2018, arXiv:1706.06083",
    presets={
        # S0's `pgd_carlini`: L2-normalised steps of 0.1 in ImageNet-normalised units (mean std
        # 0.2257), clipped to linf 0.031, no random start, every step taken.
        "ace": {
            "eps": 0.031,
            "norm": "linf",
            "steps": 1000,
            "step_size": 0.02257,
            "direction": "gradient",
            "random_start": False,
            "stop": "never",
        },
        # S1's own step: the raw gradient of the loss times 0.1. Its bound is an RMS of 0.05, here
        # as the l2 norm for S1's images of 3×299×299: give `eps` for another size.
        "qiu": {
            "eps": 0.05 * (3 * 299 * 299) ** 0.5,
            "norm": "l2",
            "steps": 50,
            "step_size": 0.1,
            "direction": "raw",
            "random_start": False,
            "targeted": True,
        },
    },
)
def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    preset: str | None = None,
    eps: float | None = None,
    norm: str = "linf",
    steps: int = 40,
    step_size: float | None = None,
    random_start: bool = True,
    restarts: int = 1,
    direction: Direction = "sign",
    targeted: bool = False,
    loss: str | Loss = "cross_entropy",
    gradient: GradientEstimator | None = None,
    mask: Tensor | None = None,
    seed: int | Tensor = 0,
    stop: Stop | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """Projected gradient descent: steepest ascent on the loss within a ball around `x`.

    Every one of the `steps + 1` points is evaluated and the best one is returned: the one that is
    adversarial on most draws, then the one with the highest loss.

    Convention:
        Images are float RGB, NCHW, in [0, 1]; `eps` and `step_size` are in the same units.

    Args:
        model: Maps images in [0, 1] to logits (B, K); with `keys=` if it is stochastic.
        x: Images, (B, C, H, W), in [0, 1].
        y: True labels (B,), or targets if `targeted`.
        preset: `"ace"` (S0's own PGD) or `"qiu"` (S1's raw-gradient step); keywords that are given
            win over the preset's. None by default: Madry et al. with 40 steps.
        eps: Budget in image units; by default 8/255 (linf), 0.5 (l2) or 12 (l1).
        norm: `"linf"`, `"l2"` or `"l1"`.
        steps: Number of steps.
        step_size: Length of a step in `norm`; by default eps/4 for linf (Madry et al.) and
            2.5·eps/steps otherwise.
        random_start: Start from a uniform point of the ball.
        restarts: Independent starts per sample, folded into the batch.
        direction: `"sign"` is the steepest ascent for `norm` (the sign for linf), `"gradient"` the
            L2-normalised gradient whatever the norm, `"raw"` the gradient itself.
        targeted: Minimise the loss towards `y` instead.
        loss: `"cross_entropy"`, `"margin"`, `"dlr"`, or a function to maximise.
        gradient: Estimator; by default `backprop`. `eot(30)` for stochastic models.
        mask: Pixels that may change, bool (B or 1, 1 or C, H, W).
        seed: Integer, or one key per sample from `feint.core.random.keys`.
        stop: `"success"` drops a sample once adversarial, `"never"` takes every step; by default
            `"success"` for a deterministic model.
        trace: Called as `trace(step, x_adv, logits, loss, active)` at every evaluated point.

    Returns:
        x_adv: Like `x`, in [0, 1], within `eps` measured in float64.

    Raises:
        ConfigError, RangeError, ShapeError, DtypeError, DeviceError: On bad arguments.
        GradientError: If no gradient reaches the input, or one that is not finite.
        ModelError: If the logits are NaN or have the wrong shape.

    Cost:
        Per sample and restart at most steps + 1 forward and `steps` backward passes, fewer if it
        stops early; times the estimator's draws.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> x, y = torch.rand(2, 3, 2, 2), torch.tensor([0, 1])
        >>> bool(((pgd(model, x, y, eps=0.1) - x).abs() <= 0.1).all())
        True

    References:
        Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards deep learning models resistant to
        adversarial attacks", ICLR 2018, eq. (2).

    Deviations:
        The best point is returned, not the last. l1 spreads each step over the 5 % largest
        gradient values that can still move (after Tramèr and Boneh, NeurIPS 2019, but in proportion
        to the gradient), since a step on the single largest one hardly moves.
    """
    budget = EPS.get(norm, 0.0) if eps is None else eps
    if step_size is None:
        step_size = budget / 4 if norm == "linf" else 2.5 * budget / max(1, steps)
    return ascend(
        model,
        x,
        y,
        eps=budget,
        norm=norm,
        norms=_NORMS,
        steps=steps,
        step_size=step_size,
        targeted=targeted,
        loss=loss,
        gradient=gradient,
        mask=mask,
        seed=seed,
        stop=stop,
        trace=trace,
        random_start=random_start,
        restarts=restarts,
        direction=direction,
    )
