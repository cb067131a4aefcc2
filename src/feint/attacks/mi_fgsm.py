"""Momentum iterative FGSM (MI-FGSM)."""

from __future__ import annotations

from torch import Tensor

from feint.attacks._ascent import EPS, Stop, Trace, ascend
from feint.core.errors import RangeError
from feint.core.gradients import GradientEstimator, Model
from feint.core.losses import Loss
from feint.core.registry import attack

__all__ = ["mi_fgsm"]

_NORMS = ("linf", "l2", "l1")


@attack(
    goal="budget",
    knowledge="gradient",
    norms=_NORMS,
    paper="Dong et al., 2018, arXiv:1710.06081",
    presets={"paper": {"eps": 16 / 255, "norm": "linf", "steps": 10, "decay": 1.0}},
)
def mi_fgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    preset: str | None = None,
    eps: float | None = None,
    norm: str = "linf",
    steps: int = 10,
    step_size: float | None = None,
    decay: float = 1.0,
    targeted: bool = False,
    loss: str | Loss = "cross_entropy",
    gradient: GradientEstimator | None = None,
    mask: Tensor | None = None,
    seed: int | Tensor = 0,
    stop: Stop | None = None,
    trace: Trace | None = None,
) -> Tensor:
    r"""Momentum iterative FGSM: I-FGSM along a decaying sum of normalised gradients.

    .. math:: g_{t+1} = μ·g_t + ∇ / \mathrm{mean}|∇|, \quad x_{t+1} = x_t + α·\mathrm{unit}(g_{t+1})

    Momentum carries the ascent through poor maxima and makes its results transfer better to other
    models. `decay=0` is `bim`.

    Convention:
        Images are float RGB, NCHW, in [0, 1]; `eps` and `step_size` are in the same units.

    Args:
        model: Maps images in [0, 1] to logits (B, K); with `keys=` if it is stochastic.
        x: Images, (B, C, H, W), in [0, 1].
        y: True labels (B,), or targets if `targeted`.
        preset: `"paper"` (eps 16/255, ten steps, decay 1); keywords that are given win over the
            preset's. None by default, which differs from it by the customary eps alone.
        eps: Budget; by default 8/255 (linf), 0.5 (l2) or 12 (l1).
        norm: `"linf"`, `"l2"` or `"l1"`.
        steps: Number of steps.
        step_size: Length of a step in `norm`; by default eps/steps.
        decay: μ ≥ 0, the share of the earlier gradients that is kept.
        targeted: Minimise the loss towards `y` instead.
        loss: `"cross_entropy"`, `"margin"`, `"dlr"`, or a function to maximise.
        gradient: Estimator; by default `backprop`. `eot(30)` for stochastic models.
        mask: Pixels that may change, bool (B or 1, 1 or C, H, W).
        seed: Integer, or one key per sample from `feint.core.random.keys`; only a random model or
            estimator uses it.
        stop: `"success"` drops a sample once adversarial, `"never"` takes every step (the better
            choice when the result is to fool another model); by default `"success"` for a
            deterministic model.
        trace: Called as `trace(step, x_adv, logits, loss, active)` at every evaluated point.

    Returns:
        x_adv: Like `x`, in [0, 1], within `eps` measured in float64.

    Raises:
        ConfigError, RangeError, ShapeError, DtypeError, DeviceError: On bad arguments.
        GradientError: If no gradient reaches the input, or one that is not finite.
        ModelError: If the logits are NaN or have the wrong shape.

    Cost:
        Per sample at most steps + 1 forward and `steps` backward passes, fewer if it stops early;
        times the estimator's draws.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> x, y = torch.rand(2, 3, 2, 2), torch.tensor([0, 1])
        >>> bool(((mi_fgsm(model, x, y, eps=0.1) - x).abs() <= 0.1).all())
        True

    References:
        Dong, Liao, Pang, Su, Zhu, Hu, Li, "Boosting adversarial attacks with momentum", CVPR 2018,
        Algorithm 1.

    Deviations:
        The gradient is divided by its mean absolute value instead of by its l1 norm, which changes
        the scale of g and nothing else. The best point is returned, not the last.
    """
    if not decay >= 0:
        raise RangeError(f"decay is {decay}; expected a number ≥ 0")
    budget = EPS.get(norm, 0.0) if eps is None else eps
    return ascend(
        model,
        x,
        y,
        eps=budget,
        norm=norm,
        norms=_NORMS,
        steps=steps,
        step_size=budget / max(1, steps) if step_size is None else step_size,
        targeted=targeted,
        loss=loss,
        gradient=gradient,
        mask=mask,
        seed=seed,
        stop=stop,
        trace=trace,
        decay=decay,
    )
