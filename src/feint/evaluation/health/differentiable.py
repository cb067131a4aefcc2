"""Which parts of a pipeline pass no gradient, and how good their stand-ins are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.gradients import call
from feint.defenses.base import Defense, choose_rules
from feint.defenses.chain import Chain
from feint.evaluation.cell import Cell
from feint.evaluation.findings import Finding
from feint.evaluation.properties import BUDGET, _cosine, _pushed
from feint.evaluation.shard import Batch, Subject

__all__ = ["FEW", "PASSES", "check_parts", "lost_parts"]

FEW = 2
"""Samples that are differentiated module by module."""
PASSES = 14
"""Forward passes that this takes for each, about: a backward pass for every level of nesting."""
SOME = 4
"""Samples on which a stand-in is measured, which takes no pass through the model."""
FAITHFUL = 0.1
"""Cosine between what a stand-in foretells and what happens, below which it is no stand-in."""


_TURN = 2.399963229728653
"""The golden angle: its multiples fill the circle without repeating."""


def check_parts(
    subject: Subject, cell: Cell, batch: Batch, name: str, count: int = FEW
) -> Iterator[Finding]:
    """The differentiability map of the attacker's view, and the fidelity of its stand-ins.

    Args:
        subject: The cell's objects.
        cell: A cell whose attacker knows the pipeline.
        batch: A few samples.
        name: The pipeline in words.
        count: Samples that are differentiated module by module.

    Cost: a forward pass of so many samples, twice if there is a defense, and a backward pass of
        every module by itself.
    """
    some = batch.select(slice(0, SOME))
    keys = random.keys(cell.seed, some.index).to(some.x.device)
    few = batch.x[:count]
    seen = lost_parts(subject.attacked(cell), few, keys[:count])
    deployed = seen
    if subject.defense is not None:  # the model's own parts are the same in both
        found = lost_parts(subject.pipeline(cell), few, keys[:count], "defense")
        deployed = found | {k: v for k, v in seen.items() if k.split(".")[0] != "defense"}
    evidence = (
        f"{len(seen)} parts of the attacker's view pass no usable gradient{_listed(seen)}; of the "
        f"deployed pipeline {len(deployed)}{_listed(deployed)}"
    )
    defense = subject.defense
    if deployed and not seen:
        rule = cell.backward if cell.backward != "default" else _rule(defense)
        evidence += f"; stood in for by: {rule}"
    elif seen:
        evidence += "; declare a backward rule for it, or attack scores (gradient=spsa(64))"
    asked = subject.attacker(cell).attack.needs_gradient
    if seen and not asked:
        evidence += "; the attack asks for scores only"
    yield Finding("differentiable-parts", "warn" if seen and asked else "pass", name, evidence)
    if defense is not None and _replaced(defense, cell):
        yield _fidelity(defense.bind(subject.model), cell, some.x, keys, name)


def _listed(parts: dict[str, str]) -> str:
    if not parts:
        return ""
    shown = [f"{part!r} {what}" for part, what in list(parts.items())[:4]]
    more = f" and {len(parts) - 4} more" if len(parts) > 4 else ""
    return f" ({', '.join(shown)}{more})"


def _rule(defense: Defense | None) -> str:
    if isinstance(defense, Chain):
        return " + ".join(part.recommended_rule for part in defense.members)
    return "nothing" if defense is None else defense.recommended_rule


def _replaced(defense: Defense, cell: Cell) -> bool:
    """Whether the view's derivative is not the defense's own."""
    if cell.backward not in ("default", "exact"):
        return True
    return cell.backward == "default" and set(_rule(defense).split(" + ")) != {"exact"}


def lost_parts(model: nn.Module, x: Tensor, keys: Tensor, within: str = "") -> dict[str, str]:
    """Innermost modules that pass no usable gradient from their output to their input.

    Args:
        model: What is differentiated.
        x: A few images.
        keys: Their keys.
        within: Look at this child only.

    Returns:
        Their names, in the order in which they run, and what is wrong: `"cuts the graph"`,
        `"passes zeros"` or `"passes NaN or infinity"`.
    """
    seen: list[tuple[str, list[Tensor], Tensor]] = []
    handles = []

    def record(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            given = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
            if given and isinstance(output, Tensor) and output.is_floating_point():
                seen.append((name, given, output))

        return hook

    for name, module in model.named_modules():
        if name and (not within or name.split(".")[0] == within):
            handles.append(module.register_forward_hook(record(name)))
    try:
        with torch.enable_grad():
            call(model, x.detach().clone().requires_grad_(), keys)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, str] = {}
    for name, given, output in seen:  # children come before their parents
        if any(other.startswith(f"{name}.") for other in found) or name in found:
            continue
        what = _wrong(given, output)
        if what:
            found[name] = what
    return found


def _wrong(given: list[Tensor], output: Tensor) -> str | None:
    if not output.requires_grad:
        return "cuts the graph"
    # Weights without a pattern: the plain sum of a softmax or of a normalised layer is constant.
    angles = torch.arange(output.numel(), dtype=torch.float64, device=output.device) * _TURN
    weights = angles.cos().to(output.dtype).view_as(output)
    try:
        got = torch.autograd.grad(
            (output * weights).sum(), given, retain_graph=True, allow_unused=True
        )
    except RuntimeError:  # the pipeline has differentiated this part itself, and freed its graph
        return None
    if any(g is not None and not bool(g.isfinite().all()) for g in got):
        return "passes NaN or infinity"
    if all(g is None for g in got):
        return "cuts the graph"
    if all(g is None or not bool(g.any()) for g in got):
        return "passes zeros"
    return None


def _fidelity(defense: Defense, cell: Cell, x: Tensor, keys: Tensor, name: str) -> Finding:
    """How much of a change by ±8/255 the rule in use foretells; in float64, inside of the box."""
    double = copy.deepcopy(defense).double()
    parts = double.members if isinstance(double, Chain) else [double]
    rules = choose_rules(parts, cell.rules)
    x = 0.05 + 0.9 * x.double()
    params = double.sample(x, random.fold(keys, "fidelity draw"))
    sign = 2.0 * random.integers(random.fold(keys, "fidelity"), 0, 2, x.shape[1:]) - 1
    with torch.no_grad():
        happens = double.replay(x + BUDGET * sign, params) - double.replay(x, params)
        foretold = _pushed(double, rules, x, params, sign)
    cosine = float(_cosine(foretold, happens).mean())
    evidence = (
        f"of a random change by ±8/255 in front of {defense}, its stand-in foretells the direction "
        f"with a cosine of {cosine:.2f} (warn below {FAITHFUL:g})"
    )
    if not isinstance(double, Chain):
        with torch.no_grad():
            apart = (double.stand_in(rules[0])(x, params) - double.replay(x, params)).square()
        evidence += f"; the two are {float(apart.mean().sqrt()):.2g} apart (rms)"
    return Finding("stand-in-fidelity", "warn" if cosine < FAITHFUL else "pass", name, evidence)
