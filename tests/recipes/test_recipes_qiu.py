"""S1's metrics. Oracles: cases counted by hand, and a recursion in one number."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from feint.core import random
from feint.core.errors import ConfigError
from feint.defenses import parse
from feint.diagnostics.numbers import Number
from feint.evaluation import Cell, CellResult
from feint.evaluation.rounds import History
from feint.recipes.measures_qiu import _YEAR, WAYS, _Identity, _through, rounds_of
from feint.recipes.metrics import METRICS, Case
from feint.recipes.reproduce import _hit
from feint.recipes.schema import load_recipe


class Lab(SimpleNamespace):
    """A lab that remembers nothing."""

    seed, batch_size, device = 0, 64, "cpu"

    def keep(self, name, fields, used, make):
        return make()


def test_an_image_that_was_hit_is_wrong_from_then_on_and_success_adds_up():
    # Four images, rounds 0 … 3: hit in round 2, never, in round 0 and in round 3.
    history = History(
        np.array([2, -1, 0, 3]),
        np.array([[1, 1, 0, 1], [1, 0, 0, 1], [0, 1, 0, 0], [0, 1, 0, 0]], bool),
    )
    assert [r.value for r in history.accuracy] == [0.75, 0.5, 0.25, 0.25]
    assert [r.value for r in history.success] == [0.25, 0.25, 0.5, 0.75]
    assert [history.rounds_to(s) for s in (0.1, 0.25, 0.5, 0.75, 0.9)] == [0, 0, 2, 3, None]


class Sum(nn.Module):
    """Logits (s, −s) of the sum s of what lies above gray."""

    def forward(self, x):
        s = (x - 0.5).flatten(1).sum(1)
        return torch.stack([s, -s], 1)


def test_raw_steps_hit_in_the_round_that_a_recursion_in_one_number_foretells():
    n, starts, rounds = 12, [0.1, 1.0, 3.0, 5.9], 6
    x = torch.stack([torch.full((3, 2, 2), 0.5 + s / n) for s in starts])
    first, right = [], []
    for s in starts:  # the cross-entropy of class 1 is log(1 + exp(2s)), and ds/dx is 1
        hit, alive = -1, []
        for r in range(rounds + 1):
            alive.append(hit < 0 and s > 0)
            if hit < 0 and s <= 0:
                hit = r
            s -= n * 0.1 * 2 / (1 + np.exp(-2 * s))
        first.append(hit)
        right.append(alive)
    y, target = torch.zeros(4).long(), torch.ones(4).long()
    found = rounds_of(
        Sum(), None, x, target, y, random.keys(0, 4), way="BPDA", rounds=rounds, rms=1.0,
        checked=[0, 1, rounds], batch_size=3,
    )  # fmt: skip
    assert list(found.first_hit) == first
    np.testing.assert_array_equal(found.right, np.array(right).T)
    assert len(set(first)) > 2  # the case tells rounds apart
    assert torch.equal(found.images[0], x)
    # All have left before the last round: its images are those that hit.
    assert (Sum()(found.images[rounds]).argmax(1) == 1).all()


@pytest.mark.parametrize("way", WAYS)
def test_every_way_finds_targets_where_nothing_hides_them(way):
    x = torch.full((2, 3, 16, 16), 0.5) + torch.tensor([0.001, 0.002]).view(2, 1, 1, 1)
    y, target = torch.zeros(2).long(), torch.ones(2).long()
    found = rounds_of(
        Sum(), parse("pixel_shift"), x, target, y, random.keys(0, 2), way=way, rounds=4, draws=2
    )
    assert (found.first_hit > 0).all()
    assert not found.right[-1].any()


def test_bpda_passes_the_identity_backward_and_the_defense_forward():
    defense = parse("fd + rdg")
    x = random.uniform(random.keys(0, 2), (3, 32, 32)).float().requires_grad_()
    keys, weights = random.keys(1, 2), torch.arange(3 * 32 * 32.0).view(1, 3, 32, 32)
    out = _Identity(defense)(x, keys)
    torch.testing.assert_close(out, defense(x.detach(), keys), atol=0, rtol=0)
    (gradient,) = torch.autograd.grad((out * weights).sum(), x)
    torch.testing.assert_close(gradient, weights.expand_as(x))
    with pytest.raises(ConfigError, match="way is"):
        _through("BPDA and so on", Sum(), defense)


def cell(**rows):
    given = {k: np.array(v) for k, v in rows.items()}
    n = len(next(iter(given.values())))
    full = {"draws": np.full(n, 4), "index": np.arange(n), "label": np.zeros(n, int), **given}
    return CellResult(Cell("none", "m"), "k", full, "e")


def test_success_of_the_right_leaves_out_what_was_wrong_before():
    clean = cell(correct=[4, 4, 0])
    case = Case(
        {},
        {
            "attacked": [
                cell(correct=[0, 4, 0], target_hits=[4, 1, 4]),
                cell(correct=[4, 4, 0], target_hits=[0, 3, 4]),
            ],
            "clean": [clean],
        },
        Lab(),
    )
    found = METRICS["attack success of the right"](case).numbers["value"]
    assert (found.value, found.n) == ((1 + 0.75) / 2, 2)  # the third image does not count


def test_rdg_of_no_distortion_drops_what_its_map_skips():
    # Strips of 4 of 8 pixels read 0, 4/3, 8/3, 4 and 4, 16/3, 20/3, 8, rounded and stopped at 7.
    lab = Lab()
    lab.images = lambda fields: (torch.rand(2, 3, 8, 8), torch.zeros(2), torch.arange(2))
    lab.defense = parse
    fields = {"defense": "rdg(delta=0.0, strips=2)", "number": "dropped"}
    found = METRICS["distortion over grids"](Case(fields, {}, lab))
    assert list(found.arrays["rows"]) == [0, 1, 3, 4, 4, 5, 7, 7]  # 6 of 8 lines
    assert found.numbers["dropped"].value == pytest.approx(1 - (6 / 8) ** 2)
    assert found.arrays["seen"].shape == (3, 8, 8)


def test_years_are_no_arxiv_numbers():
    assert _YEAR.search("Qiu et al., arXiv 2005.13712, 2020").group() == "2020"
    for kind, least in (("attacks", 20), ("defenses", 20)):
        counts = [
            METRICS["published until"](Case({"kind": kind, "until": y}, {}, Lab())).numbers["value"]
            for y in (2013, 2018, 2100)
        ]
        assert counts[0].value == 0 < counts[1].value < counts[2].value
        assert counts[2].value >= least


def test_sampling_error_is_that_of_shares_only():
    recipe = load_recipe("qiu/table1")
    assert _hit(Number(0.2), 0.24, recipe, True) is True  # 24 of 100
    assert _hit(Number(0.2), 0.24, recipe, False) is False
    assert _hit(Number(0.2), 0.204, recipe, False) is True  # as finely as it is printed


def test_published_series_are_those_of_the_figure():
    recipe = load_recipe("qiu/figure3a")
    series = dict(zip(recipe.axes["round"], recipe.targets["one draw"]["FD"], strict=True))
    assert (series["0"], series["49"]) == (97, 45)
    assert load_recipe("qiu/figure3b").targets["one draw"]["FD"][-1] == 17
    assert load_recipe("qiu/table6").targets["I-FGSM (ε = 0.01)"]["ACC"][1] == 0.05  # as printed
