"""What a defense is: declared facts, a draw apart from its use, and named backward rules.

A defense maps images to images. It separates *drawing* its randomness (`draw`) from *applying* it
(`transform`), so that one draw can be replayed, shared or averaged over. Each backward rule is a
differentiable stand-in for `transform`: the attacker's view keeps the exact forward pass and takes
the vector–Jacobian product of the stand-in (BPDA, Athalye et al. 2018).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from feint.core import random
from feint.core.checks import check_images, check_keys
from feint.core.errors import ConfigError, DtypeError, ShapeError, UnknownNameError
from feint.core.registry import DEFENSES
from feint.core.spec import format_call, format_value

__all__ = ["Backward", "Defense", "Params", "View", "backward_rule", "choose_rules"]

Params = dict[str, Tensor]
"""What one draw gives: named tensors, each with the batch as its first axis."""

Backward = str | Sequence[str | None] | Mapping[int | str, str]
"""How a view's parts are differentiated: one rule, one per part, or by position or name."""

Rule = Callable[[Any, Tensor, Params], Tensor]


def backward_rule(name: str) -> Callable[[Rule], Rule]:
    """Declare a method `(self, x, params) -> x` as the backward rule `name` of its class."""

    def mark(method: Rule) -> Rule:
        method._backward_rule = name  # type: ignore[attr-defined]
        return method

    return mark


class Defense(nn.Module):
    """Base of every defense: override `transform`, and `draw` if it is random.

    Class facts, verified by the contract tests for the default configuration; an instance whose
    configuration changes a fact (a shift made random) sets it on itself:
        differentiable: autograd through `transform` gives its true gradient, and that is of use.
        stochastic: the output depends on a draw.
        bounded: images in [0, 1] stay in [0, 1]; false for modules trained with the classifier,
            which feed it features rather than images.
        best_rule: the backward rule that an attacker should use unless he knows better. By default
            `"exact"` for a differentiable defense, otherwise the rule declared last.

    Convention:
        Float RGB, NCHW, [0, 1] in; the same shape, dtype and device out. Equal keywords are the
        same defense: `config` has them all, `spec` the ones that differ from the defaults.
    """

    differentiable: ClassVar[bool] = True
    stochastic: ClassVar[bool] = False
    bounded: ClassVar[bool] = True
    best_rule: ClassVar[str | None] = None

    _config: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _recorded(cls.__init__)  # type: ignore[method-assign]

    def draw(self, keys: Tensor, shape: torch.Size) -> Params:
        """Draw this defense's randomness for a batch.

        Args:
            keys: (B,) int64, one per sample.
            shape: Shape of the batch that `transform` will get, (B, C, H, W).

        Returns:
            Named tensors with the batch first; empty for a deterministic defense.
        """
        return {}

    def support(
        self, shape: torch.Size, device: torch.device | str | None = None
    ) -> tuple[Params, ...] | None:
        """Every draw that `draw` can give, if they are few and equally likely.

        With it an attacker takes the expectation over the draws exactly instead of sampling it.

        Args:
            shape: Shape of the batch that `transform` will get.
            device: Where the parameters are wanted.

        Returns:
            One `Params` for the whole batch per possible draw; `({},)` for a deterministic
            defense; None if the draws are too many or not equally likely.
        """
        return None if self.stochastic else ({},)

    def transform(self, x: Tensor, params: Params) -> Tensor:
        """Apply the defense with a given draw; deterministic in `(x, params)`."""
        raise TypeError(f"{type(self).__name__} must define transform(x, params)")

    def bind(self, model: nn.Module) -> Defense:
        """This defense in front of `model`: a copy that knows it, or itself if it need not know.

        A pipeline calls it, so that a defense may look at the classifier that it protects (a map of
        what the classifier attends to) while the same object can stand in front of several.

        Args:
            model: Maps images in [0, 1] to logits.
        """
        return self

    @final  # type: ignore[misc]
    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """Draw, then transform.

        Args:
            x: Images, (B, C, H, W), in [0, 1].
            keys: (B,) int64 for a reproducible draw; without them the operating system's entropy.
        """
        return self.replay(x, self.sample(x, keys))

    @final
    def sample(self, x: Tensor, keys: Tensor | None) -> Params:
        """The draw that `forward(x, keys)` uses."""
        if not self.stochastic:
            return {}
        if keys is None:
            keys = random.entropy_keys(len(x), x.device)
        check_keys(keys, len(x))
        return self.draw(keys, x.shape)

    @final
    def replay(self, x: Tensor, params: Params) -> Tensor:
        """`transform` as `forward` runs it: images keep their precision under autocast."""
        with self.precision(x):
            return self.transform(x, params)

    @final
    def precision(self, x: Tensor) -> AbstractContextManager[object]:
        """Autocast off for defenses on images: bfloat16 has fewer levels than an 8-bit image.

        Modules trained with the classifier (`bounded` false) run in whatever surrounds them.
        """
        return torch.autocast(x.device.type, enabled=False) if self.bounded else nullcontext()

    @final  # type: ignore[misc]
    def __call__(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """Check the input, then `forward`. Features (`bounded` false) may have any values.

        Raises:
            ShapeError, DtypeError, RangeError: If `x` is no batch of images in [0, 1].
        """
        if self.bounded:
            check_images(x)
        elif not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise DtypeError(f"x has type {got}; expected a floating-point tensor (B, C, H, W)")
        elif x.ndim != 4:
            raise ShapeError(f"x has shape {tuple(x.shape)}; expected (B, C, H, W)")
        result: Tensor = super().__call__(x, keys)
        return result

    @classmethod
    def backward_rules(cls) -> tuple[str, ...]:
        """Names of the declared rules; `"exact"` (autograd) comes first if it is the truth."""
        names = [
            rule
            for klass in reversed(cls.__mro__)
            for value in vars(klass).values()
            if (rule := getattr(value, "_backward_rule", None))
        ]
        return (("exact",) if cls.differentiable else ()) + tuple(dict.fromkeys(names))

    @property
    def recommended_rule(self) -> str:
        """`best_rule` if it is set, else `"exact"` where it exists, else the rule declared last.

        Raises:
            UnknownNameError: If the class is not differentiable and declares no rule.
        """
        if self.best_rule is not None:
            return self.best_rule
        rules = self.backward_rules()
        if not rules:
            raise UnknownNameError(f"backward rule of {type(self).__name__}", "default", rules)
        return "exact" if "exact" in rules else rules[-1]

    def stand_in(self, rule: str) -> Callable[[Tensor, Params], Tensor]:
        """The differentiable function whose derivative the rule uses.

        Raises:
            UnknownNameError: If this class does not declare the rule.
        """
        if rule == "exact" and self.differentiable:
            return self.transform
        for klass in type(self).__mro__:
            for attribute, value in vars(klass).items():
                if getattr(value, "_backward_rule", None) == rule:
                    return getattr(self, attribute)  # type: ignore[no-any-return]
        kind = f"backward rule of {type(self).__name__}"
        raise UnknownNameError(kind, rule, self.backward_rules())

    def view(self, backward: Backward | None = None) -> View:
        """The attacker's view: exact forward pass, the chosen rule backward.

        Args:
            backward: A declared rule; by default `recommended_rule`. The forms that a chain takes
                (a list, a mapping by position or name) work for a chain of one, too.
        """
        (rule,) = choose_rules([self], backward)
        return View(self, rule)

    @property
    def name(self) -> str:
        """The registered name; the class's own if it is not registered."""
        found = (n for n in DEFENSES if DEFENSES[n].component is type(self))
        return next(found, type(self).__name__)

    @property
    def config(self) -> dict[str, Any]:
        """Every keyword with the value in force: given, from the preset, or default."""
        return dict(vars(self).get("_config", {}))

    @property
    def usual(self) -> dict[str, Any]:
        """Defaults that depend on other keywords: what a keyword left out (None) stands for."""
        return {}

    @property
    def spec(self) -> str:
        """The canonical expression: the name and the keywords that differ from the defaults."""
        name, config = self.name, self.config
        defaults = {key: p.default for key, p in inspect.signature(type(self)).parameters.items()}
        if name in DEFENSES and config.get("preset") is not None:
            defaults |= dict(DEFENSES[name].presets.get(config["preset"], {}))
        defaults |= self.usual
        return format_call(
            name,
            {k: _like(v, defaults[k]) for k, v in config.items() if not _same(v, defaults[k])},
        )

    def __str__(self) -> str:
        return self.spec

    def extra_repr(self) -> str:
        """The configuration."""
        return ", ".join(f"{key}={format_value(value)}" for key, value in self.config.items())


def _recorded(init: Callable[..., None]) -> Callable[..., None]:
    """`__init__`, which also keeps its arguments in `_config`; the outermost class's count."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: Defense, *args: Any, **kwargs: Any) -> None:
        if "_config" not in vars(self):
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            config = dict(list(bound.arguments.items())[1:])
            object.__setattr__(self, "_config", config)
        init(self, *args, **kwargs)

    return wrapper


def _same(value: object, default: object) -> bool:
    if isinstance(value, Tensor) or isinstance(default, Tensor):
        return value is default
    return bool(value == default) and isinstance(value, bool) == isinstance(default, bool)


def _like(value: object, default: object) -> object:
    """Whole numbers as floats where the default is one, so that `10` and `10.0` are the same."""
    return float(value) if type(value) is int and isinstance(default, float) else value


def choose_rules(parts: Sequence[Defense], backward: Backward | None) -> list[str]:
    """One rule per part.

    Args:
        parts: Defenses in the order in which they are applied.
        backward: None takes every part's `recommended_rule`. A string is taken by every part that
            is not differentiable, while the others stay exact; if all are differentiable (or there
            is one part only), by those that declare it. A sequence has one entry per part, None
            for the recommended one. A mapping names parts by position or by registered name; the
            parts that it leaves out take the recommended rule.

    Raises:
        UnknownNameError: A rule that its part does not declare, or a part that is not there.
        ConfigError: A sequence of another length than the parts.
    """
    if backward is None:
        return [part.recommended_rule for part in parts]
    if isinstance(backward, str):
        return _spread(parts, backward)
    if isinstance(backward, Mapping):
        names = [part.name for part in parts]
        for key in backward:
            if key not in names and not (isinstance(key, int) and 0 <= key < len(parts)):
                known = [*names, *map(str, range(len(parts)))]
                raise UnknownNameError("part of the chain", str(key), known)
        backward = [backward.get(i, backward.get(name)) for i, name in enumerate(names)]
    if len(backward) != len(parts):
        raise ConfigError(
            f"backward has {len(backward)} rules; expected {len(parts)}, one for each of "
            f"{', '.join(part.name for part in parts)}"
        )
    chosen = [
        part.recommended_rule if rule is None else rule
        for part, rule in zip(parts, backward, strict=True)
    ]
    for part, rule in zip(parts, chosen, strict=True):
        part.stand_in(rule)  # raises if it is not declared
    return chosen


def _spread(parts: Sequence[Defense], rule: str) -> list[str]:
    if rule == "exact" or len(parts) == 1:
        for part in parts:
            part.stand_in(rule)
        return [rule] * len(parts)
    hard = [part for part in parts if not part.differentiable]
    for part in hard:
        part.stand_in(rule)
    takers = hard or [part for part in parts if rule in part.backward_rules()]
    if not takers:
        known = {r for part in parts for r in part.backward_rules()}
        raise UnknownNameError("backward rule of the chain", rule, known)
    return [rule if any(part is t for t in takers) else "exact" for part in parts]


class _Substitute(torch.autograd.Function):
    """`exact(x)` forward, the vector–Jacobian product of `stand_in` at `x` backward.

    The stand-in runs in the backward pass only, under the autocast state of the forward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, exact: Any, stand_in: Any) -> Tensor:
        device = x.device.type
        ctx.save_for_backward(x)
        ctx.stand_in = stand_in
        ctx.autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        y: Tensor = exact(x)  # autograd is off inside of forward
        shared = y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        return y.clone() if shared else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        enabled, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast(x.device.type, dtype=dtype, enabled=enabled):
            leaf = x.detach().requires_grad_()
            out = ctx.stand_in(leaf)
        (g,) = torch.autograd.grad(out, leaf, grad.to(out.dtype))
        return g, None, None


class View(nn.Module):
    """A defense with one of its backward rules: bit-exact forward, substituted backward.

    Images are not checked, so that a step of an attack does not wait for the device.

    Cost: one `transform` forward; backward, one forward and backward of the stand-in.
    """

    def __init__(self, defense: Defense, backward: str) -> None:
        super().__init__()
        self.defense, self.backward_rule = defense, backward
        self._stand_in = defense.stand_in(backward)

    @property
    def stochastic(self) -> bool:
        """As the defense declares."""
        return self.defense.stochastic

    @final  # type: ignore[misc]
    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """`defense(x, keys)`, with this view's derivative."""
        return self.replay(x, self.defense.sample(x, keys))

    def replay(self, x: Tensor, params: Params) -> Tensor:
        """`defense.replay(x, params)`, with this view's derivative."""
        defense, stand_in = self.defense, self._stand_in
        if self.backward_rule == "exact":
            return defense.replay(x, params)

        def substitute(z: Tensor) -> Tensor:
            with defense.precision(z):
                return stand_in(z, params)

        result: Tensor = _Substitute.apply(x, lambda z: defense.replay(z, params), substitute)
        return result

    def extra_repr(self) -> str:
        """The rule."""
        return f"backward={self.backward_rule!r}"
