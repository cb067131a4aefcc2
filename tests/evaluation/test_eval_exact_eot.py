"""A pipeline that knows its draws gives the exact expectation.

Oracle: the mean over the eight shifts, computed one by one without Feint's keys or batching.
"""

from __future__ import annotations

import pytest
import torch

from feint.core import random
from feint.core.errors import ConfigError
from feint.core.gradients import backprop, eot, spsa
from feint.core.losses import margin
from feint.defenses import parse
from feint.evaluation import Pipeline

NEIGHBOURS = [(dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1) if (dx, dy) != (0, 0)]


def conv_net() -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(54, 4)
    ).double()
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return net.eval()


def test_eot_over_few_known_draws_is_exact() -> None:
    net = conv_net()
    x = random.uniform(random.keys(0, 3), (3, 8, 8), dtype=torch.float64)
    y, keys = torch.tensor([0, 1, 2]), random.keys(1, 3)
    view = Pipeline(net, parse("pixel_shift(random=True)")).view()
    assert view.draws(x.shape) == 8
    estimate = eot(8)(view, x, y, margin, keys)

    singles = [
        backprop(Pipeline(net, parse(f"pixel_shift(dx={dx}, dy={dy})")), x, y, margin, keys)
        for dx, dy in NEIGHBOURS
    ]
    torch.testing.assert_close(estimate.gradient, sum(s.gradient for s in singles) / 8)
    torch.testing.assert_close(estimate.loss, sum(s.loss for s in singles) / 8)
    rows = {tuple(row.tolist()) for row in estimate.logits[0].round(decimals=9)}
    assert rows == {tuple(s.logits[0, 0].round(decimals=9).tolist()) for s in singles}
    # Fewer draws than there are: sampled, with keys.
    assert eot(7)(view, x, y, margin, keys).logits.shape == (3, 7, 4)


@pytest.mark.parametrize(
    ("defense", "votes", "count"),
    [
        ("pixel_shift", 1, 1),
        ("pixel_shift(random=True)*2", 1, 64),
        ("rand", 1, None),
        ("pixel_shift(random=True)", 3, None),
    ],
)
def test_known_draws(defense: str, votes: int, count: int | None) -> None:
    pipeline = Pipeline(conv_net(), parse(defense), votes=votes)
    shape = torch.Size((2, 3, 8, 8))
    assert pipeline.draws(shape) == count
    if count is None:
        with pytest.raises(ConfigError, match="too many"):
            pipeline(torch.rand(shape, dtype=torch.float64), draw=torch.zeros(2, dtype=torch.int64))


def test_scores_are_sampled_even_where_draws_are_known() -> None:
    x = random.uniform(random.keys(0, 2), (3, 8, 8), dtype=torch.float64)
    view = Pipeline(conv_net(), parse("pixel_shift(random=True)")).view()
    estimate = eot(8, base=spsa(4))(view, x, torch.tensor([0, 1]), margin, random.keys(1, 2))
    assert estimate.logits.shape == (2, 8, 4)
    assert bool(estimate.gradient.any())
