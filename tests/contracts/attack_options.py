"""Contract of attacks: masks, targets, estimators, minimal norms, bad input."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from feint.core import random
from feint.core.errors import (
    ConfigError,
    DtypeError,
    FeintError,
    ModelError,
    RangeError,
    ShapeError,
    UnknownNameError,
)
from feint.core.gradients import eot, spsa
from feint.core.norms import distance
from tests.contracts.attack_harness import EPS, AttackHarness, needs
from tests.tiny import (
    LinearModel,
    Round,
    StochasticLinear,
    behind,
    images,
    predicted,
)


class BadModel(nn.Module):
    """Gives logits that no classifier may give."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1).sum(1, keepdim=True)
        if self.kind == "nan":
            return torch.cat([z, z * torch.nan], 1)
        if self.kind == "one class":
            return z
        return torch.cat([z, z], 1)[:-1]


def _x() -> Tensor:
    return images(3)


def _y() -> Tensor:
    return torch.tensor([0, 1, 2])


BAD: dict[str, tuple[dict[str, Any], type[FeintError], str]] = {
    # what is wrong: (changed arguments, error, part of its message that names the fix)
    "images in 0…255": ({"x": _x() * 255}, RangeError, "divide by 255"),
    "normalised images": ({"x": _x() * 4 - 2}, RangeError, "Normalized"),
    "NaN": ({"x": _x().clone().index_fill_(3, torch.tensor(1), torch.nan)}, RangeError, "NaN"),
    "infinite": ({"x": _x() / 0}, RangeError, "expected [0, 1]"),
    "no batch axis": ({"x": _x()[0]}, ShapeError, "x[None]"),
    "integer images": ({"x": (_x() * 255).byte()}, DtypeError, "from_uint8"),
    "labels too large": ({"y": torch.tensor([0, 1, 5])}, RangeError, "expected 0 to 4"),
    "labels negative": ({"y": torch.tensor([0, 1, -1])}, RangeError, "expected 0 or more"),
    "labels float": ({"y": torch.rand(3)}, DtypeError, "int64"),
    "labels one-hot": ({"y": torch.eye(3).long()}, ShapeError, "one per image"),
    "labels too few": ({"y": torch.tensor([0, 1])}, ShapeError, "one per image"),
    "eps in 0…255": ({"eps": 8.0, "norm": "linf"}, RangeError, "8/255"),
    "eps beyond the box": ({"eps": 128.0, "norm": "l2"}, RangeError, "at most 6.9"),
    "eps negative": ({"eps": -0.1}, RangeError, "≥ 0"),
    "eps NaN": ({"eps": float("nan")}, RangeError, "≥ 0"),
    "step_size in 0…255": ({"step_size": 2.0, "norm": "linf"}, RangeError, "2/255"),
    "step_size negative": ({"step_size": -1.0}, RangeError, "≥ 0"),
    "no steps": ({"steps": 0}, RangeError, "≥ 1"),
    "half a step": ({"steps": 2.5}, RangeError, "whole number"),
    "no restarts": ({"restarts": 0}, RangeError, "≥ 1"),
    "restarts without random start": (
        {"restarts": 2, "random_start": False},
        ConfigError,
        "random_start=True",
    ),
    "unknown norm": ({"norm": "l7"}, ConfigError, "expected one of"),
    "unknown loss": ({"loss": "crossentropy"}, UnknownNameError, "'cross_entropy'"),
    "loss over the batch": ({"loss": lambda z, y: z.mean()}, ConfigError, "per sample"),
    "unknown stop": ({"stop": "sucess"}, ConfigError, "'success'"),
    "unknown direction": ({"direction": "sing"}, ConfigError, "'sign'"),
    "unknown preset": ({"preset": "nobody"}, UnknownNameError, "preset"),
    "mask float": ({"mask": torch.ones(3, 1, 4, 4)}, DtypeError, "bool"),
    "mask shape": ({"mask": torch.ones(3, 1, 4, 5, dtype=torch.bool)}, ShapeError, "expected"),
    "keys too few": ({"seed": random.keys(0, 2)}, ShapeError, "random.keys"),
    "NaN logits": ({"model": BadModel("nan"), "y": _y() * 0}, ModelError, "weights"),
    "one class": ({"model": BadModel("one class"), "y": _y() * 0}, ModelError, "at least 2"),
    "lost samples": ({"model": BadModel("short")}, ModelError, "expected logits (3, classes)"),
}


class OptionsContract(AttackHarness):
    """Options, minimal-norm attacks, and one clear error for every bad input."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        super().pytest_generate_tests(metafunc)
        if "bad" in metafunc.fixturenames:
            known = {*self.info.parameters, "model", "x", "y"}
            cases = [
                case
                for case, (changed, _, _) in BAD.items()
                if set(changed) <= known
                and (changed.get("norm") in (None, "l7", *self.info.norms))
                and (case != "unknown preset" or self.info.presets)
            ]
            metafunc.parametrize("bad", cases)

    # --- options ----------------------------------------------------------------------------------

    @needs("mask")
    @given(seed=st.integers(0, 2**32), per_channel=st.booleans(), shared=st.booleans())
    def test_mask_is_respected(self, norm: str, seed: int, per_channel: bool, shared: bool) -> None:
        # Oracle: property, bit by bit.
        model = LinearModel()
        x = images(3, seed=seed)
        y = predicted(model, x)
        drawn = random.uniform(
            random.keys(seed, 1 if shared else 3), (3 if per_channel else 1, 4, 4)
        )
        mask = drawn < 0.4
        mask[:, :, 0, 0] = True
        x_adv = self.run(model, x, y, norm, mask=mask)
        changed = x_adv != x
        assert not bool((changed & ~mask).any())
        if self.info.goal == "budget":  # within a mask, a minimal attack may find nothing
            assert bool(changed.flatten(1).any(1).all())

    @needs("mask")
    def test_a_mask_of_nothing_returns_x(self, norm: str, linear: LinearModel) -> None:
        x = images(3).to(linear.weight.dtype)
        mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
        assert torch.equal(self.run(linear, x, predicted(linear, x), norm, mask=mask), x)

    @needs("targeted")
    def test_with_two_classes_targeted_is_untargeted(self, norm: str) -> None:
        # Oracle: away from one of two classes is towards the other.
        model = LinearModel(classes=2, dtype=torch.float64)
        x = images(5).double()
        y = predicted(model, x)
        away = self.run(model, x, y, norm)
        towards = self.run(model, x, 1 - y, norm, targeted=True)
        torch.testing.assert_close(towards, away, rtol=0, atol=1e-9)

    @needs("gradient")
    def test_works_under_eot(self, norm: str) -> None:
        # Oracle: the noise-free model. Its class changes for most samples although each gradient
        # is random, and the passes are multiplied by the draws.
        model, clean = StochasticLinear(dtype=torch.float64), LinearModel(dtype=torch.float64)
        x = images(6).double()
        y = predicted(clean, x)
        most = {"linf": 0.4, "l2": 2.0, "l1": 8.0, "l0": 8.0}
        x_adv = self.run(model, x, y, norm, gradient=eot(4), **self.knobs(eps=most[norm]))
        assert float((predicted(clean, x_adv) != y).double().mean()) >= 0.5
        again = self.run(model, x, y, norm, gradient=eot(4), **self.knobs(eps=most[norm]))
        assert torch.equal(again, x_adv)

    @needs("gradient")
    def test_works_under_spsa(self, norm: str) -> None:
        # Oracle: the model behind the rounding, which no gradient passes: its margin shrinks.
        clean = LinearModel(dtype=torch.float64)
        model = behind(Round(64), clean)
        x = images(4).double()
        y = predicted(clean, x)
        estimator = spsa(32, sigma=0.05)
        x_adv = self.run(model, x, y, norm, gradient=estimator, **self.knobs(loss="margin"))
        with torch.no_grad():
            before = clean(x).gather(1, y[:, None])[:, 0]
            after = clean(x_adv).gather(1, y[:, None])[:, 0]
        assert bool((x_adv != x).flatten(1).any(1).all())
        assert float((after - before).mean()) < 0

    # --- minimal-norm attacks ---------------------------------------------------------------------

    @needs(goal="minimal")
    def test_finds_the_least_distance_on_a_linear_model(self, norm: str) -> None:
        # Oracle: closed form.
        model = LinearModel(dtype=torch.float64)
        x = images(6, low=0.4, high=0.6).double()
        y = predicted(model, x)
        x_adv = self.run(model, x, y, norm)
        assert bool((predicted(model, x_adv) != y).all())
        assert bool((distance(x_adv, x, norm) <= self.tolerance * model.distance(x, y, norm)).all())

    @needs(goal="minimal")
    def test_returns_x_where_nothing_is_adversarial(self, norm: str) -> None:
        # Oracle: closed form: no image of the box leaves class 0.
        model = LinearModel(dtype=torch.float64)
        with torch.no_grad():
            model.bias[0] += 1e3
        x = images(4).double()
        assert torch.equal(self.run(model, x, predicted(model, x), norm), x)

    # --- odd input, defined results ---------------------------------------------------------------

    def test_probabilities_are_attacked_as_they_are(self, norm: str) -> None:
        # Oracle: property. A softmax in place of logits is a model like any other: no error, a
        # point within the bounds; what is adversarial for one is so for the other.
        model = LinearModel(dtype=torch.float64)
        soft = behind(model, nn.Softmax(1))
        x = images(4).double()
        y = predicted(model, x)
        x_adv = self.run(soft, x, y, norm)
        assert bool(((x_adv >= 0) & (x_adv <= 1)).all())
        if "eps" in self.info.parameters:
            assert bool((distance(x_adv, x, norm) <= EPS[norm]).all())
        assert torch.equal(predicted(soft, x_adv), predicted(model, x_adv))

    @needs("targeted")
    def test_a_target_that_is_predicted_already_is_a_success(self, norm: str) -> None:
        # Oracle: property: such as the true label of a sample that is classified correctly.
        model = LinearModel(dtype=torch.float64)
        x = images(4).double()
        y = predicted(model, x)
        aim = self.knobs(objective="projection")  # feature_bpda's own need
        x_adv = self.run(model, x, y, norm, targeted=True, **aim)
        assert torch.equal(predicted(model, x_adv), y)
        if self.info.goal == "minimal":
            assert torch.equal(x_adv, x)

    @needs("mask")
    def test_a_mask_of_nothing_for_one_sample(self, norm: str) -> None:
        # Oracle: the run without that sample: the others do not know of it.
        model = LinearModel()
        x, keys = images(3), random.keys(7, 3)
        y = predicted(model, x)
        mask = torch.ones(3, 1, 4, 4, dtype=torch.bool)
        mask[1] = False
        x_adv = self.run(model, x, y, norm, mask=mask, seed=keys)
        assert torch.equal(x_adv[1], x[1])
        rest = torch.tensor([0, 2])
        alone = self.run(model, x[rest], y[rest], norm, mask=mask[rest], seed=keys[rest])
        assert torch.equal(x_adv[rest], alone)

    # --- bad input --------------------------------------------------------------------------------

    def test_bad_input_names_the_fix(self, bad: str) -> None:
        changed, error, message = BAD[bad]
        arguments = {"model": LinearModel(), "x": _x(), "y": _y(), **self.kwargs, **changed}
        with pytest.raises(error, match=re.escape(message)):
            type(self).attack(
                arguments.pop("model"), arguments.pop("x"), arguments.pop("y"), **arguments
            )
