"""Metrics of S3, each against a closed form.

Oracles: counting by hand; linear "autoencoders", whose gradients are known; ranks.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from feint.core.errors import RangeError
from feint.recipes.measures_s2snet import SOURCES, scaled, shares_8bit
from feint.recipes.metrics import METRICS, Case
from feint.recipes.reproduce import reproduce
from feint.recipes.schema import Recipe
from feint.reports.reproduction_s2snet import equalised

HALVES = """
import torch
from torch import nn

class Halves(nn.Module):
    '''Class 1 if the mean of the image exceeds a half: logits (0.5 - mean, mean - 0.5).'''
    def forward(self, x):
        mean = x.flatten(1).mean(1)
        return torch.stack([0.5 - mean, mean - 0.5], 1)

def halves():
    return Halves()
"""


def _result(correct, draws=1, **rows):
    correct = np.asarray(correct)
    rows = {"correct_8bit": correct, "draws": np.full(len(correct), draws), **rows}
    return SimpleNamespace(rows=rows, draws=draws)


def _case(attacked, clean, **fields):
    distances = {"relative_l2": np.array([0.1, 0.3, 0.1, 0.3]), "linf": np.full(4, 0.5)}
    results = [_result(row, draws, **distances) for row, draws in attacked]
    return Case(fields, {"attacked": results, "clean": [_result(clean)]}, None)


def test_newly_misclassified_counts_what_the_judged_got_right():
    # Right without attack: the first three; of them the attack turns one.
    found = METRICS["newly misclassified, 8-bit"](_case([([1, 0, 1, 0], 1)], [1, 1, 1, 0]))
    assert found.numbers["value"].value == pytest.approx(1 / 3)
    assert found.numbers["value"].n == 3
    assert found.numbers["accuracy"].value == pytest.approx(0.5)
    assert found.numbers["relative_l2"].value == pytest.approx(0.2)
    assert found.numbers["linf"].value == pytest.approx(0.5)


def test_relative_accuracy_is_a_quotient():
    found = METRICS["relative accuracy, 8-bit"](_case([([1, 0, 1, 0], 1)], [1, 1, 1, 0]))
    assert found.numbers["value"].value == pytest.approx(2 / 3)


def test_nothing_right_is_an_error():
    with pytest.raises(RangeError, match="no clean image right"):
        METRICS["newly misclassified, 8-bit"](_case([([1, 0, 1, 0], 1)], [0, 0, 0, 0]))


def test_worst_case_per_image_only_where_no_luck_is_involved():
    fixed = [_result([1, 0, 1, 0]), _result([0, 1, 1, 0])]
    assert shares_8bit(fixed).tolist() == [0, 0, 1, 0]
    # Of a random pipeline the attack that is worse on the mean, as a whole.
    luck = [_result([4, 0, 2, 2], 4), _result([0, 4, 1, 1], 4)]
    assert shares_8bit(luck).tolist() == [0, 1, 0.25, 0.25]


def test_scaled_perturbation():
    x, x_adv = torch.full((1, 1, 1, 2), 0.2), torch.tensor([[[[0.31, 0.0]]]])
    assert torch.allclose(scaled(x, x_adv, 1), torch.tensor([[[[79 / 255, 0.0]]]]))  # 79.05
    assert torch.allclose(scaled(x, x_adv, 2), torch.tensor([[[[107 / 255, 0.0]]]]))
    assert torch.equal(scaled(x, x_adv, 0), x.mul(255).round() / 255)
    assert float(scaled(x, x_adv, 16).max()) == 1.0


def test_equalised_gives_ranks():
    assert equalised(np.array([3.0, -5.0, 9.0])).tolist() == [0.5, 0.0, 1.0]
    assert equalised(np.full((2, 2), 7.0)).tolist() == [[0.5, 0.5], [0.5, 0.5]]
    # Equal values share the middle of their ranks.
    assert equalised(np.array([0.0, 1.0, 1.0, 2.0])).tolist() == [0.0, 0.5, 0.5, 1.0]


def _recipe(axes, base, tmp_path, monkeypatch, samples=8):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(HALVES)
    levels = np.array([40, 90, 120, 130, 140, 150, 180, 220], np.uint8)
    x = np.broadcast_to(levels[:, None, None, None], (8, 3, 8, 8)).copy()
    x[:, :, ::2] += 8
    np.savez(tmp_path / "set.npz", x=x, y=(x.reshape(8, -1).mean(1) > 127.5).astype(np.int64))
    scale = {"about": "a test", "data": {"spec": "set.npz", "samples": samples}, "checks": "none"}
    return Recipe.model_validate(
        {
            "name": "s2snet/test", "title": "t", "place": "p", "axes": axes,
            "base": {"model": "net.py:halves", **base},
            "scales": dict.fromkeys(("smoke", "cpu", "paper"), scale),
        }
    )  # fmt: skip


def test_scaled_attack_reaches_what_its_length_says(tmp_path, monkeypatch):
    # The classifier's margin is the distance of the mean from 1/2: a uniform step of 4/255 turns
    # the means 124 and 134 (of 255) not, a step of 16/255 those within 16 of the middle.
    base = {"metric": "newly misclassified, scaled", "attack": "fgsm(eps=4/255)",
            "scenario": "white-box", "factors": [1, 4], "defense": "none"}  # fmt: skip
    recipe = _recipe({"factor": {"1": {"factor": 1}, "4": {"factor": 4}}}, base,
                     tmp_path, monkeypatch)  # fmt: skip
    found = reproduce(recipe, folder=tmp_path / "run")
    values = [e.ours.value for e in found.entries]
    # Means 44 94 124 134 144 154 184 224: |mean − 127.5| = 83.5 33.5 3.5 6.5 16.5 26.5 56.5 96.5.
    assert values == [pytest.approx(1 / 8), pytest.approx(2 / 8)]
    assert found.entries[1].others["linf"].value == pytest.approx(16 / 255)


def test_gradients_of_a_linear_autoencoder_do_not_depend_on_the_label(tmp_path, monkeypatch):
    # Halves' gradient is constant over the pixels; the same for either label but for the sign.
    axes = {"of": {"f": {"of": "f"}, "S2S": {"of": "S2S"}},
            "against": {"f": {"against": "f"}, "another label": {"against": "another label",
                                                                 "may_be_none": True}}}  # fmt: skip
    net = "s2snet(weights='untrained', width=2, stages=1)"
    base = {"metric": "gradient similarity", "s2s": net, "ae": net}
    found = reproduce(_recipe(axes, base, tmp_path, monkeypatch), folder=tmp_path / "run")
    own, other, across, none = (e.ours.value for e in found.entries)
    assert own == 1.0
    assert other == pytest.approx(1.0)
    assert -1 <= across < 1
    assert none is None
    assert SOURCES[0] == "f"


def test_memberships_of_an_attack_that_always_works(tmp_path, monkeypatch):
    axes = {"domain": {"f": {"domain": "f"}}, "fools": {"f": {"fools": "f"},
                                                        "both": {"fools": "f∘S2S"}}}  # fmt: skip
    base = {"metric": "membership", "attack": "fgsm(eps=0.5)", "shown": 100,
            "defense": "bit_depth(bits=8)"}  # fmt: skip
    recipe = _recipe(axes, base, tmp_path, monkeypatch)
    with pytest.raises(Exception, match="exact"):  # bit_depth has no derivative to attack through
        reproduce(recipe, folder=tmp_path / "run")
