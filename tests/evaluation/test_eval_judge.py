"""The judge. Oracles: a coin's probability, bit equality, spies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.errors import ModelError, RangeError
from feint.evaluation import Pipeline, judge, rate
from feint.evaluation.health import Undeclared
from tests.evaluation.planted import Coin, Jitter, SharedCoin, Spy, UnkeyedCoin
from tests.tiny import LinearModel, StochasticLinear, images, predicted

SHAPE = (3, 2, 2)


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_batches_do_not_matter(size: int) -> None:
    """Oracle: bit equality of every draw."""
    x = images(12)
    pipeline, y = Pipeline(StochasticLinear(sigma=0.3)), torch.zeros(12, dtype=torch.int64)
    keys = random.keys(1, 12)
    whole = judge(pipeline, x, y, keys, draws=9, batch_size=108)
    assert torch.equal(
        judge(pipeline, x, y, keys, draws=9, batch_size=size).predictions, whole.predictions
    )
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    mixed = judge(pipeline, x[order], y, keys[order], draws=9, batch_size=size)
    assert torch.equal(mixed.predictions, whole.predictions[order])


def test_a_deterministic_pipeline_is_asked_once() -> None:
    spy = Spy(LinearModel())
    x = images(5)
    found = judge(Pipeline(spy), x, predicted(spy, x), random.keys(0, 5), draws=32)
    assert spy.asked == 5 + 5  # `predicted` asks, too
    assert found.draws == 1
    assert found.correct.tolist() == [1] * 5
    assert torch.equal(found.half(0), found.half(1))


@pytest.mark.parametrize("p", [0.95, 0.8])
def test_a_coin_is_judged_at_its_probability(p: float) -> None:
    """Oracle: the coin's p, within the interval."""
    x, y = images(200, SHAPE), torch.zeros(200, dtype=torch.int64)
    models = [Coin(p), Undeclared(UnkeyedCoin(p)), Undeclared(SharedCoin(p), alone=True)]
    for model, n, draws in zip(models, (200, 200, 40), (16, 16, 8), strict=True):
        found = judge(Pipeline(model), x[:n], y[:n], random.keys(3, n), draws=draws)
        share = rate(found.correct.double().numpy() / draws, draws)
        assert share.low <= p <= share.high, model


def test_shared_tosses_would_not_be_draws() -> None:
    """Why samples are asked alone: a toss per batch makes all draws of a sample one draw."""
    x, y = images(20, SHAPE), torch.zeros(20, dtype=torch.int64)
    together = judge(
        Undeclared(SharedCoin(0.5)), x, y, random.keys(0, 20), draws=16, batch_size=320
    )
    assert set(together.correct.tolist()) <= {0, 16}
    alone = judge(Undeclared(SharedCoin(0.5), alone=True), x, y, random.keys(0, 20), draws=16)
    assert len(set(alone.correct.tolist())) > 3


def test_the_judge_draws_what_no_attack_saw() -> None:
    """Keys of the attack, of the blind control and of the judge differ, sample by sample."""
    seen: dict[str, Tensor] = {}

    class Listening(LinearModel):
        stochastic = True
        now = ""

        def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
            assert keys is not None
            seen[self.now] = torch.cat([seen.get(self.now, keys[:0]), keys])
            return super().forward(x)

    from feint.evaluation import Batch, Cell, Subject
    from feint.evaluation.shard import attack_shard, judge_shard

    model = Listening().eval()
    x = images(8)
    batch = Batch(x, torch.zeros(8, dtype=torch.int64), torch.arange(8))
    cell = Cell("white-box", "m", attack="pgd(steps=4, gradient=eot(4))")
    subject = Subject(model)
    model.now = "attack"
    found = attack_shard(cell, subject, batch, 8)
    model.now = "judge"
    judge_shard(cell, subject, batch, found, 64)
    model.now = "blind"
    judge(Pipeline(model), x, batch.y, random.keys(0, 8), draws=8, purpose="blind-judge")
    sets = {name: set(keys.tolist()) for name, keys in seen.items()}
    assert len(sets["attack"]) >= 8 * 4 * 5
    assert not sets["attack"] & sets["judge"]
    assert not sets["blind"] & (sets["attack"] | sets["judge"])
    assert len(sets["judge"]) == 8 * 32  # floats and rounded images are asked on the same draws


def test_majority_hits_and_halves() -> None:
    """Oracle: counted by hand."""
    from feint.evaluation import Judgement

    found = Judgement(torch.tensor([[2, 1, 1, 2], [0, 0, 0, 3]]), torch.tensor([2, 0]))
    assert found.correct.tolist() == [2, 3]
    assert found.half(0).tolist() == [0.5, 1.0]
    assert found.half(1).tolist() == [0.5, 0.5]
    assert found.hits(torch.tensor([1, 3])).tolist() == [2, 1]
    assert found.majority().tolist() == [1, 0]  # of equals the smaller class


def test_the_judge_refuses() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((len(x), 3), torch.nan)

    x, y, keys = images(3), torch.zeros(3, dtype=torch.int64), random.keys(0, 3)
    with pytest.raises(ModelError, match="NaN"):
        judge(Broken(), x, y, keys)
    with pytest.raises(RangeError, match="at least 2"):
        judge(Pipeline(LinearModel(), Jitter()), x, y, keys, draws=1)
    with pytest.raises(RangeError, match="expected 0 to 4"):
        judge(LinearModel(), x, y + 5, keys)


def test_an_empty_batch() -> None:
    x = images(0)
    found = judge(LinearModel(), x, torch.empty(0, dtype=torch.int64), random.keys(0, 0))
    assert found.predictions.shape == (0, 1)
