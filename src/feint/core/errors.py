"""Typed errors. Each says what was got, what was expected, and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FeintError(Exception):
    """Base of every error that Feint raises on purpose; the command line exits with 2 on it."""


class ShapeError(FeintError, ValueError):
    """A tensor has another shape than the one documented."""


class RangeError(FeintError, ValueError):
    """A value lies outside its documented range (for images: [0, 1])."""


class DtypeError(FeintError, TypeError):
    """A tensor or argument has another type than the one documented."""


class DeviceError(FeintError, ValueError):
    """Two tensors that belong together live on different devices."""


class GradientError(FeintError, RuntimeError):
    """A gradient does not reach the input, or is identically zero for a structural reason.

    Attributes:
        module: Qualified name of the module where the gradient is lost, if it could be found.
    """

    def __init__(self, message: str, module: str | None = None) -> None:
        super().__init__(message)
        self.module = module


class UnknownNameError(FeintError, LookupError):
    """A name (attack, defense, keyword, recipe …) that nobody registered."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
        super().__init__(f"unknown {kind} {name!r}; {hint}")
        self.kind, self.name, self.known = kind, name, known


class ConfigError(FeintError, ValueError):
    """A specification, file or option that cannot mean anything."""


class DataError(FeintError, OSError):
    """A file that is missing, truncated, corrupted or not what its name says."""


class ModelError(FeintError, RuntimeError):
    """A model that breaks the contract: NaN logits, a wrong batch size, one class."""
