"""Known controls: classifiers that are right with probability p must be reported at p.

AutoAttack's `rand` mode prints 85.9 % and 53.9 % for p = 0.95 and 0.80. Oracle: p itself.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from feint.evaluation import Batch, Cell, Evaluation, Rate, Subject, evaluate, execute
from feint.evaluation.evaluate import Memory, TensorSamples
from feint.evaluation.health import declare
from feint.evaluation.verdict import bounds
from tests.evaluation.planted import Coin, CoinTimesLinear, SecretCoin, Through, UnkeyedCoin
from tests.tiny import images

SHAPE = (3, 2, 2)
N = 200
X = images(N, SHAPE)
Y = torch.zeros(N, dtype=torch.int64)

ATTACKS = {
    "keyed": "pgd(steps=2, gradient=eot(4))",
    "unkeyed": "pgd(steps=2, gradient=eot(4))",
    "without a gradient": "pgd(steps=1, gradient=spsa(4))",
}


def coin(kind: str, p: float) -> nn.Module:
    if kind == "keyed":
        return Coin(p)
    return UnkeyedCoin(p) if kind == "unkeyed" else Coin(p, tiny=0.0)


def contains(found: Rate | None, p: float) -> bool:
    return found is not None and found.low <= p <= found.high


@pytest.mark.parametrize(
    ("kind", "p"),
    [("keyed", 0.95), ("keyed", 0.8), ("unkeyed", 0.8), ("without a gradient", 0.95)],
)
def test_a_coin_is_reported_at_p(kind: str, p: float) -> None:
    """Every cell's interval and the verdict's bound hold p; the verdict is not withheld."""
    found = evaluate(
        coin(kind, p),
        X,
        Y,
        defense=Through(),
        attacks=[ATTACKS[kind]],
        scenarios=["gray-box", "white-box"],
        judge_draws=16,
        batch_size=4096,
    )
    assert {r.cell.scenario for r in found.results} == {"none", "gray-box", "white-box"}
    for result in found.results:
        assert contains(result.accuracy, p), (result.cell, result.accuracy)
    for bound in found.verdict.bounds:
        assert contains(bound.worst, p)
    assert [f for f in found.findings if f.status == "fail"] == []
    assert not found.verdict.withheld


@pytest.mark.parametrize("kind", ["keyed", "unkeyed"])
@pytest.mark.parametrize("p", [0.95, 0.8])
def test_the_intervals_cover_p_over_seeds(kind: str, p: float) -> None:
    """At least 90 % of the intervals of ten seeds hold p, worst case over two attacks too."""
    model, _ = declare(coin(kind, p), X[:8])
    subject = Subject(model)
    attacks = [ATTACKS[kind], ATTACKS[kind].replace("pgd(", "bim(")]
    single, worst, clean = [], [], []
    for seed in range(10):
        cells = [Cell("none", "coin", seed=seed, judge_draws=8)]
        cells += [Cell("white-box", "coin", attack=a, seed=seed, judge_draws=8) for a in attacks]
        samples = TensorSamples(Batch(X, Y, torch.arange(N)))
        results = execute(cells, lambda _: subject, samples, cache=Memory(), batch_size=4096)
        clean.append(contains(results[0].accuracy, p))
        single += [contains(r.accuracy, p) for r in results[1:]]
        worst.append(contains(bounds(results)[0].worst, p))
    for hits in (clean, single, worst):
        assert sum(hits) >= 0.9 * len(hits)


def test_a_secret_coin_is_found_out() -> None:
    """Neither declared nor keyed: wrapped, judged by draws, reported at p, and said so."""
    found = evaluate(SecretCoin(0.8), X, Y, attacks=["pgd(steps=2)"], scenarios=["white-box"])
    assert contains(found.verdict.bounds[0].worst, 0.8)
    noted = {f.check: f for f in found.findings}
    assert noted["unkeyed-randomness"].status == "warn"
    assert "not declared" in noted["unkeyed-randomness"].evidence
    assert found.results[0].draws == 32


def test_a_coin_hides_nothing_that_can_be_attacked() -> None:
    """A linear classifier behind a coin of 0.9: PGD turns every sample, the coin turns few back.

    Oracle: at a budget beyond every boundary only the coin's mistakes are right by chance.
    """
    model = CoinTimesLinear(0.9)
    y = model.linear(X).argmax(1)
    found = run(model, y)
    assert found.verdict.bounds[0].clean is not None
    assert contains(found.verdict.bounds[0].clean, 0.9)
    assert found.verdict.bounds[0].worst is not None
    assert found.verdict.bounds[0].worst.value < 0.06
    assert [f for f in found.findings if f.status == "fail"] == []


def run(model: nn.Module, y: torch.Tensor) -> Evaluation:
    return evaluate(
        model, X, y, attacks=["pgd(steps=20, loss='margin')"], scenarios=["white-box"], eps=0.5
    )
