"""Known controls: classifiers that are right with probability p must be reported at p.

AutoAttack's `rand` mode prints 85.9 % and 53.9 % for p = 0.95 and 0.80. Oracle: p itself.
"""

from __future__ import annotations

from math import comb

import pytest
import torch
from torch import nn

from feint.evaluation import (
    SCENARIOS,
    Batch,
    Cell,
    CellResult,
    Evaluation,
    Rate,
    Subject,
    evaluate,
    execute,
    ladder,
    rung_cells,
)
from feint.evaluation.evaluate import Memory, TensorSamples
from feint.evaluation.health import declare
from feint.evaluation.verdict import bounds
from tests.evaluation.planted import (
    Coin,
    CoinTimesLinear,
    Opaque,
    SecretCoin,
    Through,
    UnkeyedCoin,
)
from tests.tiny import LinearModel, images

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


# --- every rung of the ladder ---------------------------------------------------------------------

FEW = 100
RUNGS = [name for name in SCENARIOS if name != "none"]
SMALL = ["pgd(steps=2, gradient=eot(2))", "square(queries=3)", "hopskipjump(steps=1, probes=4)"]


def rungs(
    model: nn.Module, y: torch.Tensor, eps: float = 8 / 255, cache: Memory | None = None
) -> list[CellResult]:
    """A coin on every rung, with attacks of a few steps; `adaptive` is its whole search."""
    defense = Through()
    base = Cell("none", "coin", "d", judge_draws=16, eps=eps)
    cells = [base]
    for name in RUNGS:
        fit = SMALL[:1] if name not in ("score", "decision") else SMALL
        cells += rung_cells(base, name, fit, defense=defense, sources=["other"], steps=2)
    subject = Subject(model, defense, LinearModel(shape=SHAPE))
    return execute(
        [c for c in cells if "autoattack" not in c.attack],  # deterministic pipelines only
        lambda _: subject,
        some(y),
        cache=Memory() if cache is None else cache,
        batch_size=4096,
    )


def some(y: torch.Tensor) -> TensorSamples:
    return TensorSamples(Batch(X[:FEW], y[:FEW], torch.arange(FEW)))


@pytest.mark.parametrize("p", [0.95, 0.8])
@pytest.mark.parametrize("tiny", [1e-3, 0.0])
def test_a_coin_is_reported_at_p_on_every_rung(p: float, tiny: float) -> None:
    """With a gradient that is of no use and with none at all (then scores must do).

    Oracle: p, inside every rung's interval and inside that of the worst case over all of them; the
    intervals are 95 % ones, so one of the nine may miss by as much as half its width.
    """
    model = Coin(p, tiny=tiny)
    if tiny:
        found = rungs(model, Y)
    else:
        base = Cell("none", "coin", "d", judge_draws=16)
        attacks = ["pgd(steps=1, gradient=spsa(4))", "square(queries=3)"]
        cells = [base]
        for name in ("gray-box", "removal", "white-box", "adaptive", "score", "decision"):
            made = rung_cells(base, name, attacks, defense=Opaque(), steps=1, queries=20)
            cells += made
        subject = Subject(model, Opaque())
        found = execute(cells, lambda _: subject, some(Y), cache=Memory(), batch_size=4096)
    table = ladder(found)
    assert {r.scenario for r in table} >= {"none", "score", "decision", "adaptive", "worst case"}
    missed = [r for r in table if not contains(r.accuracy, p)]
    assert len(missed) <= 1, [(r.scenario, str(r.accuracy)) for r in missed]
    for rung in missed:
        width = rung.accuracy.high - rung.accuracy.low
        assert rung.accuracy.low - width / 2 <= p <= rung.accuracy.high + width / 2
    for result in found:
        votes = result.majority_of(9)
        # A vote of nine coins is right more often than one coin: the binomial tail says how often.
        often = sum(comb(9, k) * p**k * (1 - p) ** (9 - k) for k in range(5, 10))
        assert votes.low - 0.02 <= often <= votes.high + 0.02


def test_every_rung_finds_what_is_behind_a_coin() -> None:
    """A linear classifier behind a coin of 0.9, at a budget beyond every boundary.

    Oracle: attackers who meet it leave what the coin turns back (nothing but its mistakes are
    right); who transfers from another linear model leaves more.
    """
    model = CoinTimesLinear(0.9)
    found = rungs(model, model.linear(X).argmax(1), eps=0.5)
    left = {r.scenario: r.accuracy.value for r in ladder(found)}
    assert 0.85 < left["none"] < 0.95
    for name in ("gray-box", "white-box", "adaptive", "worst case"):
        assert left[name] < 0.1, name
    assert left["semi-brute-force"] < 0.5
    assert left["transfer"] > left["worst case"]
    lucky = next(r for r in found if r.cell.scenario == "semi-brute-force")
    assert lucky.luck is not None
    assert lucky.luck >= 0


# --- with a part that can be attacked: the truth of every image is known --------------------------


def truth(model: CoinTimesLinear, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Probability that the coin's classifier is right about each image, in closed form."""
    with torch.no_grad():
        logits = model.linear(x)
    said, classes = logits.argmax(1), logits.shape[1]
    return model.p * (said == y).double() + (1 - model.p) * ((said + 1) % classes == y).double()


@pytest.mark.parametrize("p", [0.95, 0.8])
@pytest.mark.parametrize("eps", [0.03, 0.5])
def test_what_an_attack_leaves_of_a_coin_is_reported_at_its_truth(p: float, eps: float) -> None:
    """Some of the samples, or all, can be turned; the coin goes on tossing about the others.

    Oracle: the linear classifier's decision about every stored image, and p. The truth of each cell
    is inside its interval; that of each rung, the least of its cells for each sample, too.
    """
    model = CoinTimesLinear(p)
    y = model.linear(X).argmax(1)
    cache = Memory()
    found = rungs(model, y, eps, cache)
    known = {}
    for result in found:
        kept = cache.examples(result.examples, 0)
        assert kept is not None
        known[id(result)] = truth(model, kept.x_adv, y[:FEW])
        assert contains(result.accuracy, float(known[id(result)].mean())), result.cell
    table = ladder(found)
    assert {r.scenario for r in table} == {*SCENARIOS, "worst case"}
    for rung in table:
        least = torch.stack([known[id(r)] for r in rung.cells]).amin(0)
        assert contains(rung.accuracy, float(least.mean())), (rung.scenario, str(rung.accuracy))
    standing = {r.scenario: r.accuracy.value for r in table}
    assert standing["none"] > 0.7
    if eps == 0.5:
        assert standing["white-box"] < 1.05 - p
    else:
        assert 0.1 < standing["white-box"] < standing["none"] - 0.1
