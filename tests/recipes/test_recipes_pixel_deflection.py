"""S2's metrics. Oracles: numpy, torch, and cases counted by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from feint.core.errors import RangeError
from feint.defenses import parse
from feint.diagnostics.numbers import Measured
from feint.evaluation import Cell, CellResult, Pipeline
from feint.recipes.measures_pixel_deflection import half_of, similarity
from feint.recipes.metrics import METRICS, Case
from feint.recipes.schema import load_recipe


def test_half_of_an_even_spread_is_a_half():
    guide = torch.rand(1, 4, 6)
    assert half_of(torch.ones(1, 4, 6), guide).item() == 0.5
    assert half_of((guide >= guide.median()).float(), guide).item() > 0.9
    weights = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    assert half_of(weights, torch.tensor([[[9.0, 0.0], [0.0, 8.0]]])).item() == 0.5  # 1 + 4 of 10
    assert half_of(weights, torch.zeros(1, 2, 2)).item() == pytest.approx(0.3)  # the first two
    assert half_of(torch.zeros(1, 2, 2), weights).isnan().item()


def test_similarity_is_numpys_correlation():
    a, b = torch.rand(3, 5, 7), torch.rand(3, 5, 7)
    expected = [np.corrcoef(u.flatten(), v.flatten())[0, 1] for u, v in zip(a, b, strict=True)]
    np.testing.assert_allclose(similarity(a, b), expected, atol=1e-6)
    assert similarity(a, 2 * a + 1).allclose(torch.ones(3).double())
    assert similarity(torch.zeros(1, 2, 2), a[:1, :2, :2]).isnan().all()


def cell(correct, prediction):
    n = len(correct)
    rows = {"correct": np.array(correct), "prediction": np.array(prediction)}
    rows |= {"draws": np.full(n, 10), "index": np.arange(n), "label": np.arange(n)}
    return CellResult(Cell("none", "m"), "k", rows, "e")


def test_majority_counts_votes_of_images_that_were_right_before():
    # Images 0 and 1 were right; image 0 keeps the majority on 6 of 10 draws, image 1 loses it.
    cells = {"attacked": [cell([6, 4, 10], [0, 7, 2])], "clean": [cell([10, 10, 0], [0, 1, 9])]}
    found = METRICS["majority of the right"](Case({}, cells, None)).numbers["value"]
    assert (found.value, found.n) == (0.5, 2)
    nothing = {"attacked": cells["attacked"], "clean": [cell([0, 0, 0], [1, 2, 0])]}
    with pytest.raises(RangeError, match="no clean image right"):
        METRICS["majority of the right"](Case({}, nothing, None))


class Lab(SimpleNamespace):
    """A lab of one model and a few images that remembers nothing."""

    seed, batch_size, device = 0, 2, "cpu"

    def keep(self, name, fields, used, make):
        return make()

    def model(self, spec):
        return self.net

    def pipeline(self, fields):
        return Pipeline(self.net, parse(str(fields["defense"])))

    def images(self, fields):
        return self.x, self.y, torch.arange(len(self.x))


@pytest.fixture(scope="module")
def lab():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10)).eval()
    x = torch.rand(6, 3, 16, 16).mul(255).round().div(255)
    with torch.no_grad():
        y = net(x).argmax(1)
    y[0] = (y[0] + 1) % 10  # this one is wrong before the attack, and does not count
    return Lab(net=net, x=x, y=y)


BASE = {"model": "m", "attack": "fgsm(eps=0.2)", "defense": "pixel_deflection(deflections=0)"}


def test_without_deflections_the_probabilities_are_the_models_own(lab):
    from feint.attacks import fgsm

    x, y = lab.x[1:], lab.y[1:]
    with torch.no_grad():
        after = lab.net(fgsm(lab.net, x, y, eps=0.2)).softmax(1)
        before = lab.net(x).softmax(1)
    said = after.argmax(1)
    assert (said != y).all()
    rows = torch.arange(len(y))
    for image, shares in (("clean", before), ("adversarial", after)):
        for of, label in (("true", y), ("adversarial", said)):
            fields = {**BASE, "image": image, "of": of, "draws": 2}
            found = METRICS["class probability"](Case(fields, {}, lab)).numbers["value"]
            assert found.value == pytest.approx(shares[rows, label].mean().item(), abs=1e-6)


def test_ranks_are_pooled_over_attacks_and_zero_is_beyond_the_top_five(lab):
    held = {
        "a": {"adversarial": [2, 1, 7], "original": [3, 1, 2], "moved": [True, False, True]},
        "b": {"adversarial": [2, 3, 1], "original": [2, 9, 1], "moved": [True, True, False]},
    }

    class Recalls(Lab):
        def keep(self, name, fields, used, make):
            arrays = {k: np.array(v) for k, v in held[fields["attack"]].items()}
            return Measured(arrays, {})

    def share(side, place):
        fields = {"model": "m", "attacks": ["a", "b"], "side": side, "place": place}
        return METRICS["rank of the class"](Case(fields, {}, Recalls())).numbers["value"]

    assert (share("adversarial", "2").value, share("adversarial", "2").n) == (0.5, 4)
    assert share("adversarial", "0").value == 0.25
    assert share("original", "0").value == 0.25
    assert share("original", "2").value == 0.5


def test_deflection_of_nothing_moves_nothing(lab):
    fields = {**BASE, "denoiser": "wavelet", "number": "deflected"}
    found = METRICS["deflection"](Case(fields, {}, lab))
    assert found.numbers["value"].value == 0
    assert found.numbers["denoised"].value > 0


def test_published_numbers_are_as_printed():
    first, third = load_recipe("pixel_deflection/table1"), load_recipe("pixel_deflection/table3")
    assert first.targets["C&W (0.04)"] == [0.04, 0.048, 0.927, 0.98]
    # S2's ablation is of ensembles: its last column equals Ens-10 of Table 1.
    for name, row in first.targets.items():
        label = name.partition(" (")[0]
        if name in ("FGSM (0.12)", "IGSM (0.09)", "DFool (0.08)", "JSMA (0.05)", "LBFGS (0.04)"):
            continue
        assert third.targets[label][-1] == pytest.approx(100 * row[-1])
