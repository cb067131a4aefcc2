"""Feature-space BPDA: ascend on what a hidden layer sees instead of on the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from feint.attacks._ascent import EPS, Stop, Trace, _check_walk
from feint.attacks._best import Best
from feint.attacks._minimal import Rows
from feint.core.checks import check_images
from feint.core.errors import ConfigError, GradientError, ShapeError, UnknownNameError
from feint.core.gradients import (
    Estimate,
    GradientEstimator,
    Model,
    call,
    is_stochastic,
)
from feint.core.losses import Loss, margin
from feint.core.mixed import declare_margin
from feint.core.norms import steepest_ascent
from feint.core.registry import attack

__all__ = ["feature_bpda"]

_NORMS = ("linf", "l2")
Layer = str | Callable[[Tensor], Tensor] | None
Objective = Literal["distance", "projection"]
_Goal = Literal["loss", "distance", "projection", "guide"]


@dataclass
class _State(Rows):
    rows: Tensor
    point: Tensor
    clean: Tensor | None
    """(R, F): features of the clean images."""
    aim: Tensor | None
    """(R, F): features to approach, or the direction to go in."""


@attack(
    goal="budget",
    knowledge="gradient",
    norms=_NORMS,
    paper="Sabour et al., 2016, arXiv:1511.05122",
)
def feature_bpda(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    layer: Layer = None,
    objective: Objective = "distance",
    guide: Tensor | None = None,
    eps: float | None = None,
    norm: str = "linf",
    steps: int = 40,
    step_size: float | None = None,
    targeted: bool = False,
    loss: str | Loss = "margin",
    gradient: GradientEstimator | None = None,
    mask: Tensor | None = None,
    seed: int | Tensor = 0,
    stop: Stop | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """Move a hidden layer's features away from the clean ones, or towards a guide's.

    Against a transformation g with a backward rule (a view), the features f′(g(x)) give gradients
    that do not pass the last layers, where saturation or a trained-in trap may sit.

    Convention:
        Images are float RGB, NCHW, in [0, 1]; `eps` and `step_size` are in the same units. Features
        are flattened and compared by their l2 distance.

    Args:
        model: Maps images in [0, 1] to logits (B, K); with `keys=` if it is stochastic.
        x: Images, (B, C, H, W), in [0, 1].
        y: True labels (B,), or targets if `targeted`.
        layer: Name of a module of the model, whose output is matched; or a function from images to
            features (B, …), without the model's randomness. By default the input of the model's
            last `torch.nn.Linear`, or the logits if it has none.
        objective: Without a guide: `"distance"` to the clean features grows, or the `"projection"`
            of the change on the change that the first step made (Huang et al. 2019).
        guide: Images (B, C, H, W) whose features are approached instead: such as one of the target
            class for each sample.
        eps: Budget in image units; by default 8/255 (linf) or 0.5 (l2).
        norm: `"linf"` or `"l2"`.
        steps: Number of steps; without a guide the first of them follows `loss`, since the distance
            to the clean features has no slope at the clean image.
        step_size: Length of a step in `norm`; by default eps/4 for linf and 2.5·eps/steps for l2.
        targeted: Seek the class `y`; needs a guide or `objective="projection"`.
        loss: Loss of the logits, by which the first step goes and the best point is chosen:
            `"margin"`, `"cross_entropy"`, `"dlr"`, or a function to maximise.
        gradient: Estimator; by default `backprop`. `eot(30)` for stochastic models.
        mask: Pixels that may change, bool (B or 1, 1 or C, H, W).
        seed: Integer, or one key per sample from `feint.core.random.keys`.
        stop: `"success"` drops a sample once adversarial, `"never"` takes every step; by default
            `"success"` for a deterministic model.
        trace: Called as `trace(step, x_adv, logits, loss, active)` at every evaluated point; the
            loss is `loss`.

    Returns:
        x_adv: Like `x`, in [0, 1], within `eps` measured in float64: the point with most draws
        adversarial, then of the highest `loss`.

    Raises:
        ConfigError: If it is targeted without an aim, or the layer gives no features.
        UnknownNameError: If the model has no such layer; names the nearest one.
        RangeError, ShapeError, DtypeError, DeviceError: On other bad arguments.
        GradientError: If no gradient reaches the input, or one that is not finite.
        ModelError: If the logits are NaN or have the wrong shape.

    Cost:
        Per sample at most steps + 1 forward and `steps` backward passes, times the estimator's
        draws; one forward pass more for a guide. A function as `layer` is run beside the model.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> x, y = torch.rand(2, 3, 2, 2), torch.tensor([0, 1])
        >>> bool(((feature_bpda(model, x, y, eps=0.1) - x).abs() <= 0.1).all())
        True

    References:
        Sabour, Cao, Faghri, Fleet, "Adversarial manipulation of deep representations", ICLR 2016.
        Huang, Katsman, He, Gu, Belongie, Lim, "Enhancing adversarial example transferability with
        an intermediate level attack", ICCV 2019, §3.2. Athalye, Carlini, Wagner, ICML 2018, §4.1.

    Deviations:
        First-order steps in a ball instead of L-BFGS with a constraint (Sabour et al.). Under EOT
        the clean features are their mean over the draws.
    """
    if objective not in ("distance", "projection"):
        raise ConfigError(f"objective is {objective!r}; expected 'distance' or 'projection'")
    if targeted and guide is None and objective == "distance":
        raise ConfigError(
            "targeted, but growing distance leads to no class in particular; give guide images of "
            "the targets, or objective='projection'"
        )
    budget = EPS.get(norm, 0.0) if eps is None else eps
    if step_size is None:
        step_size = budget / 4 if norm == "linf" else 2.5 * budget / max(1, steps)
    best = Best(
        model,
        x,
        y,
        eps=budget,
        norm=norm,
        norms=_NORMS,
        targeted=targeted,
        loss=loss,
        gradient=gradient,
        mask=mask,
        seed=seed,
        stop=stop,
        trace=trace,
    )
    _check_walk(norm, steps, step_size, False, 1, "sign")
    if guide is not None:
        check_images(guide, "guide")
        if guide.shape != x.shape:
            raise ShapeError(
                f"guide has shape {tuple(guide.shape)}; expected {tuple(x.shape)}, as x"
            )
    if len(x) == 0:
        return x.clone()
    return _walk(best, _Wide(model, layer), guide, objective, steps, step_size)


def _walk(
    best: Best, wide: _Wide, guide: Tensor | None, objective: Objective, steps: int, length: float
) -> Tensor:
    state = _State(best.everyone, best.x, None, None)
    if guide is not None:
        keys = best.keys_for(state.rows, 0)
        state.aim = _estimate(best, wide, state, "loss", guide, keys, True)[1]
    for step in range(steps + 1):
        goal: _Goal = "guide" if guide is not None else "distance" if step else "loss"
        # At the point after the first step both objectives have the same slope.
        if guide is None and objective == "projection" and step > 1:
            goal = "projection"
        seen: list[Tensor] = []

        def estimate(
            point: Tensor,
            rows: Tensor,
            keys: Tensor,
            forward_only: bool,
            goal: _Goal = goal,
            seen: list[Tensor] = seen,
        ) -> Estimate:
            found, features = _estimate(best, wide, state, goal, point, keys, forward_only)
            seen.append(features)
            return found

        last = step == steps
        slope = best.ask(state.point, state.rows, step, forward_only=last, estimate=estimate)
        if last:
            break
        if step == 0:
            state.clean = seen[0]
        elif step == 1 and guide is None and state.clean is not None:
            state.aim = seen[0] - state.clean
        if best.early:
            left = best.standing(state.rows)
            if len(left) == 0:
                break
            if len(left) < len(state.rows):
                state.keep(left)
                slope = slope[left]
        unit = steepest_ascent(slope, best.norm)
        state.point = best.confine(state.point.add(unit, alpha=length), state.rows)
    return best.result()


def _estimate(
    best: Best,
    wide: _Wide,
    state: _State,
    goal: _Goal,
    point: Tensor,
    keys: Tensor,
    forward_only: bool,
) -> tuple[Estimate, Tensor]:
    """The slope of the goal with the logits and `loss` at a point per row, and its features."""
    labels = best.y[state.rows]

    def value(outputs: Tensor, number: Tensor) -> Tensor:
        logits, features = outputs[:, : wide.classes], outputs[:, wide.classes :]
        if goal == "loss":
            return best.loss(logits, labels[number])
        if goal == "guide" and state.aim is not None:
            return -(features - state.aim[number]).square().sum(1)
        if state.clean is None:
            raise ConfigError("no clean features are known yet")
        change = features - state.clean[number]
        if goal == "projection" and state.aim is not None:
            return (change * state.aim[number]).sum(1)
        return change.square().sum(1)

    def goal_(outputs: Tensor, number: Tensor) -> Tensor:
        own = margin(outputs[..., : wide.classes], labels[number])
        return -own if best.targeted else own

    declare_margin(value, goal_)
    number = torch.arange(len(point), device=point.device)
    try:
        found = best.estimator(wide, point, number, value, keys, forward_only=forward_only)
    except GradientError:
        # Once more on the model itself, whose modules have their own names.
        best.estimator(best.model, point, labels, best.loss, keys)
        raise
    logits, features = found.logits.split(
        [wide.classes, found.logits.shape[-1] - wide.classes], dim=-1
    )
    draws = logits.shape[1]
    loss = best.loss(logits.flatten(0, 1), labels.repeat_interleave(draws, 0))
    return Estimate(logits, found.gradient, loss.view(-1, draws).mean(1)), features.mean(1)


class _Wide(nn.Module):
    """A model whose output is its logits and, behind them, the features of a layer."""

    def __init__(self, model: Model, layer: Layer) -> None:
        super().__init__()
        self.model, self.function, self.classes = model, None, 0
        self.stochastic = is_stochastic(model)
        if hasattr(model, "draws"):
            self.draws = model.draws
        modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
        self.inputs = layer is None
        self.site: tuple[nn.Module, ...] = ()  # a tuple: it is no further child
        if isinstance(layer, str):
            if layer not in modules:
                raise UnknownNameError("layer", layer, [name for name in modules if name])
            self.site = (modules[layer],)
        elif layer is None:
            linear = [m for m in modules.values() if isinstance(m, nn.Linear)]
            self.site = tuple(linear[-1:])
        elif callable(layer):
            self.function = layer
        else:
            raise ConfigError(f"layer is {layer!r}; expected a name, a function or None")

    def forward(self, x: Tensor, keys: Tensor | None = None, draw: Tensor | None = None) -> Tensor:
        seen: list[Tensor] = []

        def after(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            seen.append(inputs[0] if self.inputs else output)

        handles = [site.register_forward_hook(after) for site in self.site]
        try:
            chosen = draw is not None
            logits = self.model(x, draw=draw) if chosen else call(self.model, x, keys)
        finally:
            for handle in handles:
                handle.remove()
        self.classes = logits.shape[1]
        if self.function is not None:
            seen.append(self.function(x))
        features = seen[-1] if seen else logits
        if not isinstance(features, Tensor) or (len(x) and features.numel() % len(x)):
            raise ConfigError(
                f"the layer gave {type(features).__name__} for {len(x)} images; expected a tensor "
                "of features for each"
            )
        if logits.requires_grad and not features.requires_grad:
            raise GradientError(
                "no gradient reaches the layer's features from the image: the graph is cut; choose "
                "another layer, or attack a view with a backward rule"
            )
        return torch.cat([logits, features.reshape(len(x), -1).to(logits.dtype)], 1)
