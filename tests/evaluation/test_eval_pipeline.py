"""Pipelines: keys, votes, views. Oracles: numpy loops, autograd, bit equality."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.errors import ConfigError, RangeError
from feint.evaluation import Pipeline
from feint.evaluation.pipeline import _combine
from tests.evaluation.planted import Coin, Jitter, Opaque, Steps, Through, UnkeyedCoin
from tests.tiny import LinearModel, StochasticLinear, TinyConv, images

X = images(6)
KEYS = random.keys(0, 6)


@pytest.mark.parametrize("votes", [1, 5])
def test_keys_decide_and_batches_do_not(votes: int) -> None:
    """Oracle: bit equality of the same sample in another batch, order and size."""
    pipeline = Pipeline(StochasticLinear(), Jitter(), votes=votes)
    whole = pipeline(X, KEYS)
    assert torch.equal(pipeline(X, KEYS), whole)
    order = torch.tensor([4, 1, 3])
    assert torch.equal(pipeline(X[order], KEYS[order]), whole[order])
    alone = torch.cat([pipeline(X[i : i + 1], KEYS[i : i + 1]) for i in range(6)])
    assert torch.equal(alone, whole)
    assert not torch.equal(pipeline(X, random.fold(KEYS, "other")), whole)
    assert not torch.equal(pipeline(X), pipeline(X))


def test_a_deterministic_pipeline_ignores_keys() -> None:
    model = LinearModel()
    assert torch.equal(Pipeline(model, Through())(X, KEYS), model(X))
    assert not Pipeline(model, Through()).stochastic


def test_the_model_draws_apart_from_the_defense() -> None:
    """A model that takes keys gets others than the defense: equal noise would correlate them."""
    seen: list[Tensor] = []

    class Keyed(LinearModel):
        stochastic = True

        def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
            assert keys is not None
            seen.append(keys)
            return super().forward(x)

    class Front(Jitter):
        def draw(self, keys: Tensor, shape: torch.Size) -> dict[str, Tensor]:
            seen.append(keys)
            return super().draw(keys, shape)

    Pipeline(Keyed(), Front())(X, KEYS)
    assert not (seen[0] == seen[1]).any()
    assert not (seen[0] == KEYS).any()


def votes_of(pipeline: Pipeline) -> np.ndarray:
    """(B, V, K) logits of the votes, one by one."""
    single = Pipeline(pipeline.model, pipeline.defense)
    keys = random.fold(KEYS, "vote", 0, torch.arange(pipeline.votes))
    return torch.stack([single(X, keys[:, v]) for v in range(pipeline.votes)], 1).double().numpy()


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_votes_are_combined_as_said() -> None:
    """Oracle: a numpy loop over the samples and their votes."""
    model = StochasticLinear(sigma=0.4, dtype=torch.float64)
    x, kinds = X.double(), ("mean_probability", "mean_logits", "majority")
    found = {}
    for rule in kinds:
        pipeline = Pipeline(model, votes=7, combine=rule)  # type: ignore[arg-type]
        found[rule] = pipeline(x, KEYS).detach().numpy()
    single = Pipeline(model)
    keys = random.fold(KEYS, "vote", 0, torch.arange(7))
    votes = torch.stack([single(x, keys[:, v]) for v in range(7)], 1).detach().numpy()
    for i in range(6):
        probability = softmax(votes[i]).mean(0)
        assert found["mean_probability"][i] == pytest.approx(np.log(probability))
        assert found["mean_logits"][i] == pytest.approx(votes[i].mean(0))
        ballots = np.bincount(votes[i].argmax(1), minlength=5) / 7
        assert found["majority"][i] == pytest.approx(ballots + 0.5 / 7 * probability)
        assert ballots[found["majority"][i].argmax()] == ballots.max()


def test_a_tie_goes_to_the_higher_probability() -> None:
    """Oracle: two votes against each other, one of them surer."""
    votes = torch.tensor([[[3.0, 0.0, -100.0], [0.0, 1.0, -100.0]]])
    assert _combine(votes, "majority").argmax(1).tolist() == [0]
    assert _combine(votes.flip(1), "majority").argmax(1).tolist() == [0]


def test_a_majority_counts_even_where_logits_are_huge() -> None:
    """Float32 keeps six digits: added to logits of 10⁵ the ballots would be lost."""
    votes = torch.tensor([[[0.0, 1e5], [0.0, 1e5], [1e5, 0.0]]])
    assert _combine(votes, "majority")[0].tolist() == pytest.approx([1 / 3, 2 / 3], abs=0.12)


def test_the_majority_is_differentiated_as_the_mean_probability() -> None:
    """Oracle: autograd through the other rule."""
    x, model = X.double(), StochasticLinear(sigma=0.4, dtype=torch.float64)
    weights = torch.arange(5.0).double()
    found = []
    for rule in ("majority", "mean_probability"):
        leaf = x.clone().requires_grad_()
        pipeline = Pipeline(model, votes=5, combine=rule)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad((pipeline(leaf, KEYS) * weights).sum(), leaf)
        found.append(gradient)
    assert torch.equal(*found)
    assert bool(found[0].abs().sum() > 0)


@pytest.mark.parametrize(
    ("model", "defense", "votes"),
    [
        (LinearModel(), Steps(), 1),
        (TinyConv(), Steps(), 1),
        (StochasticLinear(), Jitter(), 3),
        (LinearModel(), None, 1),
    ],
)
def test_a_view_is_exact_forward(model: nn.Module, defense: nn.Module, votes: int) -> None:
    """Oracle: bit equality."""
    x = X.to(next(model.parameters()).dtype)
    pipeline = Pipeline(model, defense, votes=votes)
    assert torch.equal(pipeline.view()(x, KEYS), pipeline(x, KEYS))


def test_a_view_differentiates_by_its_rule() -> None:
    """Oracle: a linear model's weight for the identity, minus the weight for −x, else zero."""
    model = LinearModel(dtype=torch.float64)
    for rule, sign in (("identity", 1), ("backwards", -1)):
        leaf = X.double().requires_grad_()
        out = Pipeline(model, Steps()).view(rule)(leaf)[:, 2].sum()
        (gradient,) = torch.autograd.grad(out, leaf)
        assert torch.allclose(gradient, sign * model.weight[2].expand_as(gradient))
    leaf = X.double().requires_grad_()
    (bare,) = torch.autograd.grad(Pipeline(model, Steps())(leaf).sum(), leaf)
    assert not bare.any()


def test_nobodys_mode_is_changed() -> None:
    """A dropout that its user keeps active at test time must stay so."""
    model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(48, 3)).eval()
    model[1].train()
    pipeline = Pipeline(model, Through())
    assert not pipeline.training
    assert not pipeline.view().training
    assert model[1].training
    assert not model[2].training
    assert Pipeline(nn.Sequential(nn.Flatten())).training


def test_pipelines_refuse() -> None:
    with pytest.raises(ConfigError, match="nothing in this pipeline is random"):
        Pipeline(LinearModel(), votes=3)
    with pytest.raises(RangeError, match="at least 1"):
        Pipeline(Coin(0.5), votes=0)
    with pytest.raises(ConfigError, match="expected one of"):
        Pipeline(Coin(0.5), combine="median")  # type: ignore[arg-type]
    with pytest.raises(LookupError, match="default"):
        Pipeline(LinearModel(), Opaque()).view()


def test_a_declared_model_without_keys_is_run() -> None:
    x = images(4, (3, 2, 2))
    assert Pipeline(UnkeyedCoin(0.5))(x, random.keys(0, 4)).shape == (4, 5)
