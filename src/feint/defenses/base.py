"""What a defense is: declared facts, a draw apart from its use, and named backward rules.

A defense maps images to images. It separates *drawing* its randomness (`draw`) from *applying* it
(`transform`), so that one draw can be replayed, shared or averaged over. Each backward rule is a
differentiable stand-in for `transform`: the attacker's view keeps the exact forward pass and takes
the vector–Jacobian product of the stand-in (BPDA, Athalye et al. 2018).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.checks import check_images, check_keys
from feint.core.errors import UnknownNameError

__all__ = ["Defense", "Params", "View", "backward_rule"]

Params = dict[str, Tensor]
"""What one draw gives: named tensors, each with the batch as its first axis."""

Rule = Callable[[Any, Tensor, Params], Tensor]


def backward_rule(name: str) -> Callable[[Rule], Rule]:
    """Declare a method `(self, x, params) -> x` as the backward rule `name` of its class."""

    def mark(method: Rule) -> Rule:
        method._backward_rule = name  # type: ignore[attr-defined]
        return method

    return mark


class Defense(nn.Module):
    """Base of every defense: override `transform`, and `draw` if it is random.

    Class facts, verified by the contract tests:
        differentiable: autograd through `transform` gives its true gradient.
        stochastic: the output depends on a draw.
        bounded: images in [0, 1] stay in [0, 1]; false for modules trained with the classifier,
            which feed it features rather than images.

    Convention:
        Float RGB, NCHW, [0, 1] in; the same shape out unless the docstring says otherwise.
    """

    differentiable: ClassVar[bool] = True
    stochastic: ClassVar[bool] = False
    bounded: ClassVar[bool] = True

    def draw(self, keys: Tensor, shape: torch.Size) -> Params:
        """Draw this defense's randomness for a batch.

        Args:
            keys: (B,) int64, one per sample.
            shape: Shape of the batch that `transform` will get, (B, C, H, W).

        Returns:
            Named tensors with the batch first; empty for a deterministic defense.
        """
        return {}

    def transform(self, x: Tensor, params: Params) -> Tensor:
        """Apply the defense with a given draw; deterministic in `(x, params)`."""
        raise TypeError(f"{type(self).__name__} must define transform(x, params)")

    @final  # type: ignore[misc]
    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """Draw, then transform.

        Args:
            x: Images, (B, C, H, W), in [0, 1].
            keys: (B,) int64 for a reproducible draw; without them the operating system's entropy.
        """
        return self.transform(x, self.sample(x, keys))

    @final
    def sample(self, x: Tensor, keys: Tensor | None) -> Params:
        """The draw that `forward(x, keys)` uses."""
        if not self.stochastic:
            return {}
        if keys is None:
            keys = random.entropy_keys(len(x), x.device)
        check_keys(keys, len(x))
        return self.draw(keys, x.shape)

    @final  # type: ignore[misc]
    def __call__(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """Check the images (unless the defense works on features), then `forward`."""
        if self.bounded:
            check_images(x)
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

    @final
    def view(self, backward: str | None = None) -> View:
        """The attacker's view: exact forward pass, the chosen rule backward.

        Args:
            backward: A declared rule; by default the first one (`"exact"` where it exists).
        """
        rules = self.backward_rules()
        if backward is None:
            if not rules:
                raise UnknownNameError(f"backward rule of {type(self).__name__}", "default", rules)
            backward = rules[0]
        return View(self, backward)


class _Substitute(torch.autograd.Function):
    """`exact(x)` forward, the vector–Jacobian product of `stand_in` at `x` backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exact: Any, stand_in: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.stand_in = stand_in
        with torch.no_grad():
            y: Tensor = exact(x)
        return y.clone() if y is x else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            out = ctx.stand_in(leaf)
            (g,) = torch.autograd.grad(out, leaf, grad)
        return g, None, None


class View(nn.Module):
    """A defense with one of its backward rules: bit-exact forward, substituted backward.

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

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """`defense(x, keys)`, with this view's derivative."""
        params = self.defense.sample(x, keys)
        if self.backward_rule == "exact":
            return self.defense.transform(x, params)
        result: Tensor = _Substitute.apply(
            x,
            lambda z: self.defense.transform(z, params),
            lambda z: self._stand_in(z, params),
        )
        return result

    def extra_repr(self) -> str:
        """The rule."""
        return f"backward={self.backward_rule!r}"
