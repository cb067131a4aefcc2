from __future__ import annotations

from typing import ClassVar

import torch

from feint.attacks import ddn
from feint.attacks._minimal import goal_log_odds
from feint.core.losses import cross_entropy
from tests.attacks.minimal import MinimalContract
from tests.tiny import LinearModel, Scaled, images, predicted


class TestDDN(MinimalContract):
    attack = staticmethod(ddn)
    kwargs: ClassVar = {"steps": 20}
    precise: ClassVar = {"steps": 200, "loss": "margin"}


def test_log_odds_point_where_cross_entropy_does() -> None:
    # Oracle: autograd of the paper's loss, in float64.
    logits = images(6, (5,)).double().requires_grad_()
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    for targeted in (False, True):
        sign = -1 if targeted else 1
        (paper,) = torch.autograd.grad(sign * cross_entropy(logits, y).sum(), logits)
        (ours,) = torch.autograd.grad(goal_log_odds(targeted)(logits, y).sum(), logits)
        torch.testing.assert_close(
            torch.nn.functional.normalize(ours), torch.nn.functional.normalize(paper)
        )


def test_confident_models_fall_as_well() -> None:
    # Oracle: the same model with small logits: cross-entropy's gradient is zero in float32 here.
    model = LinearModel(classes=2, scale=0.1)
    x = images(6, low=0.4, high=0.6)
    y = predicted(model, x)
    sure = Scaled(model, 1e4)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(sure(leaf), y).sum(), leaf)
    assert bool((gradient.flatten(1).abs().amax(1) == 0).any())  # the trap works
    x_adv = ddn(sure, x, y)
    true = model.distance(x, y, "l2")
    assert bool((predicted(model, x_adv) != y).all())
    assert bool(((x_adv - x).double().flatten(1).norm(dim=1) <= 1.02 * true).all())
