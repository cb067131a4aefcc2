"""`evaluate`: inputs that cannot be evaluated, and what comes out of one that can."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from feint.core.errors import (
    ConfigError,
    DtypeError,
    FeintError,
    GradientError,
    ModelError,
    RangeError,
    ShapeError,
    UnknownNameError,
)
from feint.evaluation import evaluate
from feint.evaluation.evaluate import Memory
from tests.evaluation.planted import Coin, SecretCoin, Spy, Through
from tests.tiny import Detach, LinearModel, Round, behind, images, predicted

X = images(6)
MODEL = LinearModel().eval()
Y = predicted(MODEL, X)


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ torch.ones(7, 3)


DENSE = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).eval()


class Half(nn.Module):
    """One logit vector for two images."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x) // 2, 3)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": X * 255}, RangeError, "divide by 255"),
    ({"x": (X * 255).byte()}, DtypeError, "from_uint8"),
    ({"x": X * torch.nan}, RangeError, "NaN"),
    ({"x": X[0]}, ShapeError, "add the batch axis"),
    ({"x": X[:0], "y": Y[:0]}, ConfigError, "no samples"),
    ({"x": X.double(), "model": DENSE}, ModelError, "the model fails on images"),
    ({"y": Y + 5}, RangeError, "y has labels"),
    ({"y": Y - 5}, RangeError, "y has labels"),
    ({"y": Y.float()}, DtypeError, "int64"),
    ({"y": Y[:3]}, ShapeError, r"expected \(6,\)"),
    ({"target": Y}, RangeError, "targets are the true label"),
    ({"target": torch.full_like(Y, 9)}, RangeError, "target has labels"),
    ({"index": torch.zeros(6, dtype=torch.int64)}, ConfigError, "there twice"),
    ({"index": torch.arange(5)}, ShapeError, "index"),
    ({"eps": 8.0}, RangeError, "8/255"),
    ({"eps": -0.1}, RangeError, "expected a number ≥ 0"),
    ({"norm": "linfinity"}, ConfigError, "expected one of linf"),
    ({"attacks": ["pdg"]}, UnknownNameError, "did you mean 'pgd'"),
    ({"attacks": ["pgd(stepz=3)"]}, UnknownNameError, "did you mean 'steps'"),
    ({"scenarios": ["white box"]}, UnknownNameError, "did you mean 'white-box'"),
    ({"scenarios": ["transfer"]}, ConfigError, "needs a source model"),
    ({"votes": 3}, ConfigError, "nothing in this pipeline is random"),
    ({"judge_draws": 0}, RangeError, "judge_draws is 0"),
    ({"judge_draws": 1, "model": Coin(0.5, shape=(3, 4, 4))}, RangeError, "at least 2"),
    ({"batch_size": 0}, RangeError, "batch_size is 0"),
    ({"defense": nn.Identity()}, ConfigError, "expected a feint Defense"),
    ({"defense": Through(), "backward": "identity"}, UnknownNameError, "backward rule of Through"),
    ({"model": LinearModel().train()}, ModelError, r"model.eval\(\)"),
    ({"model": lambda x: x}, ConfigError, "expected an nn.Module"),
    ({"model": Failing().eval()}, ModelError, "the model fails on images"),
    ({"model": Half().eval()}, ModelError, "expected logits"),
    ({"model": behind(Detach(), LinearModel()).eval()}, GradientError, "'model.front'"),
    ({"model": behind(Round(), LinearModel()).eval()}, GradientError, "'model.front'"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_what_cannot_be_evaluated(number: int) -> None:
    """One typed error each, that says what was got, what was expected, and how to fix it."""
    changes, error, match = BAD[number]
    arguments = {"model": MODEL, "x": X, "y": Y, "attacks": ["pgd(steps=1)"], **changes}
    if arguments["model"] is not MODEL:
        arguments.setdefault("scenarios", ["white-box"])
    with pytest.raises(error, match=match) as caught:
        evaluate(arguments.pop("model"), arguments.pop("x"), arguments.pop("y"), **arguments)
    assert isinstance(caught.value, FeintError)


def test_a_model_elsewhere() -> None:
    """The meta device stands for any other one."""
    from feint.core.errors import DeviceError

    with pytest.raises(DeviceError, match="model is on meta, x on cpu"):
        evaluate(LinearModel().eval().to("meta"), X, Y)


def test_words_instead_of_lists() -> None:
    found = evaluate(
        MODEL, X, Y, attacks="pgd(steps=1), fgsm", scenarios="none, white-box", eps=0.01
    )
    assert [r.cell.attack for r in found.results] == ["none", "pgd(steps=1)", "fgsm"]


def test_everything_comes_out_as_json() -> None:
    found = evaluate(MODEL, X, Y, defense=Through(), attacks=["pgd(steps=1)"], eps=0.01)
    data = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert set(data) == {"verdict", "grade", "cells", "findings", "seconds"}
    assert {c["scenario"] for c in data["cells"]} == {"none", "gray-box", "white-box"}
    entry = data["cells"][-1]
    assert entry["accuracy"].keys() == {"value", "low", "high", "n"}
    assert entry["distance"].keys() == {"rms", "abs_l2", "relative_l2", "linf"}
    assert {f["status"] for f in data["findings"]} <= {"pass", "warn", "fail"}


def test_a_second_evaluation_asks_only_what_is_new() -> None:
    """With one cache, other attacks cost what they cost, and the rest nothing."""
    spy, cache = Spy(LinearModel()), Memory()
    options: dict[str, Any] = {"scenarios": ["white-box"], "eps": 0.01, "cache": cache}
    first = evaluate(spy, X, Y, attacks=["pgd(steps=1)"], **options)
    again = evaluate(spy, X, Y, attacks=["pgd(steps=1)", "fgsm"], **options)
    assert [r.key for r in again.results[:2]] == [r.key for r in first.results]
    assert again.results[1].seconds == 0
    assert again.results[2].seconds > 0


def test_the_same_twice_and_another_seed() -> None:
    x, y = images(20, (3, 2, 2)), torch.zeros(20, dtype=torch.int64)
    options: dict[str, Any] = {
        "attacks": ["pgd(steps=1, gradient=eot(2))"],
        "scenarios": ["white-box"],
        "judge_draws": 8,
    }
    runs = [evaluate(Coin(0.5), x, y, seed=s, **options) for s in (0, 0, 1)]
    counts = [r.results[1].rows["correct"].tolist() for r in runs]
    assert counts[0] == counts[1]
    assert counts[0] != counts[2]
    assert [f.as_dict() for f in runs[0].findings] == [f.as_dict() for f in runs[1].findings]


def test_a_source_is_looked_at_too() -> None:
    x, y = images(8, (3, 2, 2)), torch.zeros(8, dtype=torch.int64)
    found = evaluate(
        Coin(0.5),
        x,
        y,
        source=SecretCoin(0.5),
        attacks=["pgd(steps=1, gradient=eot(2))"],
        scenarios=["transfer", "white-box"],
        judge_draws=4,
    )
    assert "unkeyed-randomness" in {f.check for f in found.findings}
    assert {r.cell.source for r in found.results} == {"", "SecretCoin"}


def test_targets() -> None:
    target = (Y + 1) % 5
    found = evaluate(
        MODEL, X, Y, target=target, attacks=["pgd(steps=20)"], scenarios=["white-box"], eps=0.5
    )
    white = found.results[1]
    assert white.cell.targeted
    assert white.hits.value == 1.0
    assert "targeted" in found.verdict.text


def test_nothing_of_the_model_is_changed() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(48, 5)).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.random.get_rng_state()
    evaluate(model, X, Y, attacks=["pgd(steps=1)"], scenarios=["white-box"], eps=0.01)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m.training for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)
