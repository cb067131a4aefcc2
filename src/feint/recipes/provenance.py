"""What a reproduction was made with: the command, models, data and machine, without its folders."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from feint.recipes.lab import Lab, short_spec
from feint.recipes.metrics import Fields
from feint.recipes.schema import Recipe
from feint.store import environment

__all__ = ["models_of", "provenance", "typed"]


def models_of(points: Iterable[Fields]) -> list[str]:
    """Specs of the models that points name."""
    return sorted({str(f[key]) for f in points for key in ("model", "source") if f.get(key)})


def typed(
    recipe: Recipe,
    scale: str,
    models: Mapping[str, str],
    data: Mapping[str, Any],
    sets: Mapping[str, str],
    seed: int,
) -> str:
    """What to type for the same numbers, up to the folders of this machine."""
    words = ["feint", "reproduce", recipe.name, "--scale", scale]
    for role, spec in models.items():
        words += ["--model", f"{role}={short_spec(spec)}"]
    if "spec" in data:
        words += ["--data", short_spec(str(data["spec"]))]
    for role, spec in sets.items():
        words += ["--data", f"{role}={short_spec(spec)}"]
    if "samples" in data:
        words += ["-n", str(data["samples"])]
    if seed:
        words += ["--seed", str(seed)]
    return shlex.join(words)


def provenance(lab: Lab, points: Iterable[Fields], seed: int) -> dict[str, Any]:
    """Fingerprints of the models and data that points name, the seed, and the machine."""
    points = list(points)
    models = {short_spec(spec): lab.loaded(spec).fingerprint[:16] for spec in models_of(points)}
    sets: dict[str, dict[str, Any]] = {}
    for fields in points:
        dataset = lab.dataset(fields)
        name = short_spec(lab.data_of(fields).spec)
        held: dict[str, Any] = {
            "samples": len(dataset),
            "shape": list(dataset.shape),
            "fingerprint": dataset.fingerprint[:16],
        }
        if sets.setdefault(name, held) != held:  # some points are of other samples
            sets[f"{name} @ {held['fingerprint'][:6]}"] = held
    about = environment.describe(lab.device)
    about.pop("platform", None)
    return {"seed": seed, "models": models, "data": sets, **about}
