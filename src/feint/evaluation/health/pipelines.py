"""Checks of a deployed pipeline itself, on a few samples."""

from __future__ import annotations

import random as python_random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from feint.core import random
from feint.core.gradients import call, is_stochastic
from feint.evaluation.cell import Cell
from feint.evaluation.findings import Finding, Status
from feint.evaluation.health.declare import DIFFERENT, Undeclared, unlike
from feint.evaluation.health.differentiable import check_parts
from feint.evaluation.health.gradients import check_gradient, check_slope
from feint.evaluation.health.words import knows
from feint.evaluation.shard import Batch, Subject
from feint.evaluation.verdict import name_of

__all__ = ["CONTRACT", "check_contract", "check_pipeline"]

COUPLED = 1e-3
"""Logits alone and in a batch may differ by this share of the largest: rounding stays below."""
ALONE = 8
"""Samples that are asked alone."""


CONTRACT = (
    "input-and-mode",
    "outputs-are-logits",
    "declared-randomness",
    "batch-independence",
    "static-state",
    "static-process",
)
"""What `check_contract` looks at."""
_MODAL = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.dropout._DropoutNd,
)
"""Modules that do something else in training mode."""


def check_pipeline(
    subject: Subject, cell: Cell, batch: Batch, *, batch_size: int = 128, left: float = 1.0
) -> Iterator[Finding]:
    """Checks of a deployed pipeline and of the attacker's view of it.

    Args:
        subject: The cell's objects.
        cell: A cell of the pipeline; if its attacker knows the pipeline, his view is checked, too.
        batch: A few samples.
        batch_size: Images per forward pass of the gradient checks.
        left: Accuracy that the cell's attack left.

    Cost: about 40 forward passes per sample, and 16 backward passes if the pipeline is stochastic.
    """
    name = name_of(cell.model, cell.defense)
    yield from check_contract(subject, cell, batch, name)
    if knows(cell):
        yield from check_parts(subject, cell, batch, name)
        yield from check_gradient(subject, cell, batch, name, batch_size, left)
        yield from check_slope(subject, cell, batch, name, batch_size)


@torch.no_grad()
def check_contract(subject: Subject, cell: Cell, batch: Batch, name: str) -> Iterator[Finding]:
    """Inputs, outputs, randomness, batch-mates and state: the checks of `CONTRACT`.

    Args:
        subject: The cell's objects.
        cell: A cell of the pipeline.
        batch: A few samples.
        name: The pipeline in words.

    Cost: eight forward passes per sample.
    """
    pipeline = subject.pipeline(cell)
    keys = random.keys(cell.seed, batch.index).to(batch.x.device)
    before, states = _generators(), _state(pipeline, copy=True)
    with _Asked() as asked:
        logits = call(pipeline, batch.x, keys)
    after, now = _generators(), _state(pipeline)
    yield _input(pipeline, batch.x, name)
    yield _probabilities(logits, name)
    yield _randomness(pipeline, batch.x, keys, logits, name)
    yield _coupling(pipeline, batch.x, keys, logits, name)
    yield _static(states, now, name)
    drawn = [kind for kind in before if before[kind] != after.get(kind)]
    yield _process(drawn, asked.gradients, name)


def _input(pipeline: nn.Module, x: Tensor, name: str) -> Finding:
    training = [n for n, m in pipeline.named_modules() if m.training and isinstance(m, _MODAL)]
    low, high = (float(x.min()), float(x.max())) if x.numel() else (0.0, 1.0)
    fits = x.is_floating_point() and low >= 0 and high <= 1  # NaN is neither
    evidence = (
        f"{str(x.dtype).removeprefix('torch.')} images in [{low:.3g}, {high:.3g}] (expected "
        f"[0, 1]); {len(training)} modules of batch normalisation or dropout in training mode"
    )
    if training:
        evidence += f" (first: {training[0]}); call model.eval()"
    return Finding("input-and-mode", "pass" if fits and not training else "fail", name, evidence)


def _probabilities(logits: Tensor, name: str) -> Finding:
    inside = bool(((logits >= 0) & (logits <= 1)).all())
    off = float((logits.sum(1) - 1).abs().max())
    looks = inside and off < 1e-3
    evidence = (
        f"outputs lie in [{float(logits.min()):.3g}, {float(logits.max()):.3g}] and their sums "
        f"are off 1 by at most {off:.2g} (probabilities if in [0, 1] and below 1e-3)"
    )
    if looks:
        evidence += "; a softmax hides gradients: give the logits before it"
    return Finding("outputs-are-logits", "fail" if looks else "pass", name, evidence)


def _unkeyed(pipeline: nn.Module) -> bool:
    return any(isinstance(m, Undeclared) and not m.keyed for m in pipeline.modules())


def _randomness(pipeline: nn.Module, x: Tensor, keys: Tensor, logits: Tensor, name: str) -> Finding:
    declared = is_stochastic(pipeline)
    again = unlike(call(pipeline, x, keys), logits)
    others = [call(pipeline, x, random.fold(keys, "other", n)) for n in range(4)]
    spread = max(unlike(other, logits) for other in others)
    wrapped = any(isinstance(m, Undeclared) for m in pipeline.modules())
    evidence = (
        f"declared {'stochastic' if declared else 'deterministic'}; with the same keys logits "
        f"differ by {again:.2g} of the largest, with others by up to {spread:.2g} (threshold "
        f"{DIFFERENT:g})"
    )
    status: Status = "pass"
    if again > DIFFERENT and declared and wrapped:
        status, evidence = "warn", evidence + "; its draws cannot be repeated"
    elif again > DIFFERENT or (spread > DIFFERENT and not declared):
        status = "fail"
    elif declared and spread <= DIFFERENT:
        status, evidence = "warn", evidence + "; no randomness was seen"
    return Finding("declared-randomness", status, name, evidence)


def _coupling(pipeline: nn.Module, x: Tensor, keys: Tensor, logits: Tensor, name: str) -> Finding:
    check = "batch-independence"
    if _unkeyed(pipeline):
        evidence = (
            "its randomness takes no keys, so an influence of batch-mates cannot be told from luck"
        )
        return Finding(check, "warn", name, evidence)
    few = min(ALONE, len(x))
    try:
        one = [call(pipeline, x[i : i + 1], keys[i : i + 1]) for i in range(few)]
    except (RuntimeError, ValueError) as error:  # batch normalisation refuses a batch of one
        evidence = f"a sample alone is refused ({error}); call model.eval()"
        return Finding(check, "fail", name, evidence)
    moved = call(pipeline, x.roll(1, 0), keys.roll(1, 0)).roll(-1, 0)
    off = max(unlike(torch.cat(one), logits[:few]), unlike(moved, logits))
    evidence = (
        f"logits of {few} samples alone and in their batch, and of all in other places of it, "
        f"differ by {off:.2g} of the largest logit (threshold {COUPLED:g})"
    )
    if off > COUPLED:
        evidence += "; samples influence each other: batch normalisation in training mode?"
    return Finding(check, "fail" if off > COUPLED else "pass", name, evidence)


def _state(pipeline: nn.Module, copy: bool = False) -> dict[str, Tensor]:
    named = {**dict(pipeline.named_parameters()), **dict(pipeline.named_buffers())}
    return {k: v.detach().clone() if copy else v.detach() for k, v in named.items()}


def _static(before: dict[str, Tensor], after: dict[str, Tensor], name: str) -> Finding:
    changed = [k for k, v in after.items() if k not in before or not _same(v, before[k])]
    evidence = f"{len(changed)} of {len(before)} parameters and buffers change in a forward pass"
    if changed:
        evidence += (
            f" (first: {changed[0]}); the pipeline adapts to what it is asked, or batch "
            "normalisation is in training mode"
        )
    return Finding("static-state", "fail" if changed else "pass", name, evidence)


class _Asked(TorchFunctionMode):
    """Counts the gradients that are asked for while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.gradients = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.autograd.grad, torch.autograd.backward, Tensor.backward):
            self.gradients += 1
        return func(*args, **(kwargs or {}))


def _generators() -> dict[str, bytes]:
    """The state of every global generator that a forward pass could use."""
    kind, state, *rest = np.random.get_state()  # noqa: NPY002 (looked at, not used)
    found = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": repr((kind, *rest)).encode() + np.asarray(state).tobytes(),
        "python": repr(python_random.getstate()).encode(),
    }
    if torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state().numpy().tobytes()
    return found


def _process(drawn: list[str], gradients: int, name: str) -> Finding:
    evidence = (
        f"a forward pass draws from {len(drawn)} global generators and asks for "
        f"{gradients} gradients of its own"
    )
    if drawn:
        evidence += f" (drawn from: {', '.join(drawn)}; such draws cannot be repeated)"
    if gradients:
        evidence += "; a pipeline that optimises while it answers must be attacked through that"
    bad = bool(drawn) or gradients > 0
    return Finding("static-process", "warn" if bad else "pass", name, evidence)


def _same(value: Tensor, before: Tensor) -> bool:
    if value.shape != before.shape or value.dtype != before.dtype:
        return False
    return bool(((value == before) | (value.isnan() & before.isnan())).all())
