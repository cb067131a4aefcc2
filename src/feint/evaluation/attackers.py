"""From the words of a cell to a runnable attack on the right view."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import feint.attacks  # noqa: F401  (registers every attack)
from feint.core import random, spec
from feint.core.errors import ConfigError, RangeError, UnknownNameError
from feint.core.gradients import GradientEstimator, backprop, call, eot, is_stochastic, nes, spsa
from feint.core.registry import ATTACKS, AttackInfo

__all__ = ["ESTIMATORS", "Attacker", "Recorder", "parse_attack"]

ESTIMATORS: dict[str, Callable[..., GradientEstimator]] = {"eot": eot, "spsa": spsa, "nes": nes}
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
        if key in self.kwargs:
            return self.kwargs[key]
        preset = self.kwargs.get("preset")
        if preset is not None and key in self.info.presets.get(str(preset), {}):
            return self.info.presets[str(preset)][key]
        return self.info.parameters[key].default


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
    kwargs = {key: _value(key, value) for key, value in typed.kwargs}
    info.check(kwargs)
    return ParsedAttack(info, kwargs, str(typed))


def _value(key: str, value: object) -> object:
    if key != "gradient":
        return value
    name = value.name if isinstance(value, spec.Call) else value
    if name == "backprop":
        return backprop
    if not isinstance(name, str) or name not in ESTIMATORS:
        raise UnknownNameError("gradient estimator", str(name), [*ESTIMATORS, "backprop"])
    typed = value if isinstance(value, spec.Call) else spec.Call(name)
    try:
        return ESTIMATORS[name](*typed.args, **typed.keywords)
    except TypeError as error:
        raise ConfigError(f"gradient={value}: {error}") from None


@dataclass
class Recorder:
    """A trace that remembers, per sample, the first success and how the loss went.

    Nothing is read back from the device before `summary`.
    """

    y: Tensor
    targeted: bool
    steps: list[int] = field(default_factory=list)
    hits: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    active: list[Tensor] = field(default_factory=list)

    def __call__(
        self, step: int, x_adv: Tensor, logits: Tensor, loss: Tensor, active: Tensor
    ) -> None:
        """The trace callback."""
        wide = logits if logits.ndim == 3 else logits[:, None]
        equal = wide.argmax(-1) == self.y[active][:, None]
        self.steps.append(step)
        self.hits.append((equal if self.targeted else ~equal).any(1))
        self.losses.append(loss.detach().float())
        self.active.append(active)

    def summary(self) -> dict[str, Tensor]:
        """Per sample: `first_hit` (step of the first adversarial draw, −1 if none) and `late_gain`.

        `late_gain` is the share of the total rise of the running best loss that came in the last
        tenth of the steps taken (at least one step, at most ten): an attack that was still climbing
        has a large one.
        """
        n = len(self.y)
        first = torch.full((n,), -1, dtype=torch.int64)
        gain = torch.zeros(n, dtype=torch.float64)
        if not self.steps:
            return {"first_hit": first, "late_gain": gain}
        length = max(self.steps) + 1
        best = torch.full((length, n), -math.inf)
        for step, hit, loss, active in zip(
            self.steps, self.hits, self.losses, self.active, strict=True
        ):
            rows = active.cpu()
            best[step].scatter_reduce_(0, rows, loss.cpu(), "amax")
            new = rows[hit.cpu()]
            new = new[first[new] < 0]
            first[new] = step
        running = best.cummax(0).values
        last = running[-1]
        span = last - running[0]
        window = max(1, min(10, (length - 1) // 10))
        before = running[max(0, length - 1 - window)]
        rising = span > 0
        gain[rising] = ((last - before) / span.clamp_min(1e-30)).double()[rising]
        return {"first_hit": first, "late_gain": gain.clamp(0, 1)}


class _Counted(nn.Module):
    """Counts images that pass forward and backward through a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.forwards, self.backwards = model, 0, 0

    @property
    def stochastic(self) -> bool:
        return is_stochastic(self.model)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        self.forwards += len(x)
        logits = call(self.model, x, keys)
        if logits.requires_grad:
            logits.register_hook(self._passed_back)
        return logits

    def _passed_back(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


@dataclass(frozen=True)
class Attacked:
    """Adversarial examples of a shard, and what making them took."""

    x_adv: Tensor
    forwards: int
    backwards: int
    first_hit: Tensor
    late_gain: Tensor


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

    Raises:
        ConfigError: If the attack does not support the norm, wants another norm or a larger budget
            than the threat model, or would ignore that the view is random.
    """

    attack: ParsedAttack
    view: nn.Module
    norm: str
    eps: float
    targeted: bool = False
    transferred: bool = False

    def __post_init__(self) -> None:
        info, own = self.attack.info, self.attack.effective
        if self.norm not in info.norms:
            raise ConfigError(
                f"attack {info.name!r} has no norm {self.norm!r}; it has {', '.join(info.norms)}"
            )
        typed_norm = own("norm") if self._fixes("norm") else self.norm
        if typed_norm != self.norm:
            raise ConfigError(
                f"attack {self.attack.text!r} uses norm {typed_norm!r}, the threat model "
                f"{self.norm!r}; give --norm {typed_norm}"
            )
        if self._fixes("eps") and own("eps") is not None and own("eps") > self.eps * (1 + 1e-9):
            raise RangeError(
                f"attack {self.attack.text!r} has eps {own('eps'):g}, more than the threat model's "
                f"{self.eps:g}; raise --eps or lower the attack's"
            )
        if is_stochastic(self.view) and info.knowledge == "gradient":
            self._refuse_single_draws()

    def _fixes(self, key: str) -> bool:
        preset = self.attack.info.presets.get(str(self.attack.kwargs.get("preset")), {})
        return key in self.attack.kwargs or key in preset

    def _refuse_single_draws(self) -> None:
        given = self.attack.kwargs.get("gradient")
        if given is backprop:
            raise ConfigError(
                f"attack {self.attack.text!r} follows one draw of a random pipeline; use "
                f"gradient=eot({EOT_DRAWS}), or leave the keyword out"
            )

    def settings(self) -> dict[str, Any]:
        """The keywords that the attack is called with, but for data, seed and trace."""
        parameters = self.attack.info.parameters
        out: dict[str, Any] = dict(self.attack.kwargs)
        if "norm" in parameters and not self._fixes("norm"):
            out["norm"] = self.norm
        if "eps" in parameters and not self._fixes("eps"):
            out["eps"] = self.eps
        if "targeted" in parameters:
            out["targeted"] = self.targeted
        elif self.targeted:
            raise ConfigError(f"attack {self.attack.info.name!r} has no targeted form")
        if "gradient" in parameters and "gradient" not in out and is_stochastic(self.view):
            out["gradient"] = eot(EOT_DRAWS)
        if "stop" in parameters and not self._fixes("stop") and self.transferred:
            out["stop"] = "never"
        return out

    def run(self, x: Tensor, y: Tensor, keys: Tensor, batch_size: int) -> Attacked:
        """Attack `x` in batches; `y` are targets if the threat is targeted.

        Args:
            x: (N, C, H, W) in [0, 1].
            y: (N,) labels or targets.
            keys: (N,) keys of the samples.
            batch_size: Images per call.
        """
        counted = _Counted(self.view).train(self.view.training)
        settings, parts, notes = self.settings(), [], []
        attack_keys = random.fold(keys, "attack")
        for start in range(0, len(x), batch_size):
            pick = slice(start, start + batch_size)
            recorder = Recorder(y[pick], self.targeted)
            extra: dict[str, Any] = {"seed": attack_keys[pick]}
            if "trace" in self.attack.info.parameters and settings.get("trace") is None:
                extra["trace"] = recorder
            parts.append(self.attack.info.component(counted, x[pick], y[pick], **settings, **extra))
            notes.append(recorder.summary())
        return Attacked(
            torch.cat(parts) if parts else x.clone(),
            counted.forwards,
            counted.backwards,
            torch.cat([n["first_hit"] for n in notes]),
            torch.cat([n["late_gain"] for n in notes]),
        )
