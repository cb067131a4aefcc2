"""A tiny bench: two models in a file, 12 images of 8×8, and specs of runs that take a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feint.core import random
from feint.evaluation import Cell, expand
from feint.models import load
from feint.store import RunSpec, StoredRun, environment, open_run, run

MODELS = '''
import torch
from torch import nn

from feint.core import random


def _drawn(net, seed):
    for name, p in net.named_parameters():
        p.data = random.normal(random.fold(random.keys(seed, 1), name), p.shape)[0] * 0.4
    return net.eval()


class Linear(nn.Module):
    """Products summed sample by sample: a row does not depend on its batch, bit by bit."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, 3, 8, 8))

    def forward(self, x):
        return ((2 * x[:, None] - 1) * self.weight).flatten(2).sum(2)


def linear():
    return _drawn(Linear(), 1)


def conv():
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return _drawn(nn.Sequential(*layers, nn.Linear(24, 5)), 2)
'''

Make = Callable[..., RunSpec]


@pytest.fixture(autouse=True)
def _no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit made while the tests run is no other environment."""
    monkeypatch.setattr(environment, "git", lambda: None)


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with `models.py` and `data.npz`; labels are what `conv` says."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "models.py").write_text(MODELS)
    pixels = random.integers(random.keys(0, 12), 0, 256, (3, 8, 8))
    labels = load(f"{folder}/models.py:conv")(pixels.float() / 255).argmax(1)
    np.savez(folder / "data.npz", x=pixels.numpy().astype("uint8"), y=labels.numpy())
    return folder


@pytest.fixture(scope="session")
def make(bench: Path) -> Make:
    """Makes a spec: `make(model="conv", defense="noise", attacks=…, scenarios=…, **options)`."""

    def spec(
        model: str = "conv",
        defense: str = "noise(scale=0.1)",
        attacks: tuple[str, ...] = ("pgd(steps=3, gradient=eot(2))",),
        scenarios: tuple[str, ...] = ("white-box",),
        undefended: bool = False,
        **options: Any,
    ) -> RunSpec:
        base = Cell(
            "none", f"{bench}/models.py:{model}", defense, eps=16 / 255, judge_draws=4, seed=3
        )
        cells = expand(base, attacks, scenarios, undefended=undefended)
        options = {"data": {"spec": f"{bench}/data.npz"}, "shard_size": 5, **options}
        return RunSpec(cells=cells, **options)

    return spec


@pytest.fixture(scope="session")
def whole(make: Make, tmp_path_factory: pytest.TempPathFactory) -> StoredRun:
    """An uninterrupted run of `make()`: what every interrupted one has to come to."""
    patch = pytest.MonkeyPatch()
    patch.setattr(environment, "git", lambda: None)
    directory = tmp_path_factory.mktemp("whole") / "run"
    run(make(), directory)
    patch.undo()
    return open_run(directory)
