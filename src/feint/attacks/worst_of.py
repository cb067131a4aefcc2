"""The worst of several attacks, per sample."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from feint.attacks._ascent import EPS, Stop, Trace
from feint.attacks._stages import Stage, run_stages
from feint.core import spec
from feint.core.errors import ConfigError, RangeError, UnknownNameError
from feint.core.gradients import GradientEstimator, Model, backprop, eot, nes, spsa
from feint.core.losses import Loss
from feint.core.mixed import mixed
from feint.core.norms import check_norm
from feint.core.registry import ATTACKS, AttackInfo, attack

__all__ = ["worst_of"]

_NORMS = ("linf", "l2", "l1")
_ESTIMATORS: dict[str, Callable[..., GradientEstimator]] = {
    "eot": eot,
    "spsa": spsa,
    "nes": nes,
    "mixed": mixed,
}

Entry = str | Callable[..., Tensor] | tuple[str | Callable[..., Tensor], Mapping[str, Any]]


@attack(
    goal="budget",
    knowledge="gradient",
    norms=_NORMS,
    paper="Carlini et al., 2019, arXiv:1902.06705",
)
def worst_of(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    attacks: str | Sequence[Entry] = "apgd, apgd(loss='margin'), fab",
    eps: float | None = None,
    norm: str = "linf",
    held_out: int = 32,
    targeted: bool = False,
    loss: str | Loss | None = None,
    gradient: GradientEstimator | None = None,
    mask: Tensor | None = None,
    seed: int | Tensor = 0,
    stop: Stop | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """The worst of several attacks, sample by sample; only what still stands goes on to the next.

    Every point within the budget that any of the attacks evaluates counts, so that a point that an
    attack passed by is not lost. On a stochastic model the attacks' results are compared by their
    success on held-out draws, since a lucky draw of the attack's own proves nothing.

    Convention:
        Images are float RGB, NCHW, in [0, 1]; `eps` is in the same units.

    Args:
        model: Maps images in [0, 1] to logits (B, K); with `keys=` if it is stochastic.
        x: Images, (B, C, H, W), in [0, 1].
        y: True labels (B,), or targets if `targeted`.
        attacks: In the order in which they run, so the cheapest first: a text such as
            `"pgd(steps=10), apgd(loss='dlr'), square"`, or a sequence whose items are such texts,
            attack functions, or pairs of a name or function and its keywords. Minimal-norm attacks
            count where they keep to the budget. A function need not be registered: it is called
            with those of the common keywords that it takes.
        eps: Budget for all; by default 8/255 (linf), 0.5 (l2) or 12 (l1).
        norm: `"linf"`, `"l2"` or `"l1"`; every attack must have it.
        held_out: Stochastic models: fresh draws per sample on which results are compared.
        targeted: Whether `y` are targets, for all.
        loss: Given to the attacks that take a loss and do not fix their own; by default each has
            its own.
        gradient: Estimator, given to the attacks that take one and do not fix their own.
        mask: Pixels that may change, bool (B or 1, 1 or C, H, W).
        seed: Integer, or one key per sample from `feint.core.random.keys`.
        stop: `"success"` drops a sample once adversarial, `"never"` runs every attack on every
            sample to its end; by default `"success"` for a deterministic model.
        trace: Called as `trace(step, x_adv, logits, loss, active)` at every evaluated point, with
            steps numbered through and the margin as the loss. Minimal-norm attacks evaluate points
            beyond the budget, too.

    Returns:
        x_adv: Like `x`, in [0, 1], within `eps` measured in float64.

    Raises:
        ConfigError: If an attack has not the norm or fixes another threat than this one.
        UnknownNameError: If an attack or one of its keywords is unknown.
        RangeError: If an attack's own budget exceeds `eps`.
        ShapeError, DtypeError, DeviceError, GradientError: As the attacks do.
        ModelError: As the attacks do, or if logits change from one call to the next although the
            model declares no randomness.

    Cost:
        At most the sum of the attacks' costs. Stochastic models: `held_out` forward passes per
        sample and attack on top. A function that takes no `trace`: one forward pass on top. A model
        that declares no randomness is asked twice about the first 8 images.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> x, y = torch.rand(2, 3, 2, 2), torch.tensor([0, 1])
        >>> x_adv = worst_of(model, x, y, attacks="pgd(steps=5), apgd(steps=5)", eps=0.1)
        >>> bool(((x_adv - x).abs() <= 0.1).all())
        True

    References:
        Carlini et al., "On evaluating adversarial robustness", 2019, §5.8 (report the per-example
        worst case over attacks).

    Deviations:
        None.
    """
    budget = EPS.get(norm, 0.0) if eps is None else eps
    check_norm(norm, _NORMS)
    common = {"norm": norm, "eps": budget, "targeted": targeted}
    optional = {"loss": loss, "gradient": gradient}
    common.update({k: v for k, v in optional.items() if v is not None})
    stages = [_stage(entry, common, budget) for entry in _entries(attacks)]
    return run_stages(
        model,
        x,
        y,
        stages,
        eps=budget,
        norm=norm,
        norms=_NORMS,
        targeted=targeted,
        mask=mask,
        seed=seed,
        stop=stop,
        trace=trace,
        held_out=held_out,
    )


def _entries(attacks: object) -> list[tuple[str | Callable[..., Tensor], Mapping[str, Any]]]:
    """The attacks one by one: name or function, and keywords."""
    items = [attacks] if isinstance(attacks, str) or callable(attacks) else attacks
    if not isinstance(items, Sequence) or len(items) == 0:
        raise ConfigError(f"attacks is {attacks!r}; expected a text such as 'pgd, apgd' or a list")
    found: list[tuple[str | Callable[..., Tensor], Mapping[str, Any]]] = []
    for item in items:
        if isinstance(item, str):
            found += [_typed(expression) for expression in spec.parse_list(item)]
        elif callable(item):
            found.append((item, {}))
        elif (
            isinstance(item, Sequence)
            and len(item) == 2
            and (isinstance(item[0], str) or callable(item[0]))
            and isinstance(item[1], Mapping)
        ):
            found.append((item[0], item[1]))
        else:
            raise ConfigError(
                f"attacks holds {item!r}; expected a text, a function, or a pair such as "
                "('pgd', {'steps': 10})"
            )
    return found


def _typed(expression: spec.Expression) -> tuple[str, Mapping[str, Any]]:
    """Name and keywords of `pgd(steps=10, gradient=eot(8))`."""
    if not isinstance(expression, spec.Call) or expression.args:
        raise ConfigError(f"attack '{expression}' is no single call; separate attacks by commas")
    kwargs: dict[str, Any] = {}
    for key, value in expression.kwargs:
        if key == "gradient" and value is not None:
            kwargs[key] = _estimator(value)
        elif isinstance(value, spec.Call):
            raise ConfigError(f"{key}={value}: expected a number or text; quote text: {key}='…'")
        else:
            kwargs[key] = value
    return expression.name, kwargs


def _estimator(value: object) -> GradientEstimator:
    """An estimator by name, such as `eot(30)` or `eot(8, base=spsa(32))`."""
    typed = value if isinstance(value, spec.Call) else spec.Call(str(value))
    if typed.name == "backprop":
        return backprop
    if typed.name not in _ESTIMATORS:
        raise UnknownNameError("gradient estimator", typed.name, [*_ESTIMATORS, "backprop"])
    args = [_estimator(v) if isinstance(v, spec.Call) else v for v in typed.args]
    named = {k: _estimator(v) if isinstance(v, spec.Call) else v for k, v in typed.kwargs}
    try:
        return _ESTIMATORS[typed.name](*args, **named)
    except TypeError as error:
        raise ConfigError(f"gradient={value}: {error}") from None


def _stage(
    entry: tuple[str | Callable[..., Tensor], Mapping[str, Any]],
    common: Mapping[str, Any],
    budget: float,
) -> Stage:
    """An attack with the threat that all share."""
    function, own = entry
    if isinstance(function, str):
        info = ATTACKS[function]
    else:
        known = [ATTACKS[n] for n in ATTACKS if ATTACKS[n].component is function]
        if not known:
            return _foreign(function, own, common)
        (info,) = known
    info.check(own)
    fixed = {**info.presets.get(str(own.get("preset")), {}), **own}
    _refuse_other_threat(info, fixed, common, budget)
    settings = {k: v for k, v in common.items() if k in info.parameters and fixed.get(k) is None}
    settings.update({k: v for k, v in own.items() if k not in settings})
    traced = "trace" in info.parameters

    def run(model: Model, x: Tensor, y: Tensor, **given: Any) -> Tensor:
        given = {k: v for k, v in given.items() if k in info.parameters and k not in own}
        return info.component(model, x, y, **settings, **given)

    within, blind = info.goal == "budget", info.knowledge != "gradient"
    return Stage(info.name, run, within=within, traced=traced, blind=blind)


def _refuse_other_threat(
    info: AttackInfo, fixed: Mapping[str, Any], common: Mapping[str, Any], budget: float
) -> None:
    if common["norm"] not in info.norms:
        raise ConfigError(
            f"attack {info.name!r} has no norm {common['norm']!r}; it has {', '.join(info.norms)}"
        )
    if common["targeted"] and "targeted" not in info.parameters:
        raise ConfigError(f"attack {info.name!r} has no targeted form")
    for key in ("norm", "targeted"):
        if fixed.get(key) is not None and fixed[key] != common[key]:
            raise ConfigError(
                f"attack {info.name!r} fixes {key}={fixed[key]!r}, worst_of has {common[key]!r}; "
                "leave it out there"
            )
    for key in ("mask", "seed", "trace"):
        if key in fixed:
            raise ConfigError(f"attack {info.name!r} fixes {key}; give it to worst_of instead")
    if fixed.get("eps") is not None and fixed["eps"] > budget * (1 + 1e-9):
        raise RangeError(
            f"attack {info.name!r} has eps {fixed['eps']:g}, more than worst_of's {budget:g}"
        )


def _foreign(
    function: Callable[..., Tensor], own: Mapping[str, Any], common: Mapping[str, Any]
) -> Stage:
    """A function that nobody registered: it gets what it takes, and its result is evaluated."""
    parameters = inspect.signature(function).parameters
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def run(model: Model, x: Tensor, y: Tensor, **given: Any) -> Tensor:
        takes = {k: v for k, v in {**common, **given}.items() if everything or k in parameters}
        return function(model, x, y, **{**takes, **own})

    name = getattr(function, "__qualname__", type(function).__name__)
    return Stage(name, run, within=False, traced=False)
