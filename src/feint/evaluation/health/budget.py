"""What the checks of a run may cost, and how little money is shared out among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from feint.core import random
from feint.core.gradients import call
from feint.evaluation.findings import NOT_RUN, Finding
from feint.evaluation.recorder import Passes
from feint.evaluation.results import CellResult

__all__ = ["FREE", "LEAST", "Active", "Spending", "cost_of", "limit", "make", "operations"]

LEAST = 256.0
"""Passes that the checks of a pipeline may always take: fewer can tell nothing."""
FREE = 1e12
"""Multiplications and additions that nobody waits for long: some ten seconds of one core."""
BACKWARD = 2
"""A backward pass costs about two forward passes, in which everything here is counted."""
OVERDRAWN = 1.5
"""Share of the limit beyond which what was spent is worth a warning: estimates were wrong."""


@dataclass(frozen=True)
class Active:
    """Checks that ask a pipeline again, on as many samples as the budget allows.

    Args:
        checks: The names of the findings that it gives.
        subject: The pipeline in words.
        price: Passes that it takes on so many samples, about; grows with the samples.
        least: Samples below which it says nothing; all, if there are fewer.
        full: Samples that it takes where the budget allows.
        run: Makes the checks on the first so many samples.
    """

    checks: tuple[str, ...]
    subject: str
    price: Callable[[int], float]
    least: int
    full: int
    run: Callable[[int], Iterable[Finding]]


@dataclass
class Spending:
    """What checks may take and have taken, in forward passes; a backward pass counts as two.

    Args:
        limit: What they may take.
        passes: Counts what goes through the models, as it does.
        basis: What the cells that they judge took.
    """

    limit: float
    passes: Passes
    basis: float = 0.0

    @property
    def spent(self) -> float:
        """Passes so far."""
        return self.passes.forwards + BACKWARD * self.passes.backwards

    def finding(self) -> Finding:
        """What the active checks cost, beside what they judge."""
        bad = self.spent > OVERDRAWN * self.limit
        share = self.spent / self.basis if self.basis else math.inf
        return Finding(
            "cost-of-checks",
            "warn" if bad else "pass",
            "run",
            f"{self.passes.forwards} forward and {self.passes.backwards} backward passes, "
            f"{100 * share:.0f} % of what the cells took; the limit is {self.limit:.0f} forward "
            f"passes, of which a backward pass counts as {BACKWARD} (warn above {OVERDRAWN:g} "
            "times the limit)",
        )


def cost_of(result: CellResult) -> float:
    """Forward passes that a cell took, a backward pass counted as two: its attack and its judge."""
    attacked = result.forwards + BACKWARD * result.backwards
    # As floats and, if something was found, rounded to 8 bits.
    asked = len(result.rows["index"]) * result.draws * (1 if result.cell.attack == "none" else 2)
    return result.cell.votes * (attacked + asked)


def limit(share: float, basis: float, pipelines: int, dearest: float) -> float:
    """Passes that the active checks of a run may take.

    The given share of what the cells took, but at least `LEAST` for each pipeline, and what comes
    to `FREE` operations: small models are checked in full whatever their attacks took.

    Args:
        share: Of the basis; infinite for no limit.
        basis: Passes that the cells took.
        pipelines: How many pipelines are checked.
        dearest: Operations of a forward pass of the largest model.
    """
    if math.isinf(share):
        return math.inf
    free = FREE / dearest if dearest > 0 else math.inf
    return max(share * basis, LEAST * pipelines, free)


def make(actives: Sequence[Active], spending: Spending) -> Iterator[list[Finding]]:
    """Make checks within what is left, in order; a list of findings for each.

    While all fit, all are made in full. Else each gets the share of what is left that its full
    price has among those still to come, and takes as many of its samples as that allows, but at
    least `least` of them if what is left at all is enough; what one does not use goes to the next.
    One that cannot be afforded gives a `warn` for each of its checks, which says so.
    """
    prices = [a.price(a.full) for a in actives]
    for position, active in enumerate(actives):
        left = spending.limit - spending.spent
        ahead = sum(prices[position:])
        allowed = left if ahead <= left or not ahead else left * prices[position] / ahead
        count = _most(active, allowed)
        if count is None and active.price(active.least) <= left:
            count = active.least
        if count is None:
            yield [_unaffordable(active, name, left) for name in active.checks]
            continue
        found = list(active.run(count))
        if count < active.full:
            few = f"; on {count} samples instead of {active.full}, within the budget of the checks"
            found = [replace(f, evidence=f.evidence + few) for f in found]
        yield found


def _most(active: Active, allowed: float) -> int | None:
    """The largest number of samples whose price is allowed."""
    if active.price(active.full) <= allowed:
        return active.full
    low, high = active.least - 1, active.full  # price(low) is allowed, or low is too few
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if active.price(middle) <= allowed else (low, middle)
    return low if low >= active.least else None


def _unaffordable(active: Active, name: str, left: float) -> Finding:
    evidence = (
        f"{NOT_RUN}: on {active.least} samples it takes about {active.price(active.least):.0f} "
        f"forward passes, and {max(0.0, left):.0f} are left (--checks budget=none makes it "
        "whatever it costs, budget=2 allows twice what the attacks took)"
    )
    return Finding(name, "warn", active.subject, evidence)


def _conv(out: Tensor, x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * out.numel() * weight[0].numel()


def _transposed(out: Tensor, x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * x.numel() * weight[0].numel()


def _product(out: Tensor, first: Tensor, *_: Any, **__: Any) -> int:
    return 2 * out.numel() * first.shape[-1]


def _attention(out: Tensor, query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    return 2 * key.shape[-2] * (query.numel() + out.numel())


_COUNTS: dict[Callable[..., Any], Callable[..., int]] = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d, torch.conv2d), _conv),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _transposed),
    **dict.fromkeys((F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__), _product),
    **dict.fromkeys((torch.mm, torch.bmm, Tensor.mm, Tensor.bmm), _product),
    F.scaled_dot_product_attention: _attention,
}


class _Operations(TorchFunctionMode):
    """Adds up multiplications and additions of matrix products and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = _COUNTS.get(func)
        if count is not None and isinstance(out, Tensor):
            self.total += _told(count, out, args, kwargs or {})
        return out


def _told(count: Callable[..., int], out: Tensor, args: Any, kwargs: Any) -> int:
    """The count; nothing where the operation was written in a form that it does not know."""
    with suppress(TypeError, AttributeError, IndexError):
        return count(out, *args, **{k: v for k, v in kwargs.items() if isinstance(v, Tensor)})
    return 0


@torch.no_grad()
def operations(model: nn.Module, x: Tensor) -> float:
    """Multiplications and additions of one image's forward pass, in products and convolutions.

    At least two for every weight, which is all that is known of TorchScript, whose operations
    cannot be watched.

    Args:
        model: A classifier.
        x: At least one image.

    Cost: one forward pass of an image.
    """
    with _Operations() as counted:
        call(model, x[:1], random.keys(0, 1).to(x.device))
    weights = sum(p.numel() for p in model.parameters())
    return float(max(counted.total, 2 * weights))
