"""From a run directory to its report. Oracles: the store's own reading, and autograd by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from feint.core import random
from feint.evaluation import Cell
from feint.models import load
from feint.reports import from_run, markdown
from feint.reports.html import render
from feint.store import RunSpec, StoredRun, open_run, run
from feint.store.resolver import Resolver

MODEL = """
import torch
from torch import nn

from feint.core import random


def linear():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    net[1].weight.data = random.normal(random.keys(3, 1), (4, 192))[0]
    net[1].bias.data.zero_()
    return net.eval()
"""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredRun:
    folder = tmp_path_factory.mktemp("run")
    (folder / "models.py").write_text(MODEL)
    pixels = random.integers(random.keys(0, 10), 0, 256, (3, 8, 8))
    name = f"{folder}/models.py:linear"
    labels = load(name)(pixels.float() / 255).argmax(1)
    np.savez(folder / "data.npz", x=pixels.numpy().astype("uint8"), y=labels.numpy())
    base = Cell("none", name, "noise(scale=0.02)", eps=0.02, judge_draws=4)
    attack = "pgd(steps=3, gradient=eot(2))"
    cells = [
        replace(base, defense="none"),
        base,
        replace(base, scenario="gray-box", attack="pgd(steps=3)"),
        replace(base, scenario="white-box", attack=attack),
        replace(base, scenario="white-box", attack=attack, eps=0.1),
        replace(base, defense="none", scenario="white-box", attack="pgd(steps=3)"),
    ]
    spec = RunSpec(
        cells=cells,
        data={"spec": str(folder / "data.npz")},
        shard_size=4,
        title="A small run",
        published={2: {"label": "defense success rate", "value": 0.9, "source": "Table 3"}},
    )
    run(spec, folder / "out", command=["feint", "evaluate", "--defense", "noise(scale=0.02)"])
    return open_run(folder / "out")


def test_all_cells_claims_and_the_command(stored: StoredRun) -> None:
    data = from_run(stored)
    assert len(data.results) == 6
    assert data.verdict == stored.verdict
    assert data.command == "feint evaluate --defense 'noise(scale=0.02)'"
    assert data.title == "A small run"
    (claim,) = data.claims
    assert claim.of_clean
    assert [claim.about(r) for r in data.results] == [False, False, True, False, False, False]
    assert "defense success rate, Table 3" in markdown(data)


def test_other_budgets_go_to_the_curve(stored: StoredRun) -> None:
    data = from_run(stored, eps=0.02)
    assert [r.cell.eps for r in data.curve] == [0.1]
    assert len(data.results) == 5
    assert {b.eps for b in data.verdict.bounds} == {0.02}


def test_images_are_those_that_were_judged(stored: StoredRun) -> None:
    data = from_run(stored)
    assert data.images is not None
    x, x_adv = data.images(data.results[3], [7, 0])
    assert torch.equal(x, stored.images(stored.results[0], [7, 0]))
    size = (x_adv.double() - x.double()).abs().flatten(1).amax(1).numpy()
    assert size == pytest.approx(data.results[3].rows["linf"][[7, 0]], rel=1e-6)


def test_gradients_are_the_views(stored: StoredRun) -> None:
    data = from_run(stored, resolver=Resolver(stored.spec))
    assert data.gradients is not None
    result = next(r for r in data.results if r.cell.defense == "none" and r.cell.attack != "none")
    found = data.gradients(result, [1, 5])
    assert found is not None
    # Closed form: the margin's gradient of a linear model is the difference of two rows.
    weight = load(result.cell.model)[1].weight
    x, _ = data.images(result, [1, 5])  # type: ignore[misc]
    logits = x.flatten(1) @ weight.T
    label = torch.from_numpy(result.rows["label"][[1, 5]])
    other = logits.scatter(1, label[:, None], -torch.inf).argmax(1)
    assert torch.allclose(found.flatten(1), weight[other] - weight[label], atol=1e-5)


def test_the_page_shows_all_of_it(stored: StoredRun) -> None:
    data = from_run(stored, resolver=Resolver(stored.spec), eps=0.02, html=Path("report.html"))
    text = render(data)
    assert "A small run" in text
    assert "data:image/png;base64," in text
    assert "input gradient" in text
    assert stored.info["data"]["fingerprint"] in text
    assert "environments[0].packages.torch" in text
    assert text == render(data)
