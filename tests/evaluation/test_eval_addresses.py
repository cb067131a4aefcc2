"""Content addresses and the loop: what changes a number changes the address, and nothing else."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from feint.core.errors import ConfigError, DtypeError, FeintError, RangeError, ShapeError
from feint.core.registry import ATTACKS
from feint.evaluation import Batch, Cell, CellResult, Subject, execute
from feint.evaluation.cell import fingerprint
from feint.evaluation.evaluate import Memory, Progress, TensorSamples
from feint.evaluation.shard import attack_shard
from tests.evaluation.planted import Coin, Jitter, Spy, Steps
from tests.tiny import LinearModel, StochasticLinear, TinyConv, images, predicted

CELL = Cell("white-box", "m", "d", "pgd(steps=2)")
CONTEXT = {"data": "1", "model": "2", "defense": "3", "source": "4", "attack": "5"}


def keys(cell: Cell, **context: str) -> tuple[str, str]:
    c = {**CONTEXT, **context}
    return cell.attack_key(c), cell.key(c)


@pytest.mark.parametrize(
    "changes",
    [
        {"attack": "pgd(steps=3)"},
        {"norm": "l2"},
        {"eps": 0.1},
        {"targeted": True},
        {"votes": 3},
        {"backward": "identity"},
        {"combine": "majority"},
        {"seed": 1},
        {"scenario": "gray-box"},
    ],
)
def test_what_changes_the_examples_changes_both_addresses(changes: dict[str, Any]) -> None:
    examples, rows = keys(CELL)
    others = keys(replace(CELL, **changes))
    assert others[0] != examples
    assert others[1] != rows


def test_examples_for_another_judge_are_others() -> None:
    """Where another pipeline is judged no sample stops early: same view, other examples."""
    subject = Subject(LinearModel(), Steps())
    found = {}
    for attack in ("pgd(steps=2)", "pgd(steps=2, stop='never')"):
        for scenario in ("white-box", "removal"):
            cell = replace(CELL, scenario=scenario, attack=attack)
            context = subject.context(cell, "data")
            found[attack, scenario] = cell.attack_key(context), cell.key(context)
    assert len({rows for _, rows in found.values()}) == 4
    assert len({examples for examples, _ in found.values()}) == 3  # the last two take every step


def test_the_undefended_model_is_the_gray_box_attackers() -> None:
    """Cells that share an address have the same examples, whichever comes first."""
    model = StochasticLinear(sigma=0.1)
    attack = "pgd(steps=2, stop='never', gradient=eot(2))"
    bare, gray = Cell("white-box", "m", attack=attack), Cell("gray-box", "m", "d", attack)
    subjects = Subject(model), Subject(model, Jitter())
    pairs = list(zip(subjects, (bare, gray), strict=True))
    assert len({c.attack_key(s.context(c, "data")) for s, c in pairs}) == 1
    batch = samples().batch
    first, second = (attack_shard(c, s, batch, 8).x_adv for s, c in pairs)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("cell", "examples", "rows"),
    [
        (Cell("none", "m", "d"), "c6b35ee0237b7faf8fc8", "81f85f41310f5f7451c4"),
        (Cell("none", "m", targeted=True), "04f318a11eadfba447e8", "58404a42dacf2854e1d7"),
        (
            Cell("gray-box", "m", "d", "pgd(steps=2)"),
            "bfea8b2293100471511e",
            "d6c952ba00ad8b5513d9",
        ),
        (Cell("removal", "m", "d", "pgd(steps=2)"), "0d2024047d12488836c9", "9a9c0c56c10784ca1e2b"),
        (
            Cell("transfer", "m", "d", "pgd(steps=2)", "s"),
            "93cbe5ce4da362562522",
            "b4204220c7c278703fe2",
        ),
        (
            Cell("white-box", "m", attack="square", norm="l2", eps=0.5),
            "19a4dae9ff58b3da8185",
            "49306b116870dc4d6171",
        ),
        (
            Cell("white-box", "m", "d", "pgd(steps=2)", votes=3, backward="identity", seed=7),
            "799d31eb58152f5b1e78",
            "fab0dbe18759510a014b",
        ),
    ],
)
def test_addresses_stay_what_they_were(cell: Cell, examples: str, rows: str) -> None:
    """Oracle: frozen, as `attack_key` and `key` gave them for CONTEXT before there was a ladder
    (commit 140ae87): a run that is there is not computed again."""
    assert keys(cell) == (examples, rows)


@pytest.mark.parametrize("part", ["data", "model", "defense", "attack"])
def test_content_changes_the_addresses(part: str) -> None:
    assert not set(keys(CELL)) & set(keys(CELL, **{part: "other"}))


def test_the_judge_changes_the_rows_only() -> None:
    examples, rows = keys(CELL)
    others = keys(replace(CELL, judge_draws=64))
    assert others[0] == examples
    assert others[1] != rows
    gray = Cell("gray-box", "m", "d", "pgd(steps=2)")
    assert keys(gray)[0] == keys(gray, defense="other")[0]
    assert keys(gray)[1] != keys(gray, defense="other")[1]
    removal = replace(CELL, scenario="removal")
    assert keys(removal)[1] != keys(replace(removal, judge_draws=64))[1]


def test_what_does_not_matter() -> None:
    """Spelling, names of the same content, number types; without an attacker the budget."""
    same = [
        replace(CELL, attack="pgd( steps = 2 )"),
        replace(CELL, model="another name"),
        replace(CELL, eps=np.float64(8 / 255)),
    ]
    assert {keys(c) for c in same} == {keys(CELL)}
    whole = replace(CELL, eps=1)
    assert keys(whole) == keys(replace(CELL, eps=1.0))
    assert keys(CELL, source="other") == keys(CELL)
    clean = Cell("none", "m", "d")
    assert keys(clean) == keys(replace(clean, eps=0.5, norm="l2"))


def test_close_budgets_are_different() -> None:
    assert keys(CELL) != keys(replace(CELL, eps=float(np.nextafter(8 / 255, 1))))


def test_fingerprints_of_modules() -> None:
    """Equal modules agree; a weight's last bit, a setting, a buffer, a mode or the code differ."""
    model = LinearModel()
    base = fingerprint(model)
    assert fingerprint(LinearModel()) == base
    assert fingerprint(None) == ""
    with torch.no_grad():
        model.weight[0, 0, 0, 0] = torch.nextafter(model.weight[0, 0, 0, 0], torch.tensor(9.0))
    others = [model, LinearModel(dtype=torch.float64), TinyConv(), TinyConv(batch_norm=True)]
    prints = [fingerprint(m) for m in others]
    assert len({base, *prints}) == 5
    assert fingerprint(Coin(0.8)) != fingerprint(Coin(0.95))  # an attribute, in no state dict
    assert fingerprint(Steps(levels=4)) != fingerprint(Steps(levels=8))
    assert fingerprint(StochasticLinear(sigma=0.1)) != fingerprint(StochasticLinear(sigma=0.2))
    dropout = nn.Sequential(nn.Flatten(), nn.Dropout()).eval()
    asleep = fingerprint(dropout)
    dropout[1].train()
    assert fingerprint(dropout) != asleep
    loose = nn.Sequential(nn.Flatten())
    loose.register_buffer("scale", torch.ones(1), persistent=False)
    one = fingerprint(loose)
    loose.scale += 1
    assert fingerprint(loose) != one


def test_the_code_of_a_class_counts() -> None:
    """Two classes that print the same, with another forward pass."""

    def plus() -> nn.Module:
        class Front(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x + 1

        return Front()

    def minus() -> nn.Module:
        class Front(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x - 1

        return Front()

    assert repr(plus()) == repr(minus())
    assert fingerprint(plus()) == fingerprint(plus())
    assert fingerprint(plus()) != fingerprint(minus())


def samples(n: int = 10, **changes: Any) -> TensorSamples:
    x = images(n)
    fields = {"x": x, "y": predicted(LinearModel(), x), "index": torch.arange(n), "target": None}
    return TensorSamples(Batch(**{**fields, **changes}))


def test_documentation_of_a_class_does_not_count(tmp_path: Path) -> None:
    """Docstrings decide nothing; the same words in an expression do."""
    text = '''
from torch import nn

class Front(nn.Module):
    """{0}

    More.
    """

    def forward(self, x):
        """{0}"""
        note = """{1}"""
        return x * len(note)
'''

    def made(*words: str) -> str:
        file = tmp_path / f"m{len(list(tmp_path.iterdir()))}.py"
        file.write_text(text.format(*words))
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[file.stem] = module  # where `inspect` looks for it
        spec.loader.exec_module(module)
        try:
            return fingerprint(module.Front())
        finally:
            del sys.modules[file.stem]

    assert made("What it does.", "note") == made("It says so otherwise: ü.", "note")
    assert made("What it does.", "note") != made("What it does.", "other")
    assert made("What it does.", "a\n\nb") != made("What it does.", "a\nb")  # a text, not a page


def test_fingerprints_of_samples() -> None:
    """Content counts, order too; sums that agree do not hide a difference."""
    base = samples().fingerprint
    assert samples().fingerprint == base
    x = images(10)
    swapped = x.clone()
    swapped[0, 0, 0, 0], swapped[0, 0, 0, 1] = x[0, 0, 0, 1], x[0, 0, 0, 0]
    changed = [
        samples(x=swapped),
        samples(x=x.double()),
        samples(x=x.flip(0)),
        samples(y=samples().batch.y.flip(0)),
        samples(index=torch.arange(10) + 1),
        samples(target=torch.zeros(10, dtype=torch.int64)),
    ]
    assert len({base, *(s.fingerprint for s in changed)}) == 7
    with pytest.raises(ConfigError, match="there twice"):
        samples(index=torch.zeros(10, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"y": torch.zeros(9).long()}, ShapeError, r"y has shape \(9,\); expected \(10,\)"),
        ({"y": torch.zeros(10)}, DtypeError, "y has dtype torch.float32; expected int64"),
        ({"index": torch.zeros(10, 1).long()}, ShapeError, "index"),
        ({"target": torch.zeros(3).long()}, ShapeError, "target"),
        ({"x": torch.zeros(10, 3)}, ShapeError, r"expected \(B, C, H, W\)"),
    ],
)
def test_batches_that_do_not_fit(
    changes: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        samples(**changes)


# --- the loop ----------------------------------------------------------------------------------

CELLS = [
    Cell("none", "m", "d"),
    Cell("white-box", "m", "d", "pgd(steps=3, gradient=eot(2))", judge_draws=6, eps=0.05),
    Cell("white-box", "m", "d", "pgd(steps=3, gradient=eot(2))", judge_draws=4, eps=0.05),
]


def loop(model: nn.Module, **options: Any) -> list[CellResult]:
    subject = Subject(model, Jitter())
    options = {"cache": Memory(), **options}
    return execute(options.pop("cells", CELLS), lambda _: subject, samples(), **options)


def same(a: list[CellResult], b: list[CellResult]) -> bool:
    return all(
        np.array_equal(p.rows[name], q.rows[name], equal_nan=p.rows[name].dtype.kind == "f")
        for p, q in zip(a, b, strict=True)
        for name in p.rows
        if name != "late_gain"  # a mean over other batches may differ in its last bit
    )


def test_shards_and_batches_do_not_change_a_row() -> None:
    """Oracle: bit equality on a linear model whose products are summed sample by sample."""
    whole = loop(LinearModel(), shard_size=100, batch_size=128)
    assert same(whole, loop(LinearModel(), shard_size=4, batch_size=7))
    assert [r.key for r in whole] == [r.key for r in loop(LinearModel(), batch_size=7)]


def test_nothing_is_computed_twice() -> None:
    spy, cache = Spy(LinearModel()), Memory()
    first = loop(spy, cache=cache)
    assert first[1].examples == first[2].examples
    assert first[1].forwards == first[2].forwards > 0
    spy.forget()
    seen: list[Progress] = []
    second = loop(spy, cache=cache, on_progress=seen.append)
    assert spy.asked == 0
    assert same(first, second)
    assert [(p.position, p.done, p.cached) for p in seen[::2]] == [
        (0, 0, True),
        (1, 10, True),
        (2, 20, True),
    ]
    assert seen[-1].done == seen[-1].total == 30


def test_examples_are_shared_by_cells_that_differ_in_their_judge() -> None:
    spy = Spy(LinearModel())
    loop(spy, cells=CELLS[1:2])
    alone = spy.differentiated
    spy.forget()
    loop(spy, cells=CELLS[1:])
    assert spy.differentiated == alone


def test_a_cache_of_other_shards_does_not_count() -> None:
    """Shard 1 of 5 samples is not shard 1 of 4."""
    cache = Memory()
    loop(LinearModel(), cache=cache, shard_size=5)
    found = loop(LinearModel(), cache=cache, shard_size=4)
    assert same(found, loop(LinearModel()))


def test_what_does_not_fit_is_refused_before_any_work() -> None:
    spy = Spy(LinearModel())
    bad = Cell("white-box", "m", "d", "pgd(gradient=backprop)")
    with pytest.raises(ConfigError, match="one draw of a random pipeline"):
        loop(spy, cells=[*CELLS, bad])
    assert spy.asked == 0
    with pytest.raises(RangeError, match="batch_size is 0"):
        loop(spy, batch_size=0)
    with pytest.raises(FeintError, match="no samples"):
        execute(CELLS, lambda _: Subject(spy), samples(0), cache=Memory())


def test_a_version_changes_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(LinearModel(), Jitter(), versions=" jitter:1")
    before = subject.context(CELL, "data")
    monkeypatch.setitem(
        ATTACKS._entries, "pgd", replace(ATTACKS["pgd"], version=ATTACKS["pgd"].version + 1)
    )
    after = subject.context(CELL, "data")
    assert CELL.key(before) != CELL.key(after)
    newer = Subject(LinearModel(), Jitter(), versions=" jitter:2").context(CELL, "data")
    assert CELL.key(newer) != CELL.key(after)
