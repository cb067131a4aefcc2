"""Basic iterative method (BIM), also called I-FGSM."""

from __future__ import annotations

from torch import Tensor

from feint.attacks._ascent import EPS, Stop, Trace, ascend
from feint.core.gradients import GradientEstimator, Model
from feint.core.losses import Loss
from feint.core.registry import attack

__all__ = ["bim"]

_NORMS = ("linf", "l2", "l1")


@attack(
    goal="budget",
    knowledge="gradient",
    norms=_NORMS,
    paper="Kurakin et al., 2017, arXiv:1607.02533",
    presets={
        # S1's I-FGSM (cleverhans 2.1): targeted, ε 0.03 (its other row: 0.01), ten steps of ε/10,
        # none of them skipped.
        "qiu": {"eps": 0.03, "norm": "linf", "steps": 10, "targeted": True, "stop": "never"},
    },
)
def bim(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    preset: str | None = None,
    eps: float | None = None,
    norm: str = "linf",
    steps: int = 10,
    step_size: float | None = None,
    targeted: bool = False,
    loss: str | Loss = "cross_entropy",
    gradient: GradientEstimator | None = None,
    mask: Tensor | None = None,
    seed: int | Tensor = 0,
    stop: Stop | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """Basic iterative method (I-FGSM): several small steps of FGSM from the image itself.

    Convention:
        Images are float RGB, NCHW, in [0, 1]; `eps` and `step_size` are in the same units.

    Args:
        model: Maps images in [0, 1] to logits (B, K); with `keys=` if it is stochastic.
        x: Images, (B, C, H, W), in [0, 1].
        y: True labels (B,), or targets if `targeted`.
        preset: `"qiu"` (S1: targeted, eps 0.03, ten steps of eps/10); keywords that are given win
            over the preset's. None by default: the values of the signature.
        eps: Budget; by default 8/255 (linf), 0.5 (l2) or 12 (l1).
        norm: `"linf"`, `"l2"` or `"l1"`.
        steps: Number of steps.
        step_size: Length of a step in `norm`; by default eps/steps, so that the budget is just
            reached.
        targeted: Minimise the loss towards `y` instead.
        loss: `"cross_entropy"`, `"margin"`, `"dlr"`, or a function to maximise.
        gradient: Estimator; by default `backprop`. `eot(30)` for stochastic models.
        mask: Pixels that may change, bool (B or 1, 1 or C, H, W).
        seed: Integer, or one key per sample from `feint.core.random.keys`; only a random model or
            estimator uses it.
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
        Per sample at most steps + 1 forward and `steps` backward passes, fewer if it stops early;
        times the estimator's draws.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> x, y = torch.rand(2, 3, 2, 2), torch.tensor([0, 1])
        >>> bool(((bim(model, x, y, eps=0.1) - x).abs() <= 0.1).all())
        True

    References:
        Kurakin, Goodfellow, Bengio, "Adversarial examples in the physical world", ICLR 2017
        workshop, §2.2; the preset: Qiu et al. (S1), §VI.

    Deviations:
        Kurakin et al. take steps of 1/255 and min(eps·255 + 4, 1.25·eps·255) of them; here both
        are arguments. The best point is returned, not the last.
    """
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
    )
