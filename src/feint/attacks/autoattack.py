"""AutoAttack: an ensemble of attacks without parameters to tune."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from feint.attacks._ascent import EPS, Stop, Trace
from feint.attacks._boundary import nearest
from feint.attacks._climb import NORMS, climb
from feint.attacks._minimal import check_count
from feint.attacks._stages import Stage, run_stages
from feint.attacks._targets import tolerant_dlr
from feint.attacks.square import square
from feint.core.errors import ConfigError
from feint.core.gradients import GradientEstimator, Model, eot, is_stochastic
from feint.core.losses import Loss
from feint.core.registry import attack

__all__ = ["autoattack"]

_VERSIONS = ("standard", "plus", "random")


@attack(
    goal="budget",
    knowledge="gradient",
    norms=NORMS,
    paper="Croce and Hein, 2020, arXiv:2003.01690",
    version=2,
)
def autoattack(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    version: str | None = None,
    eps: float | None = None,
    norm: str = "linf",
    steps: int = 100,
    targets: int = 9,
    queries: int = 5000,
    draws: int = 20,
    held_out: int = 32,
    targeted: bool = False,
    loss: str | Loss | None = None,
    gradient: GradientEstimator | None = None,
    mask: Tensor | None = None,
    seed: int | Tensor = 0,
    stop: Stop | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """AutoAttack: APGD, targeted APGD, targeted FAB and Square in turn, on what still stands.

    `"standard"`: APGD on cross-entropy, APGD-T on the targeted DLR, FAB-T, Square. `"plus"`: APGD
    on cross-entropy and on DLR and FAB with five restarts each, Square, APGD-T, FAB-T. `"random"`,
    for stochastic models: APGD on cross-entropy and on DLR, each gradient averaged over `draws`
    draws, and of the two results the one that succeeds more often on held-out draws.

    Convention:
        Images are float RGB, NCHW, in [0, 1]; `eps` is in the same units.

    Args:
        model: Maps images in [0, 1] to logits (B, K); with `keys=` if it is stochastic.
        x: Images, (B, C, H, W), in [0, 1].
        y: True labels (B,), or targets if `targeted`.
        version: `"standard"`, `"plus"` or `"random"`; by default `"random"` for a model that
            declares itself stochastic, else `"standard"`.
        eps: Budget in image units; by default 8/255 (linf), 0.5 (l2) or 12 (l1).
        norm: `"linf"`, `"l2"` or `"l1"`.
        steps: Steps of each APGD and FAB.
        targets: At most so many of the likeliest other classes for APGD-T and FAB-T.
        queries: Queries of Square.
        draws: `"random"`: draws per gradient, unless `gradient` is given.
        held_out: Stochastic models: fresh draws per sample on which results are compared.
        targeted: Pursue the class `y`: APGD-T and FAB-T then have this one target.
        loss: Loss of the first APGD; by default cross-entropy.
        gradient: Estimator; by default `backprop`, or `eot(draws)` with `"random"`.
        mask: Pixels that may change, bool (B or 1, 1 or C, H, W).
        seed: Integer, or one key per sample from `feint.core.random.keys`.
        stop: `"success"` drops a sample once adversarial, `"never"` runs every attack on every
            sample to its end; by default `"success"` for a deterministic model.
        trace: Called as `trace(step, x_adv, logits, loss, active)` at every evaluated point, with
            steps numbered through and the margin as the loss. FAB evaluates points beyond the
            budget, too.

    Returns:
        x_adv: Like `x`, in [0, 1], within `eps` measured in float64. What a stochastic model does
        on it is for a judge with draws of its own to say: no success that the attack saw is a
        verdict. The logger `feint.attacks` warns of probabilities in place of logits, which are
        attacked as they are, and of samples that Square fells where gradients failed.

    Raises:
        ConfigError: If the version is unknown, or if one for deterministic models would follow
            single draws of a stochastic one.
        RangeError, ShapeError, DtypeError, DeviceError: On bad arguments.
        GradientError: If no gradient reaches the input, or one that is not finite.
        ModelError: If the logits are NaN or have the wrong shape, or change from one call to the
            next although the model declares no randomness.

    Cost:
        `"standard"`, per sample that stands to the end: (1 + 2·targets)·(steps + 1) + queries + 2
        forward and (1 + 2·targets)·steps backward passes; one that falls pays only up to there.
        `"random"`: 2·(steps + 1)·draws forward, 2·steps·draws backward passes, and 2·held_out
        forward passes for the comparison. A model that declares no randomness is asked twice about
        the first 8 images.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5))
        >>> x, y = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
        >>> x_adv = autoattack(model, x, y, eps=0.1, steps=5, queries=20)
        >>> bool(((x_adv - x).abs() <= 0.1).all())
        True

    References:
        Croce, Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
        parameter-free attacks", ICML 2020, §5.

    Deviations:
        Targets run beside each other. With fewer classes than DLR needs (three, or four with a
        target) the margin takes its place, where the original fails. l1 has no Square, and its APGD
        keeps to `eps` throughout. Every point within the budget that any attack evaluates counts;
        the original keeps what each attack returns. The attacks' own deviations hold here, too.
        `"random"`: the authors' code drops a sample as soon as a single draw goes wrong, and so
        counts the defense's own errors as successes of the attack and keeps its stronger attack
        from the sample; here no sample is dropped, and results are compared by their share of
        successes on held-out draws.
    """
    budget = EPS.get(norm, 0.0) if eps is None else eps
    for name, number in (("queries", queries), ("targets", targets), ("draws", draws)):
        check_count(name, number)
    stochastic = is_stochastic(model)
    version = version or ("random" if stochastic else "standard")
    if version not in _VERSIONS:
        raise ConfigError(f"version is {version!r}; expected one of {', '.join(_VERSIONS)}")
    if version == "random":
        gradient = gradient or eot(draws)
    elif stochastic and gradient is None:
        raise ConfigError(
            f"version {version!r} would follow single draws of a random model; "
            f"use version='random', or give gradient=eot({draws})"
        )
    many: int | None = None if targeted else targets
    descent: Callable[..., Stage] = partial(
        _apgd, norm=norm, eps=budget, steps=steps, targeted=targeted, gradient=gradient
    )
    walk: Callable[..., Stage] = partial(
        _fab, norm=norm, eps=budget, steps=steps, targeted=targeted, gradient=gradient
    )
    first = "cross_entropy" if loss is None else loss
    dlr = tolerant_dlr(targeted)
    black = [] if norm == "l1" else [_square(norm, budget, queries, targeted, stochastic, draws)]
    stages = {
        "standard": [
            descent("ce", loss=first),
            descent("targets", loss="dlr", targets=many),
            walk("fab", targets=many),
            *black,
        ],
        "plus": [
            descent("ce", loss=first, restarts=5),
            descent("dlr", loss=dlr, restarts=5),
            walk("fab", targets=None, restarts=5),
            *black,
            descent("targets", loss="dlr", targets=many),
            walk("fab targets", targets=many),
        ],
        "random": [descent("ce", loss=first), descent("dlr", loss=dlr)],
    }[version]
    return run_stages(
        model,
        x,
        y,
        stages,
        eps=budget,
        norm=norm,
        norms=NORMS,
        targeted=targeted,
        mask=mask,
        seed=seed,
        stop=stop,
        trace=trace,
        held_out=held_out,
    )


def _apgd(
    name: str, *, loss: str | Loss, targets: int | None = None, restarts: int = 1, **kwargs: Any
) -> Stage:
    run = partial(
        climb,
        loss=loss,
        targets=targets,
        restarts=restarts,
        step_size=None,
        random_start=True,
        sparsity=0.2,
        tolerant=True,
        **kwargs,
    )
    return Stage(f"apgd {name}", run)


def _fab(name: str, *, targets: int | None, restarts: int = 1, eps: float, **kwargs: Any) -> Stage:
    settings = {
        "targets": targets,
        "restarts": restarts,
        "alpha_max": 0.1,
        "overshoot": 1.05,
        "backward": 0.9,
        "spread": eps / 2,
        "refine": 0,
        **kwargs,
    }

    def run(model: Model, x: Tensor, y: Tensor, *, stop: Stop, **given: Any) -> Tensor:
        enough = eps if stop == "success" else None
        return nearest(model, x, y, stop=stop, enough=enough, **settings, **given)

    return Stage(name, run, within=False)


def _square(
    norm: str, eps: float, queries: int, targeted: bool, stochastic: bool, draws: int
) -> Stage:
    run = partial(
        square,
        norm=norm,
        eps=eps,
        queries=queries,
        schedule=10_000,
        targeted=targeted,
        draws=draws if stochastic else 1,
    )
    return Stage("square", run, blind=True)
