"""Fast gradient sign method (FGSM)."""

from __future__ import annotations

from torch import Tensor

from feint.attacks._ascent import EPS, Stop, Trace, ascend
from feint.core.gradients import GradientEstimator, Model
from feint.core.losses import Loss
from feint.core.registry import attack

__all__ = ["fgsm"]

_NORMS = ("linf", "l2", "l1")


@attack(
    goal="budget",
    knowledge="gradient",
    norms=_NORMS,
    paper="Goodfellow et al., 2015, arXiv:1412.6572",
)
def fgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | None = None,
    norm: str = "linf",
    targeted: bool = False,
    loss: str | Loss = "cross_entropy",
    gradient: GradientEstimator | None = None,
    mask: Tensor | None = None,
    seed: int | Tensor = 0,
    stop: Stop | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """Fast gradient sign method: one step of steepest ascent that spends the whole budget.

    The same as `pgd(steps=1, step_size=eps, random_start=False)`.

    Convention:
        Images are float RGB, NCHW, in [0, 1]; `eps` is in the same units.

    Args:
        model: Maps images in [0, 1] to logits (B, K); with `keys=` if it is stochastic.
        x: Images, (B, C, H, W), in [0, 1].
        y: True labels (B,), or targets if `targeted`.
        eps: Budget and length of the step; by default 8/255 (linf), 0.5 (l2) or 12 (l1).
        norm: `"linf"` (the sign), `"l2"` (the normalised gradient) or `"l1"` (the signs of the 5 %
            largest values that can still move).
        targeted: Minimise the loss towards `y` instead.
        loss: `"cross_entropy"`, `"margin"`, `"dlr"`, or a function to maximise.
        gradient: Estimator; by default `backprop`.
        mask: Pixels that may change, bool (B or 1, 1 or C, H, W).
        seed: Integer, or one key per sample from `feint.core.random.keys`; only a random model or
            estimator uses it.
        stop: `"success"` leaves a sample alone that is adversarial as it is, `"never"` steps all
            the same; by default `"success"` for a deterministic model.
        trace: Called as `trace(step, x_adv, logits, loss, active)` at both points.

    Returns:
        x_adv: Like `x`, in [0, 1], within `eps` measured in float64.

    Raises:
        ConfigError, RangeError, ShapeError, DtypeError, DeviceError: On bad arguments.
        GradientError: If no gradient reaches the input, or one that is not finite.
        ModelError: If the logits are NaN or have the wrong shape.

    Cost:
        Two forward passes (the second one evaluates the step) and one backward pass per sample.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> x, y = torch.rand(2, 3, 2, 2), torch.tensor([0, 1])
        >>> bool(((fgsm(model, x, y, eps=0.1) - x).abs() <= 0.1).all())
        True

    References:
        Goodfellow, Shlens, Szegedy, "Explaining and harnessing adversarial examples", ICLR 2015,
        §4. l2 and l1: steepest ascent for the norm, as in Madry et al., ICLR 2018.

    Deviations:
        The step is evaluated and `x` itself is returned where the loss is higher there, so the
        result is never a worse attack than none.
    """
    budget = EPS.get(norm, 0.0) if eps is None else eps
    return ascend(
        model,
        x,
        y,
        eps=budget,
        norm=norm,
        norms=_NORMS,
        steps=1,
        step_size=budget,
        targeted=targeted,
        loss=loss,
        gradient=gradient,
        mask=mask,
        seed=seed,
        stop=stop,
        trace=trace,
    )
