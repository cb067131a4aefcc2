"""What a training recipe made on this machine: `trained:NAME`, cached by content."""

from __future__ import annotations

import os
from pathlib import Path

from feint.core.errors import ConfigError, DataError

__all__ = ["cache_folder", "trained_folder", "trained_path"]


def cache_folder() -> Path:
    """Where Feint keeps what can be made again: FEINT_CACHE, or else `~/.cache/feint`."""
    given = os.environ.get("FEINT_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "feint"


def trained_folder(name: str, digest: str) -> Path:
    """The folder for what a training recipe makes, by the recipe's name and content."""
    return cache_folder() / "trained" / f"{name}@{digest}"


def trained_path(name: str) -> Path:
    """The weights of `NAME` or `NAME@DIGEST`: in the cache, or else in `weights/` of a checkout.

    Raises:
        DataError: There are none; the message says how to make them.
        ConfigError: Recipes of several contents left weights of this name.
    """
    stem, at, _ = name.partition("@")
    shelves = [folder / "trained" for folder in (cache_folder(), *_checkout())]
    wanted = f"{name if at else stem + '@*'}/{stem}.safetensors"
    found: dict[str, Path] = {}
    for file in (file for shelf in shelves for file in sorted(shelf.glob(wanted))):
        found.setdefault(file.parent.name, file)
    if not found:
        known = sorted({p.stem for shelf in shelves for p in shelf.glob("*/*.safetensors")})
        there = f"; there are {', '.join(known)}" if known else ""
        raise DataError(
            f"no trained weights {name!r} in {shelves[0]}{there}; make them: feint train {stem}"
        )
    if len(found) > 1:
        names = ", ".join(f"trained:{folder}" for folder in sorted(found))
        raise ConfigError(f"there are several trained weights {stem!r}; say which: {names}")
    return next(iter(found.values()))


def _checkout() -> list[Path]:
    """`weights/` of the repository, if this is run from a checkout of it."""
    source = Path(__file__).parents[2]
    return [source.parent / "weights"] if source.name == "src" else []
