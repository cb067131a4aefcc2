"""Fast adaptive boundary attack (FAB)."""

from __future__ import annotations

from torch import Tensor

from feint.attacks._ascent import EPS, Stop, Trace
from feint.attacks._boundary import NORMS, nearest
from feint.attacks._targets import Targets
from feint.core.gradients import GradientEstimator, Model
from feint.core.registry import attack

__all__ = ["fab"]


@attack(
    goal="minimal",
    knowledge="gradient",
    norms=NORMS,
    paper="Croce and Hein, 2020, arXiv:1907.02044",
    version=2,
)
def fab(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    norm: str = "linf",
    steps: int = 100,
    restarts: int = 1,
    targets: Targets = None,
    alpha_max: float = 0.1,
    overshoot: float = 1.05,
    backward: float = 0.9,
    spread: float | None = None,
    refine: int = 1,
    targeted: bool = False,
    gradient: GradientEstimator | None = None,
    mask: Tensor | None = None,
    seed: int | Tensor = 0,
    stop: Stop | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """Fast adaptive boundary: walk along the decision boundary, drawn towards the image.

    Both the current point and the image are projected onto the nearest linearised boundary within
    the box; the next point lies between the two, by at most `alpha_max` towards the image's
    projection. From an adversarial point the walk first goes back towards the image.

    With `targets` it is FAB-T: a row of the batch for each of the likeliest other classes, which
    looks at that class's boundary alone and so needs one backward pass a step.

    Convention:
        Images are float RGB, NCHW, in [0, 1].

    Args:
        model: Maps images in [0, 1] to logits (B, K); with `keys=` if it is stochastic.
        x: Images, (B, C, H, W), in [0, 1].
        y: True labels (B,), or targets if `targeted`.
        norm: `"linf"`, `"l2"` or `"l1"`.
        steps: Number of steps.
        restarts: Walks per sample (and target), folded into the batch; the first starts at `x`,
            the others at random points near it.
        targets: None to look at the boundaries of all classes; `"all"`, or a number: at most so
            many of the classes likeliest at `x`, other than the label, each on its own.
        alpha_max: Most weight of the image's projection.
        overshoot: By how much a step goes to the boundary and beyond, η ≥ 1. A noisy estimator
            (SPSA with few samples) overrates the slope and so falls short: give it 2 or 3.
        backward: Share of the way from the image that is kept at an adversarial point, β.
        spread: Radius of the random starts; by default half the customary budget (linf: 4/255).
        refine: Forward passes at the end that move the point found back along the line to `x`, to
            where the margin is about to vanish; none on a random model, where a point must fool
            fresh draws instead.
        targeted: Seek the class `y` instead of any other.
        gradient: Estimator; by default `backprop`. Others are asked once per rival class and step,
            in one batch: `eot(30)` averages over 30 draws.
        mask: Pixels that may change, bool (B or 1, 1 or C, H, W).
        seed: Integer, or one key per sample from `feint.core.random.keys`; only restarts, a random
            model or a random estimator use it.
        stop: `"success"` leaves out samples that are adversarial as they are, `"never"` takes every
            step with them, too; by default `"success"` for a deterministic model.
        trace: Called as `trace(step, x_adv, logits, loss, active)` at every evaluated point; step 0
            is the image, the loss is the margin.

    Returns:
        x_adv: Like `x`, in [0, 1]: the nearest adversarial point evaluated, or `x` itself where
        there was none or `x` is one.

    Raises:
        ConfigError, RangeError, ShapeError, DtypeError, DeviceError: On bad arguments.
        GradientError: If no gradient reaches the input, or one that is not finite.
        ModelError: If the logits are NaN or have the wrong shape.

    Cost:
        Per sample 1 + `refine` forward passes, and per restart and target steps + 1 forward and
        `steps` backward passes; without `targets` a backward pass for every other class and step.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> x = torch.rand(2, 3, 2, 2)
        >>> fab(model, x, model(x).argmax(1), norm="l2", steps=5).shape
        torch.Size([2, 3, 2, 2])

    References:
        Croce, Hein, "Minimally distorted adversarial examples with a fast adaptive boundary
        attack", ICML 2020, Algorithm 1. FAB-T: Croce, Hein, "Reliable evaluation of adversarial
        robustness with an ensemble of diverse parameter-free attacks", ICML 2020, §4.

    Deviations:
        A step linearises the model at the point that it has just evaluated; the original first goes
        back from an adversarial point and evaluates again, which costs a second forward pass per
        step. The final search is along the line to the image (`refine`), with one pass instead of
        three. Random starts do not depend on what other restarts found, since all run at once.
        In l1 the pull towards the image fades until a walk has found its first adversarial point,
        to none in the last step. The original's walk leaves 8 of 60 images standing on a plain
        ResNet-20, this one none; over the other 52 its points are 1.5 % farther. In linf and l2 the
        pull is what brings hard walks back, and stays.
    """
    return nearest(
        model,
        x,
        y,
        norm=norm,
        steps=steps,
        restarts=restarts,
        alpha_max=alpha_max,
        overshoot=overshoot,
        backward=backward,
        spread=EPS.get(norm, 0.0) / 2 if spread is None else spread,
        refine=refine,
        targets=targets,
        targeted=targeted,
        gradient=gradient,
        mask=mask,
        seed=seed,
        stop=stop,
        trace=trace,
    )
