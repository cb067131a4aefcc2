from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from feint.attacks import ead
from feint.core.errors import ConfigError
from feint.core.norms import norm_of
from tests.attacks.minimal import MinimalContract
from tests.tiny import LinearModel, images, predicted


class TestEAD(MinimalContract):
    attack = staticmethod(ead)
    kwargs: ClassVar = {"search_steps": 4, "steps": 40, "initial_const": 0.1}
    passes = 2
    precise: ClassVar = {"search_steps": 12, "steps": 300, "beta": 0.05}


def test_a_larger_beta_changes_fewer_values() -> None:
    # Oracle: the threshold of the shrinkage: without one every value moves.
    model = LinearModel(classes=2, dtype=torch.float64)
    x = images(6, low=0.45, high=0.55).double()
    y = predicted(model, x)
    changed = []
    for beta in (0.0, 1e-3, 1e-2):
        x_adv = ead(model, x, y, beta=beta, search_steps=4, steps=200)
        assert bool((predicted(model, x_adv) != y).all())
        changed.append(float((x_adv != x).double().flatten(1).sum(1).mean()))
    assert changed[0] == 48
    assert changed[0] > changed[1] > changed[2]


def test_the_rule_chooses_the_point() -> None:
    # Oracle: each rule's result is the smaller one by its own measure.
    model = LinearModel(dtype=torch.float64)
    x = images(6, low=0.45, high=0.55).double()
    y = predicted(model, x)
    kw = {"beta": 1e-3, "search_steps": 4, "steps": 100, "refine": 0}
    sparse = ead(model, x, y, rule="l1", **kw) - x
    elastic = ead(model, x, y, rule="elastic_net", **kw) - x

    def size(delta: torch.Tensor) -> torch.Tensor:
        return 1e-3 * norm_of(delta, "l1") + norm_of(delta, "l2").square()

    assert bool((norm_of(sparse, "l1") <= norm_of(elastic, "l1")).all())
    assert bool((size(elastic) <= size(sparse)).all())
    assert not torch.equal(sparse, elastic)


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ConfigError, match="elastic_net"):
        ead(LinearModel(), images(2), torch.tensor([0, 1]), rule="EN")
