"""Made-up evaluations with known numbers: S0's story, and the odd cases that reports must bear."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from feint.evaluation import Cell, CellResult, Finding
from feint.evaluation.verdict import conclude
from feint.reports.data import Claim, ReportData

N = 200
CLASSES = (
    "airplane automobile bird cat deer dog frog horse ship truck".split()  # noqa: SIM905
)
PLAIN, ACE, HARD = "bundled:plain", "bundled:ace-100", "bundled:adversarial"
SHIFT, RANDOM = "pixel_shift(dx=1)", "pixel_shift(random=true)"
S0_PGD = "pgd(preset='ace')"
SIGN = "pgd(steps=40, step_size=0.00784313725490196)"
CLAIM = Claim(0.983, "ACE, Table 3 (ResNet-18, λ = 100)", ACE, SHIFT, attack=S0_PGD, of_clean=True)


def cell_result(
    cell: Cell, right: float, *, n: int = N, draws: int = 1, size: float = 0.0, salt: int = 0
) -> CellResult:
    """A cell in which `right · n` samples (± rounding) are right on every draw.

    The right ones are spread over the samples by a fixed permutation, so that sets for rising
    shares are nested: what a weaker attack breaks, a stronger one breaks too.
    """
    rank = (np.arange(n) * 73 + salt) % n if math.gcd(73, n) == 1 else np.arange(n)
    good = rank < round(right * n)
    label = np.arange(n) % 10
    zeros = np.zeros(n)
    attacked = cell.attack != "none"
    share = good.astype(float)
    rows = {
        "index": np.arange(n),
        "label": label,
        "target": np.full(n, -1),
        "draws": np.full(n, draws),
        "correct": good * draws,
        "correct_even": share,
        "correct_odd": share,
        "correct_8bit": good * draws,
        "target_hits": np.zeros(n, dtype=int),
        "prediction": np.where(good, label, (label + 1 + np.arange(n) % 9) % 10),
        "rms": zeros + size * 0.92,
        "abs_l2": zeros + size * 0.92 * math.sqrt(3072),
        "relative_l2": zeros + size * 1.9,
        "linf": zeros + size,
        "size": zeros + size,
        "size_8bit": zeros + size,
        "outside": zeros,
        "unchanged": np.full(n, not attacked),
        "first_hit": np.where(good, -1, 3),
        "late_gain": zeros,
    }
    return CellResult(
        cell,
        f"{cell.scenario}-{salt}",
        rows,
        f"{cell.scenario}-{salt}",
        forwards=n * 41 if attacked else 0,
        backwards=n * 40 if attacked else 0,
        seconds=1.0,
    )


def findings() -> list[Finding]:
    """Passes, one warning of each kind, as `health` words them."""
    name = f"{ACE} + {SHIFT}"
    return [
        Finding("outputs-are-logits", "pass", name, "outputs lie in [-9.1, 14.2] and …"),
        Finding(
            "declared-randomness",
            "pass",
            name,
            "declared deterministic; with the same keys logits differ by 0, with others by up to 0 "
            "(threshold 1e-4)",
        ),
        Finding(
            "zero-gradient", "pass", name, "0 % of the input gradients are zero (fail above 10 %)"
        ),
        Finding(
            "white-box-is-strongest",
            "warn",
            f"{HARD}",
            "transfer pgd breaks 2 of 200 samples that no white-box attack broke (fail above 2 %)",
        ),
        Finding(
            "loss-has-settled",
            "warn",
            f"{HARD}, white-box, {SIGN}",
            "of 68 samples still standing, 54 % gained more than 5 % of their loss in the last "
            "tenth of the steps (warn above 50 %: give more steps)",
        ),
        Finding("budget-and-box", "pass", name, "largest perturbation 0.031372551 in linf …"),
    ]


METADATA: dict[str, object] = {
    "spec": {
        "models": [PLAIN, ACE, HARD],
        "data": "bundled:cifar10",
        "samples": N,
        "norm": "linf",
        "eps": 8 / 255,
        "attacks": [S0_PGD, SIGN],
        "seed": 0,
    },
    "versions": {"feint": "0.1.0", "pgd": 1, "pixel_shift": 1},
    "packages": {"torch": "2.15.0+cpu", "python": "3.11.2"},
    "git": {"commit": "922a951", "dirty": False},
    "device": "cpu (2 threads)",
}


def images_of(x: Tensor) -> Any:
    """An `Images` callable over fixed images: sign noise of the cell's eps, keyed by position."""

    def give(result: CellResult, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        clean = x[list(positions)]
        order = torch.arange(clean.numel()).view_as(clean)
        sign = ((order * 2654435761 + len(result.cell.attack)) // 65536 % 2 * 2 - 1).to(clean)
        return clean, (clean + result.cell.eps * sign).clamp(0, 1)

    return give


def gradients_of(x: Tensor) -> Any:
    """A `Gradients` callable: a gradient that is large where the image has edges."""

    def give(result: CellResult, positions: Sequence[int]) -> Tensor:
        clean = x[list(positions)]
        return clean - clean.roll(1, 3) + (clean - clean.roll(1, 2))

    return give


def waves(n: int = N, size: int = 32) -> Tensor:
    """Smooth colorful images, different for every sample."""
    grid = torch.linspace(0, 1, size)
    i = torch.arange(n).view(n, 1, 1, 1)
    c = torch.arange(3).view(1, 3, 1, 1)
    across, down = grid.view(1, 1, 1, size), grid.view(1, 1, size, 1)
    return 0.5 + 0.45 * torch.sin(
        6 * across * (1 + i % 4) + 4 * down * (1 + i % 3) + 2 * c + i.double()
    ).to(torch.float32)


def story_data(**changes: Any) -> ReportData:
    """S0's story: plain, ACE with a fixed and with a random shift, and an adversarial control."""
    cells: list[CellResult] = []

    def add(scenario: str, right: float, attack: str = "none", **more: Any) -> None:
        draws = more.pop("draws", 1)
        size = 0.0 if attack == "none" else 8 / 255
        cell = Cell(scenario, attack=attack, **more)
        cells.append(cell_result(cell, right, draws=draws, size=size))

    for attack in (S0_PGD, SIGN):
        if attack == S0_PGD:
            add("none", 0.905, model=PLAIN)
            add("none", 0.885, model=ACE)
            add("none", 0.885, model=ACE, defense=SHIFT)
            add("none", 0.88, model=ACE, defense=RANDOM, draws=32)
            add("none", 0.79, model=HARD)
        add("white-box", 0.0, attack, model=PLAIN)
        add("white-box", 0.0, attack, model=ACE)
        add("gray-box", 0.815 if attack == S0_PGD else 0.565, attack, model=ACE, defense=SHIFT)
        add("white-box", 0.0, attack, model=ACE, defense=SHIFT)
        add("gray-box", 0.80, attack, model=ACE, defense=RANDOM, draws=32)
        add("white-box", 0.34 if attack == SIGN else 0.41, attack, model=HARD)
    add("white-box", 0.0, "pgd(gradient=eot(8), steps=20)", model=ACE, defense=RANDOM, draws=32)
    extra = []
    for eps, left in ((1, 0.62), (2, 0.21), (4, 0.03), (16, 0.0)):
        for model, defense, scenario, factor in (
            (ACE, SHIFT, "white-box", 1.0),
            (ACE, SHIFT, "gray-box", 0.0),
            (HARD, "none", "white-box", 0.0),
        ):
            right = left if factor else (0.885 - eps * 0.04 if model == ACE else 0.79 - eps * 0.045)
            cell = Cell(scenario, model=model, defense=defense, attack=SIGN, eps=eps / 255)
            extra.append(cell_result(cell, max(right, 0), size=eps / 255))
    found = findings()
    data = ReportData(
        cells,
        found,
        conclude(cells, found),
        metadata=METADATA,
        claims=(CLAIM,),
        curve=extra,
        class_names=CLASSES,
        command=(
            "feint evaluate --model bundled:ace-100 --defense 'pixel_shift(dx=1)' --attack "
            f'"{S0_PGD},{SIGN}" --samples 200 --eps 8/255 --seed 0 --out runs/story'
        ),
        run="runs/story",
        html="runs/story/report.html",
    )
    return replace(data, **changes)


def small_data(results: Sequence[CellResult] | None = None, **changes: Any) -> ReportData:
    """One cell, no findings, nothing else."""
    results = [cell_result(Cell("none", model="m"), 0.5)] if results is None else results
    return replace(ReportData(results, [], conclude(results, [])), **changes)
