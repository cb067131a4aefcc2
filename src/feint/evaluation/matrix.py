"""Transfer from every source to every target, as a matrix on top of cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from feint.core.errors import ConfigError
from feint.defenses.base import Defense
from feint.evaluation.cell import Cell
from feint.evaluation.loop import OnProgress, execute
from feint.evaluation.metrics import Rate, defense_success
from feint.evaluation.results import CellResult
from feint.evaluation.samples import Cache, Memory, TensorSamples
from feint.evaluation.shard import Batch, Subject

__all__ = ["Matrix", "matrix_cells", "transfer_matrix"]

Target = nn.Module | tuple[nn.Module, Defense]


@dataclass(frozen=True)
class Matrix:
    """What examples made on each source leave of each target."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    clean: dict[str, CellResult]
    """By target: its accuracy without attack."""
    cells: dict[tuple[str, str], CellResult]
    """By (source, target)."""

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """(sources, targets) accuracy under the attack."""
        return np.array(
            [[self.cells[s, t].accuracy.value for t in self.targets] for s in self.sources]
        )

    @property
    def success(self) -> NDArray[np.float64]:
        """(sources, targets) S0's defense success rate: accuracy over clean accuracy."""
        return np.array([[self.rate(s, t).value for t in self.targets] for s in self.sources])

    def rate(self, source: str, target: str) -> Rate:
        """Defense success rate of one pair with its interval."""
        return defense_success(self.cells[source, target].shares, self.clean[target].shares)

    def as_dict(self) -> dict[str, object]:
        """Plain data."""
        return {
            "sources": list(self.sources),
            "targets": list(self.targets),
            "clean": {t: r.accuracy.as_dict() for t, r in self.clean.items()},
            "accuracy": [
                [self.cells[s, t].accuracy.as_dict() for t in self.targets] for s in self.sources
            ],
        }


def matrix_cells(
    base: Cell, sources: Sequence[str], targets: Sequence[tuple[str, str]], attack: str
) -> list[Cell]:
    """The cells of a transfer matrix, for a run: each target clean, then from each source.

    Args:
        base: Threat, judge and seed.
        sources: Model specs.
        targets: (model spec, defense expression) of each target.
        attack: Attack expression.
    """
    cells = [_cell(base, "none", model, defense) for model, defense in targets]
    for source in sources:
        cells += [_cell(base, "transfer", m, d, attack, source) for m, d in targets]
    return list(dict.fromkeys(cells))


def _cell(
    base: Cell, scenario: str, model: str, defense: str, attack: str = "none", source: str = ""
) -> Cell:
    spec = base.spec() | {"scenario": scenario, "model": model, "defense": defense}
    return Cell(**{**spec, "attack": attack, "source": source})


def transfer_matrix(
    sources: Mapping[str, nn.Module],
    targets: Mapping[str, Target],
    x: Tensor,
    y: Tensor,
    *,
    attack: str = "pgd",
    norm: str = "linf",
    eps: float = 8 / 255,
    target: Tensor | None = None,
    index: Tensor | None = None,
    judge_draws: int = 32,
    seed: int = 0,
    batch_size: int = 128,
    cache: Cache | None = None,
    on_progress: OnProgress | None = None,
) -> Matrix:
    """Attack every source once, and judge what comes out on every target (S0 Fig. 5, S3 Fig. 8).

    A source that is also a target's model makes the diagonal: S0's "vanilla" attack, which does not
    know of the defense in front. No sample stops at its first success on the source.

    Args:
        sources: Models that are attacked, by name; in evaluation mode.
        targets: What is judged, by name: a model, or a pair of a model and its defense.
        x: Images, (N, C, H, W), in [0, 1].
        y: True labels, (N,).
        attack: Attack expression.
        norm: The threat model's norm.
        eps: Its budget, in image units.
        target: Targets, (N,), for a targeted threat.
        index: Indices of the samples in their data set; by default 0 … N−1.
        judge_draws: Held-out draws per sample for stochastic targets.
        seed: Seed of every draw.
        batch_size: Images per forward pass.
        cache: Finished units; by default in memory. Examples of a source are made once.
        on_progress: Called around every unit of work.

    Returns:
        The cells, and their accuracies as a matrix.

    Raises:
        ConfigError: If there is no source or no target, or the attack does not fit.

    Cost: one attack per source, and `judge_draws` forward passes (or one) per pair and image.

    Example:
        >>> def net(seed):
        ...     torch.manual_seed(seed)
        ...     return nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
        >>> models, x = {"a": net(0), "b": net(1)}, torch.rand(8, 3, 2, 2)
        >>> y = models["a"](x).argmax(1)
        >>> found = transfer_matrix(models, models, x, y, attack="fgsm", eps=0.5)
        >>> found.accuracy.shape, bool(found.accuracy[0, 0] < 1)
        ((2, 2), True)

    References:
        "ACE: Artificial Checkerboard Enhancer to Induce and Evade Adversarial Attacks", anonymous
        ICLR 2019 submission, Fig. 5 and 9; Folz, Palacio, Hees, Dengel, arXiv 1803.07994, Fig. 8.
    """
    if not sources or not targets:
        raise ConfigError(f"{len(sources)} sources, {len(targets)} targets; expected at least one")
    pairs = {name: _pair(found) for name, found in targets.items()}
    base = Cell(
        "none",
        "",
        norm=norm,
        eps=eps,
        targeted=target is not None,
        judge_draws=judge_draws,
        seed=seed,
    )
    subjects = {
        (t, s): Subject(model, defense, None if s == "" else sources[s])
        for t, (model, defense) in pairs.items()
        for s in ("", *sources)
    }
    named = [(t, "none" if defense is None else str(defense)) for t, (_, defense) in pairs.items()]
    index = torch.arange(len(x), device=x.device) if index is None else index
    results = execute(
        matrix_cells(base, list(sources), named, attack),
        lambda cell: subjects[cell.model, cell.source],
        TensorSamples(Batch(x, y, index, target)),
        cache=Memory() if cache is None else cache,
        batch_size=batch_size,
        on_progress=on_progress,
    )
    return Matrix(
        tuple(sources),
        tuple(targets),
        {r.cell.model: r for r in results if r.cell.attack == "none"},
        {(r.cell.source, r.cell.model): r for r in results if r.cell.attack != "none"},
    )


def _pair(found: Target) -> tuple[nn.Module, Defense | None]:
    return found if isinstance(found, tuple) else (found, None)
