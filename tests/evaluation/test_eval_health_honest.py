"""Honest defenses on real images are not flagged.

Oracle: the bundled classifier was trained against PGD, and keeps about half of its images; noise in
front of it, averaged over, hides nothing.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from feint import data, models
from feint.defenses import parse
from feint.evaluation import Batch, Cell, Evaluation, Subject, evaluate, execute, rung_cells
from feint.evaluation.evaluate import Memory, TensorSamples
from feint.evaluation.health.controls import AUTOATTACK
from feint.evaluation.results import worst, worst_shares


def flagged(found: Evaluation) -> list[str]:
    return [f"{f.check}: {f.evidence}" for f in found.findings if f.status != "pass"]


def test_an_adversarially_trained_classifier_is_not_flagged() -> None:
    b = next(iter(data.load("bundled:cifar10", samples=12).batches(12)))
    model = models.load("bundled:cifar10-resnet20-at")
    found = evaluate(model, b.x, b.y, index=b.index, attacks=["pgd(steps=10)"])
    assert flagged(found) == []
    assert found.verdict.grade == "A"
    assert 0.1 < found.results[-1].accuracy.value < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["noise(scale=0.05)", "smoothing(sigma=0.05)"])
def test_a_smoothed_classifier_is_not_flagged(noise: str) -> None:
    b = next(iter(data.load("bundled:cifar10", samples=16).batches(16)))
    model = models.load("bundled:cifar10-resnet20-at")
    found = evaluate(
        model,
        b.x,
        b.y,
        defense=parse(noise),
        index=b.index,
        attacks=["pgd(steps=20, gradient=eot(4))"],
        scenarios=["white-box"],
        judge_draws=8,
    )
    assert [f for f in found.findings if f.status == "fail"] == []
    assert flagged(found) == []


@pytest.mark.slow
def test_the_adaptive_rung_leaves_the_samples_that_autoattack_leaves() -> None:
    """Oracle: the places, among sixteen, that AutoAttack's standard version leaves standing."""
    b = next(iter(data.load("bundled:cifar10", samples=16).batches(16)))
    model = "bundled:cifar10-resnet20-at"
    subject, cells = Subject(models.load(model)), rung_cells(Cell("none", model), "adaptive", [])
    samples = TensorSamples(Batch(b.x, b.y, b.index))
    found = execute(cells, lambda _: subject, samples, cache=Memory())
    assert tuple(worst_shares(found).nonzero()[0].tolist()) == AUTOATTACK


@pytest.mark.slow
def test_the_adaptive_rung_agrees_with_autoattack() -> None:
    """Oracle: AutoAttack's standard version, with 200 images within half a point of the rung.

    The rung's own ensemble is shorter (40 steps, 3 targets, 100 queries); about 10 CPU minutes.
    """
    b = next(iter(data.load("bundled:cifar10", samples=200).batches(200)))
    model = "bundled:cifar10-resnet20-at"
    subject, base = Subject(models.load(model)), Cell("none", model)
    cells = [
        *rung_cells(base, "adaptive", []),
        replace(base, scenario="white-box", attack="autoattack"),
    ]
    samples = TensorSamples(Batch(b.x, b.y, b.index))
    found = execute(cells, lambda _: subject, samples, cache=Memory(), shard_size=200)
    rung, reference = worst(found[:-1]), found[-1].accuracy
    assert abs(rung.value - reference.value) <= 0.005, (str(rung), str(reference))
    assert 0.3 < reference.value < 0.5


@pytest.mark.slow
def test_the_adaptive_rung_agrees_with_autoattack_on_a_smoothed_classifier() -> None:
    """Oracle: AutoAttack's version for random models, on the mean over draws.

    Both numbers carry the noise of their draws: the difference of pairs must not be clear.
    """
    b = next(iter(data.load("bundled:cifar10", samples=32).batches(32)))
    model, noise = "bundled:cifar10-resnet20-at", parse("smoothing(sigma=0.05)")
    subject, base = Subject(models.load(model), noise), Cell("none", model, str(noise))
    cells = rung_cells(base, "adaptive", [], defense=noise)
    cells.append(replace(base, scenario="white-box", attack="autoattack"))
    samples = TensorSamples(Batch(b.x, b.y, b.index))
    found = execute(cells, lambda _: subject, samples, cache=Memory(), shard_size=32)
    rung, reference = worst(found[:-1]), found[-1].accuracy
    assert reference.low - 0.005 <= rung.value <= reference.value + 0.005, (
        str(rung),
        str(reference),
    )
