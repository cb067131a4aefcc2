"""Chains of defenses, and the expressions that people type for them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from feint.core import random, spec
from feint.core.errors import ConfigError, FeintError, UnknownNameError
from feint.core.registry import DEFENSES
from feint.defenses.base import Backward, Defense, Params, View, choose_rules

__all__ = ["Chain", "parse"]

MAX_SUPPORT = 1024
"""Longest product of the parts' supports that is written out."""


class Chain(Defense):
    """Defenses applied one after the other; itself a defense.

    It is differentiable if every part is, stochastic if any part is, bounded if every part is. A
    chain inside of a chain dissolves into its parts; a chain without parts is the identity, named
    `none`. The same instance may stand in several places (`fd*3`); its draws are independent.

    Claim: none of its own. Known break: what breaks each part, composed: a view differentiates
    part by part, so no rule has to stand in for all of them at once.

    Args:
        parts: Defenses, the first one applied first.

    Convention:
        The parameters of part i are named `"i.name"`; its keys are the chain's, folded with i, so
        that equal parts draw independently, and a part's draw depends on its place alone.

    Raises:
        ConfigError: If a part is no defense.

    Cost: that of its parts.

    Example:
        >>> import torch
        >>> chain = parse("pixel_shift*2")
        >>> str(chain), chain(torch.rand(2, 3, 8, 8)).shape
        ('pixel_shift*2', torch.Size([2, 3, 8, 8]))

    References:
        Qiu et al., 2020, arXiv:2005.13712, §V (FD + RDG, FD×2 + RDG).
    """

    parts: nn.ModuleList

    def __init__(self, parts: Iterable[Defense]) -> None:
        super().__init__()
        flat: list[Defense] = []
        for part in parts:
            if not isinstance(part, Defense):
                raise ConfigError(
                    f"a chain got a {type(part).__name__}; expected defenses, "
                    "as made by feint.defenses.parse"
                )
            flat.extend(part.members if isinstance(part, Chain) else [part])
        self.parts = nn.ModuleList(flat)
        self._config = {}  # the parts have their own
        self.differentiable = all(p.differentiable for p in flat)  # type: ignore[misc]
        self.stochastic = any(p.stochastic for p in flat)  # type: ignore[misc]
        self.bounded = all(p.bounded for p in flat)  # type: ignore[misc]

    @property
    def members(self) -> tuple[Defense, ...]:
        """The parts in order, repeats included."""
        return tuple(self.parts)  # type: ignore[arg-type]

    def bind(self, model: nn.Module) -> Defense:
        """The chain with every part bound; itself if no part needs to know the model."""
        bound = {id(part): part.bind(model) for part in self.members}
        if all(bound[id(part)] is part for part in self.members):
            return self
        chain = Chain([bound[id(part)] for part in self.members])
        return chain.train(self.training)

    def draw(self, keys: Tensor, shape: torch.Size) -> Params:
        """Every stochastic part's draw, named by its position."""
        params: Params = {}
        for i, part in enumerate(self.members):
            if part.stochastic:
                drawn = part.draw(random.fold(keys, "chain", i), shape)
                params |= {f"{i}.{name}": value for name, value in drawn.items()}
        return params

    def support(
        self, shape: torch.Size, device: torch.device | str | None = None
    ) -> tuple[Params, ...] | None:
        """The product of the parts' supports, if each has one and it is at most 1024 long."""
        supports = [part.support(shape, device) for part in self.members]
        total = 1
        for options in supports:
            total *= len(options) if options is not None else MAX_SUPPORT + 1
        if total > MAX_SUPPORT:
            return None
        named = [
            [{f"{i}.{name}": value for name, value in option.items()} for option in options or ()]
            for i, options in enumerate(supports)
        ]
        return tuple(
            {name: value for option in choice for name, value in option.items()}
            for choice in itertools.product(*named)
        )

    def transform(self, x: Tensor, params: Params) -> Tensor:
        """Each part in turn with its own share of the parameters."""
        for part, own in zip(self.members, self.split(params), strict=True):
            x = part.replay(x, own)
        return x

    def split(self, params: Params) -> list[Params]:
        """The parameters of each part under their own names."""
        shares: list[Params] = [{} for _ in self.members]
        for name, value in params.items():
            position, _, own = name.partition(".")
            shares[int(position)][own] = value
        return shares

    def backward_rules(self) -> tuple[str, ...]:  # type: ignore[override]
        """Rules that `view` takes for the whole chain; unlike a class's they depend on the parts.

        `"exact"` if every part is differentiable, and the rules that all the others declare.
        """
        hard = [part for part in self.members if not part.differentiable]
        names = [rule for part in hard or self.members for rule in part.backward_rules()]
        shared = [n for n in dict.fromkeys(names) if not hard or names.count(n) == len(hard)]
        exact = ("exact",) if self.differentiable else ()
        return exact + tuple(name for name in shared if name != "exact")

    def stand_in(self, rule: str) -> Callable[[Tensor, Params], Tensor]:
        """The chain of the parts' views: exact in value, the rule's in derivative."""
        return self.view(rule).replay

    def view(self, backward: Backward | None = None) -> View:
        """The attacker's view, part by part.

        Args:
            backward: None takes each part's `recommended_rule`; a rule's name goes to the parts
                that are not differentiable; a sequence has one rule (or None) per part; a mapping
                goes by position or registered name: `{"fd": "aligned"}`.

        Raises:
            UnknownNameError: A rule that its part does not declare, or a part that is not there.
            ConfigError: A sequence of another length than the parts.
        """
        return _ChainView(self, choose_rules(self.members, backward))

    @property
    def name(self) -> str:
        """The expression without its keywords."""
        return _join([part.name for part in self.members])

    @property
    def spec(self) -> str:
        """The canonical expression of the whole chain."""
        return _join([part.spec for part in self.members])

    def extra_repr(self) -> str:
        """The expression."""
        return self.spec


def _join(names: list[str]) -> str:
    """Names as a sum, equal neighbours as a repeat."""
    if not names:
        return "none"
    groups = [(name, len(list(group))) for name, group in itertools.groupby(names)]
    return " + ".join(name if n == 1 else f"{name}*{n}" for name, n in groups)


class _ChainView(View):
    """A chain of views, one per part; the chain's own derivative is their composition."""

    defense: Chain

    def __init__(self, chain: Chain, rules: list[str]) -> None:
        nn.Module.__init__(self)
        self.defense = chain
        self.views = [part.view(rule) for part, rule in zip(chain.members, rules, strict=True)]
        self.backward_rule = ", ".join(rules)

    def replay(self, x: Tensor, params: Params) -> Tensor:
        for view, own in zip(self.views, self.defense.split(params), strict=True):
            x = view.replay(x, own)
        return x


def parse(text: str) -> Defense:
    """The defense that an expression describes.

    Args:
        text: Such as `"fd*2 + rand(preset='xie')"`, read from left to right; `"none"` is the
            identity, `Chain([])`. One name alone gives that defense itself, no chain.

    Returns:
        A defense whose `str` is the canonical form of `text`: it parses back to the same.

    Raises:
        UnknownNameError: A name or keyword that does not exist; the nearest one is named.
        ConfigError: Text that cannot be read (with the column), or values that make no sense.

    Example:
        >>> str(parse("jpeg(quality=75) + jpeg + pixel_shift(dx=2)"))
        'jpeg*2 + pixel_shift(dx=2)'
    """
    expression = spec.parse(text)
    if expression == spec.Call("none"):
        return Chain([])
    built: dict[spec.Call, Defense] = {}
    for call in spec.calls(expression):
        if call not in built:
            built[call] = _build(call)
    parts = [built[call] for call in spec.calls(expression)]
    return parts[0] if len(parts) == 1 else Chain(parts)


def _build(call: spec.Call) -> Defense:
    if call.name == "none":
        raise ConfigError("'none' stands alone; leave it out of a chain")
    info = DEFENSES[call.name]
    keywords = call.keywords
    info.check(keywords)
    for key, value in keywords.items():
        if isinstance(value, spec.Call):
            raise ConfigError(
                f"{call.name}: {key} is {value}; expected a number or text; "
                f"quote text: {key}='{value.name}'"
            )
    try:
        result = info.component(**keywords)
    except UnknownNameError:
        raise
    except FeintError as error:
        raise type(error)(f"{call}: {error}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{call}: {error}") from error
    if not isinstance(result, Defense):
        raise ConfigError(f"{call.name} makes a {type(result).__name__}; expected a Defense")
    return result
