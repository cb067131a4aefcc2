"""Honest defenses on real images are not flagged.

Oracle: the bundled classifier was trained against PGD, and keeps about half of its images; noise in
front of it, averaged over, hides nothing.
"""

from __future__ import annotations

import pytest

from feint import data, models
from feint.defenses import parse
from feint.evaluation import Evaluation, evaluate


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
def test_a_smoothed_classifier_is_not_flagged() -> None:
    b = next(iter(data.load("bundled:cifar10", samples=16).batches(16)))
    model = models.load("bundled:cifar10-resnet20-at")
    found = evaluate(
        model,
        b.x,
        b.y,
        defense=parse("noise(scale=0.05)"),
        index=b.index,
        attacks=["pgd(steps=20, gradient=eot(4))"],
        scenarios=["white-box"],
        judge_draws=8,
    )
    assert [f for f in found.findings if f.status == "fail"] == []
    assert flagged(found) == []
