"""From the words of a cell to a runnable attack on the right view."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import feint.attacks  # noqa: F401  (registers every attack)
from feint.attacks._ascent import Trace
from feint.core import random, spec
from feint.core.errors import ConfigError, ModelError, RangeError, UnknownNameError
from feint.core.gradients import GradientEstimator, backprop, eot, is_stochastic, nes, spsa
from feint.core.mixed import mixed
from feint.core.registry import ATTACKS, AttackInfo
from feint.defenses.base import View
from feint.evaluation.choose import Shortlist
from feint.evaluation.recorder import Recorder, counted
from feint.evaluation.semi_brute_force import round_by_round

__all__ = ["EOT_DRAWS", "ESTIMATORS", "Attacked", "Attacker", "ParsedAttack", "parse_attack"]

ESTIMATORS: dict[str, Callable[..., GradientEstimator]] = {
    "eot": eot,
    "spsa": spsa,
    "nes": nes,
    "mixed": mixed,
}
EOT_DRAWS = 8
"""Draws that a white-box attack on a stochastic pipeline averages over unless told otherwise."""


@dataclass(frozen=True)
class ParsedAttack:
    """An attack's registration, the keywords as typed, and its canonical text."""

    info: AttackInfo
    kwargs: Mapping[str, Any]
    text: str

    def effective(self, key: str) -> Any:
        """Value of a keyword: as typed, from the preset, or the signature's default."""
        return self._preset[key] if key in self._preset else self.info.parameters[key].default

    def fixes(self, key: str) -> bool:
        """Whether the text or its preset decides the keyword."""
        return key in self._preset

    @property
    def _preset(self) -> Mapping[str, Any]:
        name = self.kwargs.get("preset")
        return {**self.info.presets.get(str(name), {}), **self.kwargs}

    @property
    def needs_gradient(self) -> bool:
        """Whether it differentiates what it attacks; estimators from scores do not."""
        estimator = self.effective("gradient") if "gradient" in self.info.parameters else None
        return self.info.knowledge == "gradient" and not getattr(estimator, "scores_only", False)


def parse_attack(text: str) -> ParsedAttack:
    """Read `"pgd(steps=40, gradient=eot(30))"`.

    Raises:
        ConfigError: If the text is no call.
        UnknownNameError: If the attack or a keyword is unknown; names the nearest one.
    """
    typed = spec.parse(text)
    if not isinstance(typed, spec.Call):
        raise ConfigError(f"attack {text!r} is no single call; separate attacks by commas")
    info = ATTACKS[typed.name]
    if typed.args:
        raise ConfigError(f"attack {text!r}: write its settings as keywords, such as steps=40")
    info.check(typed.keywords)
    kwargs = {key: _value(key, value) for key, value in typed.kwargs}
    preset = kwargs.get("preset")
    if preset is not None and preset not in info.presets:
        raise UnknownNameError(f"preset of {info.name}", str(preset), info.presets)
    return ParsedAttack(info, kwargs, str(typed))


def _value(key: str, value: object) -> object:
    if key == "gradient":
        return None if value is None else _estimator(value)
    if isinstance(value, spec.Call):
        raise ConfigError(f"{key}={value}: expected a number or text; quote text: {key}='…'")
    return value


def _estimator(value: object) -> GradientEstimator:
    """An estimator by name, such as `eot(30)` or `eot(8, base=spsa(32))`."""
    name = value.name if isinstance(value, spec.Call) else value
    if name == "backprop":
        return backprop
    if not isinstance(name, str) or name not in ESTIMATORS:
        raise UnknownNameError("gradient estimator", str(name), [*ESTIMATORS, "backprop"])
    typed = value if isinstance(value, spec.Call) else spec.Call(name)
    args = [_estimator(v) if isinstance(v, spec.Call) else v for v in typed.args]
    named = {k: _estimator(v) if isinstance(v, spec.Call) else v for k, v in typed.kwargs}
    try:
        return ESTIMATORS[name](*args, **named)
    except TypeError as error:
        raise ConfigError(f"gradient={value}: {error}") from None


def _single_draw(estimator: object) -> bool:
    """Whether it asks about each image once, and so follows one draw of a random model."""
    return estimator is backprop or getattr(estimator, "one_pass", False)


@dataclass(frozen=True)
class Attacked:
    """Adversarial examples of a shard, and what making them took."""

    x_adv: Tensor
    forwards: int
    backwards: int
    first_hit: Tensor
    late_gain: Tensor
    rounds: Tensor | None = None
    """Per sample, as `queries` and `gradients`: what it took up to the first hit, or in all."""
    queries: Tensor | None = None
    gradients: Tensor | None = None


@dataclass(frozen=True)
class Attacker:
    """An attack bound to a view, a threat model and nothing else.

    Args:
        attack: The parsed attack.
        view: What it attacks.
        norm: The threat model's norm.
        eps: The threat model's budget; the attack's own must not exceed it.
        targeted: Whether labels are targets.
        transferred: Whether another pipeline than `view` will be judged; then no sample stops at
            its first success, and the point of highest loss counts.
        part: Where gradients come from instead of `view`, which then only says, once a round,
            whether the attacker has won (semi-brute force).
        asks: What the attacker may ask of the view: `"score"` refuses gradients, `"decision"`
            scores, too.
        choose: Whether the example is chosen among the attack's best points by their success on
            fresh draws (`feint.evaluation.choose`), rather than by the step that saw it.

    Raises:
        ConfigError: If the attack does not support the norm, wants another norm or goal than the
            threat model, or would ignore that the view is random or not differentiable.
        RangeError: If the attack's own budget exceeds the threat model's.
    """

    attack: ParsedAttack
    view: nn.Module
    norm: str
    eps: float
    targeted: bool = False
    transferred: bool = False
    part: nn.Module | None = None
    asks: str = "anything"
    choose: bool = False

    @property
    def _followed(self) -> nn.Module:
        """What is differentiated, where something is."""
        return self.view if self.part is None else self.part

    def __post_init__(self) -> None:
        attack, info, own = self.attack, self.attack.info, self.attack.effective
        self._refuse_other_knowledge()
        if self.norm not in info.norms:
            raise ConfigError(
                f"attack {info.name!r} has no norm {self.norm!r}; it has {', '.join(info.norms)}"
            )
        typed_norm = own("norm") if attack.fixes("norm") else self.norm
        if typed_norm != self.norm:
            raise ConfigError(
                f"attack {attack.text!r} uses norm {typed_norm!r}, the threat model "
                f"{self.norm!r}; give --norm {typed_norm}"
            )
        budget = own("eps") if attack.fixes("eps") else None
        if budget is not None and not isinstance(budget, (int, float)):
            raise ConfigError(f"attack {attack.text!r} has eps {budget!r}; expected a number")
        if budget is not None and budget > self.eps * (1 + 1e-9):
            raise RangeError(
                f"attack {attack.text!r} has eps {budget:g}, more than the threat model's "
                f"{self.eps:g}; raise --eps or lower the attack's"
            )
        self._refuse_other_goal()
        if attack.needs_gradient:
            self._refuse_opaque()
        if is_stochastic(self._followed) and info.knowledge == "gradient":
            self._refuse_single_draws()

    def _refuse_other_knowledge(self) -> None:
        attack, info = self.attack, self.attack.info
        what = {
            "score": (not attack.needs_gradient, "sees scores and no gradients", "square"),
            "decision": (info.knowledge == "decision", "sees decisions only", "hopskipjump"),
            "gradient": (
                info.knowledge == "gradient" and {"gradient", "stop"} <= set(info.parameters),
                "follows gradients and stops at a success",
                "pgd",
            ),
        }
        fits, words, example = what.get(self.asks, (True, "", ""))
        if not fits:
            raise ConfigError(
                f"attack {attack.text!r} does not fit an attacker who {words}; use one that does, "
                f"such as {example}"
            )

    def _refuse_other_goal(self) -> None:
        attack = self.attack
        if "targeted" not in attack.info.parameters:
            if self.targeted:
                raise ConfigError(f"attack {attack.info.name!r} has no targeted form")
        elif attack.fixes("targeted") and bool(attack.effective("targeted")) != self.targeted:
            mine, its = ("targeted", "untargeted") if self.targeted else ("untargeted", "targeted")
            raise ConfigError(
                f"attack {attack.text!r} is {its}, the threat model {mine}; "
                + ("leave its keyword out" if self.targeted else "give targets, or targeted=False")
            )

    def _refuse_opaque(self) -> None:
        name = _opaque(self._followed)
        if name is not None:
            raise ConfigError(
                f"attack {self.attack.text!r} would differentiate through {name}, which declares "
                "that its derivative is of no use; attack a view with a backward rule "
                "(Pipeline.view), or use gradient=spsa(64) or an attack on scores"
            )

    def _refuse_single_draws(self) -> None:
        attack = self.attack
        if "gradient" not in attack.info.parameters:
            raise ConfigError(
                f"attack {attack.text!r} follows one draw of a random pipeline and has no keyword "
                f"'gradient' to average; use one that has, such as pgd(gradient=eot({EOT_DRAWS}))"
            )
        if any(_single_draw(given.kwargs.get("gradient")) for given in (attack, *_inner(attack))):
            raise ConfigError(
                f"attack {attack.text!r} follows one draw of a random pipeline; use "
                f"gradient=eot({EOT_DRAWS}), or leave the keyword out"
            )
        for given in _inner(attack):
            if given.needs_gradient and "gradient" not in given.info.parameters:
                raise ConfigError(
                    f"attack {attack.text!r} holds {given.info.name!r}, which follows one draw of "
                    "a random pipeline and has no keyword 'gradient' to average; leave it out"
                )

    def settings(self) -> dict[str, Any]:
        """The keywords that the attack is called with, but for data, seed and trace."""
        parameters, fixes = self.attack.info.parameters, self.attack.fixes
        out: dict[str, Any] = dict(self.attack.kwargs)
        if "norm" in parameters and not fixes("norm"):
            out["norm"] = self.norm
        if "eps" in parameters and not (fixes("eps") and self.attack.effective("eps") is not None):
            out["eps"] = self.eps
        if "targeted" in parameters:
            out["targeted"] = self.targeted
        if "gradient" in parameters and out.get("gradient") is None:
            out.pop("gradient", None)
            if is_stochastic(self._followed):
                out["gradient"] = eot(EOT_DRAWS)
        if self.part is not None:
            out["gradient"] = round_by_round(self.part, out.get("gradient", backprop))
            if not fixes("stop"):
                out["stop"] = "success"
        if "stop" in parameters and not fixes("stop") and self.transferred:
            out["stop"] = "never"
        return out

    def run(self, x: Tensor, y: Tensor, keys: Tensor, batch_size: int) -> Attacked:
        """Attack `x` in batches; `y` are targets if the threat is targeted.

        Args:
            x: (N, C, H, W) in [0, 1].
            y: (N,) labels or targets.
            keys: (N,) keys of the samples.
            batch_size: Images per call.

        Raises:
            ModelError: If the attack returned NaN, or other than one image for each.
        """
        settings, parts, notes = self.settings(), [], []
        attack_keys = random.fold(keys.to(x.device), "attack")
        attacked = [self.view] if self.part is None else [self.view, self.part]
        with counted(*attacked) as passes:
            for start in range(0, len(x), batch_size):
                pick = slice(start, start + batch_size)
                beyond = self.attack.info.goal == "minimal"
                within = (x[pick], self.norm, self.eps) if beyond else None
                recorder = Recorder(y[pick], self.targeted, passes, within)
                extra: dict[str, Any] = {"seed": attack_keys[pick]}
                traced = "trace" in self.attack.info.parameters
                seen: Trace = recorder
                if traced and self.choose:
                    listed = Shortlist(x[pick], y[pick], self.targeted, self.norm, self.eps)
                    seen = _both(recorder, listed)
                if traced:
                    extra["trace"] = seen
                found = self.attack.info.component(self.view, x[pick], y[pick], **settings, **extra)
                if traced and self.choose:
                    found = listed.pick(self.view, found, attack_keys[pick])
                parts.append(self._whole(found, x[pick]))
                notes.append(recorder.summary() | recorder.effort())
        none = Recorder(y[:0], self.targeted)
        notes.append(none.summary() | none.effort())
        whole = {name: torch.cat([n[name] for n in notes]) for name in notes[-1]}
        return Attacked(
            torch.cat(parts) if parts else x.clone(),
            passes.forwards,
            passes.backwards,
            **whole,
        )

    def _whole(self, found: Tensor, x: Tensor) -> Tensor:
        if found.shape != x.shape or found.dtype != x.dtype:
            raise ModelError(
                f"attack {self.attack.text!r} returned {found.dtype} {tuple(found.shape)}; "
                f"expected {x.dtype} {tuple(x.shape)}"
            )
        if bool(found.isnan().any()):
            raise ModelError(f"attack {self.attack.text!r} returned NaN")
        return found


def _both(first: Trace, second: Trace) -> Trace:
    """A trace that tells two."""

    def trace(step: int, x_adv: Tensor, logits: Tensor, loss: Tensor, active: Tensor) -> None:
        first(step, x_adv, logits, loss, active)
        second(step, x_adv, logits, loss, active)

    return trace


def _inner(attack: ParsedAttack) -> list[ParsedAttack]:
    """The attacks that an attack of attacks names as text."""
    named = attack.effective("attacks") if "attacks" in attack.info.parameters else ""
    if not isinstance(named, str) or not named:
        return []
    return [parse_attack(str(expression)) for expression in spec.parse_list(named)]


def _opaque(module: nn.Module, name: str = "") -> str | None:
    """The first part that declares itself not differentiable and stands behind no view."""
    if isinstance(module, View):
        return None
    if not getattr(module, "differentiable", True):
        return f"{name!r} ({type(module).__name__})" if name else type(module).__name__
    for key, part in module.named_children():
        found = _opaque(part, f"{name}.{key}" if name else key)
        if found is not None:
            return found
    return None
