"""Auto-PGD (APGD): PGD whose step sizes set themselves."""

from __future__ import annotations

from torch import Tensor

from feint.attacks._ascent import EPS, Stop, Trace
from feint.attacks._climb import NORMS, climb
from feint.attacks._targets import Targets
from feint.core.gradients import GradientEstimator, Model
from feint.core.losses import Loss
from feint.core.registry import attack

__all__ = ["apgd"]


@attack(
    goal="budget",
    knowledge="gradient",
    norms=NORMS,
    paper="Croce and Hein, 2020, arXiv:2003.01690",
)
def apgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | None = None,
    norm: str = "linf",
    steps: int = 100,
    step_size: float | None = None,
    random_start: bool = True,
    restarts: int = 1,
    targets: Targets = None,
    sparsity: float = 0.2,
    targeted: bool = False,
    loss: str | Loss = "cross_entropy",
    gradient: GradientEstimator | None = None,
    mask: Tensor | None = None,
    seed: int | Tensor = 0,
    stop: Stop | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """Auto-PGD: projected ascent with momentum whose step size halves, per sample, when it stalls.

    At checkpoints (after 22, 41, 57, … % of the steps) a sample's step size is halved, and the
    sample returns to its best point, if at most three quarters of the steps since the last
    checkpoint raised the loss, or if the step size was kept there and the best loss has not
    risen since. In l1 the step spreads over the largest gradient values, whose number follows the
    sparsity of the best point, and the projection is onto the ball and the box at once.

    With `targets` it is APGD-T: every sample pursues several of its likeliest other classes, one
    row of the batch for each, until one of them is reached.

    Convention:
        Images are float RGB, NCHW, in [0, 1]; `eps` and `step_size` are in the same units.

    Args:
        model: Maps images in [0, 1] to logits (B, K); with `keys=` if it is stochastic.
        x: Images, (B, C, H, W), in [0, 1].
        y: True labels (B,), or targets if `targeted`.
        eps: Budget in image units; by default 8/255 (linf), 0.5 (l2) or 12 (l1).
        norm: `"linf"`, `"l2"` or `"l1"`.
        steps: Number of steps.
        step_size: Length of the first steps in `norm`; by default 2·eps (l1: eps).
        random_start: Start from a uniform point of the ball.
        restarts: Independent starts per sample (and target), folded into the batch.
        targets: None for the untargeted attack; `"all"`, or a number: at most so many of the
            classes likeliest at `x`, other than the label, folded into the batch.
        sparsity: l1 only: share of the values that the first step changes, in (0, 1].
        targeted: Pursue the class `y` and no other.
        loss: `"cross_entropy"`, `"margin"`, `"dlr"`, or a function to maximise. With `targets` or
            `targeted` the named ones are those towards the target (`"dlr"` the targeted DLR, which
            needs four classes; untargeted it needs three); a function is given the target as label.
        gradient: Estimator; by default `backprop`. `eot(20)` for stochastic models.
        mask: Pixels that may change, bool (B or 1, 1 or C, H, W).
        seed: Integer, or one key per sample from `feint.core.random.keys`.
        stop: `"success"` drops a sample once adversarial, `"never"` takes every step; by default
            `"success"` for a deterministic model.
        trace: Called as `trace(step, x_adv, logits, loss, active)` at every evaluated point; with
            `targets`, step 0 is the clean image and the loss there the margin.

    Returns:
        x_adv: Like `x`, in [0, 1], within `eps` measured in float64: the evaluated point that is
        adversarial on most draws, then the one with the highest loss.

    Raises:
        ConfigError, RangeError, ShapeError, DtypeError, DeviceError: On bad arguments, or if the
            model has too few classes for DLR.
        GradientError: If no gradient reaches the input, or one that is not finite.
        ModelError: If the logits are NaN or have the wrong shape.

    Cost:
        Per sample, restart and target at most steps + 1 forward and `steps` backward passes, fewer
        if it stops early; one more forward pass per sample with `targets`; times the estimator's
        draws.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
        >>> x, y = torch.rand(2, 3, 2, 2), torch.tensor([0, 1])
        >>> x_adv = apgd(model, x, y, eps=0.1, steps=10, loss="dlr", targets=3)
        >>> bool(((x_adv - x).abs() <= 0.1).all())
        True

    References:
        Croce, Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
        parameter-free attacks", ICML 2020, Algorithm 1 and eqs. (6), (7). l1: Croce, Hein, "Mind
        the box: l1-APGD for sparse adversarial attacks on image classifiers", ICML 2021.

    Deviations:
        The first condition at a checkpoint is "at most" three quarters, as in the authors' code,
        not "fewer than". The random start is uniform in the ball; theirs is scaled onto its
        surface. Restarts and targets run beside each other, theirs one after the other. l1: the
        budget is `eps` throughout (theirs starts at 3·eps), and values at an end of the box that
        would have to leave it take no part in a step. The gradient of a sample is that of its own
        loss, so nothing depends on the batch.
    """
    return climb(
        model,
        x,
        y,
        eps=EPS.get(norm, 0.0) if eps is None else eps,
        norm=norm,
        steps=steps,
        step_size=step_size,
        random_start=random_start,
        restarts=restarts,
        targets=targets,
        sparsity=sparsity,
        targeted=targeted,
        loss=loss,
        gradient=gradient,
        mask=mask,
        seed=seed,
        stop=stop,
        trace=trace,
    )
