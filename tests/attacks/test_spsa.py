from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from feint.attacks import pgd, spsa
from feint.core import random
from feint.core.errors import ConfigError, GradientError, RangeError
from feint.core.norms import distance
from tests.contracts.attack import AttackContract
from tests.tiny import Counting, LinearModel, Round, TinyConv, behind, images, predicted


class TestSPSA(AttackContract):
    attack = staticmethod(spsa)
    kwargs: ClassVar = {"steps": 8, "samples": 24, "step_size": 0.15}
    random = True

    # The trace shows the points of the ascent, not the probes; their count is tested below.
    test_trace_sees_every_evaluated_point = None

    def test_an_early_success_is_not_lost(self, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
        # Oracle: closed form, as for every attack; with so many probes, so near, that the measured
        # slope is the true one but for a few percent.
        near = {"samples": 3000, "sigma": 1e-5, "optimizer": "steepest"}
        monkeypatch.setattr(type(self), "kwargs", near)
        super().test_an_early_success_is_not_lost(norm)

    def test_pixels_at_the_ends_move_inwards(
        self, norm: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Oracle: closed form, as for every attack; with probes enough for the sign of each slope.
        monkeypatch.setattr(type(self), "kwargs", {**self.kwargs, "samples": 200})
        super().test_pixels_at_the_ends_move_inwards(norm)


@pytest.mark.parametrize("estimator", ["spsa", "nes"])
@pytest.mark.parametrize("optimizer", ["adam", "steepest"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_succeeds_if_and_only_if_eps_exceeds_the_distance(
    norm: str, optimizer: str, estimator: str
) -> None:
    # Oracle: closed form, |z_y − z_j| / ‖w_y − w_j‖_q, q dual to the norm.
    # Few values, so that a hundred directions measure the slope to some 30 %; steps average it out.
    shape = (3, 2, 2)
    model = LinearModel(classes=2, shape=shape, dtype=torch.float64)
    x = images(3, shape, low=0.4, high=0.6).double()
    y = predicted(model, x)
    for i, least in enumerate(model.distance(x, y, norm).tolist()):
        one = slice(i, i + 1)
        # The sign of a small slope is measured wrongly at times, which costs linf a few percent.
        for factor in (0.98, 1.02 if norm == "l2" else 1.08):
            eps = factor * least
            x_adv = spsa(
                model, x[one], y[one], eps=eps, norm=norm, steps=60, step_size=eps / 20,
                samples=100, estimator=estimator, optimizer=optimizer, seed=random.keys(0, [i]),
            )  # fmt: skip
            assert bool(predicted(model, x_adv) != y[one]) is (factor > 1)


@pytest.mark.parametrize("stop", ["success", "never"])
def test_passes_are_those_documented(stop: str) -> None:
    # Oracle: closed form: steps·(1 + 2·samples) + 1 forward passes, no backward pass; and the trace
    # shows every point of the ascent.
    inner = TinyConv()
    model = Counting(inner)
    x = images(4, (3, 6, 6)).double()
    y = predicted(inner, x)
    rows = last = 0

    def trace(step: int, points: Tensor, logits: Tensor, loss: Tensor, active: Tensor) -> None:
        nonlocal rows, last
        rows, last = rows + len(points), len(points) if step == 5 else 0
        torch.testing.assert_close(logits[:, 0], inner(points), rtol=0, atol=1e-9)
        assert bool((distance(points, x[active], "linf") <= 0.02).all())

    spsa(model, x, y, eps=0.02, steps=5, samples=7, stop=stop, trace=trace)
    assert model.forwards == last + (rows - last) * 15
    assert model.backwards == 0
    if stop == "never":
        assert model.forwards == 4 * (5 * 15 + 1)


def test_gets_through_what_stops_gradients() -> None:
    # Oracle: the linear model behind the rounding falls at 1.3 times its distance; pgd sees no
    # gradient at all.
    clean = LinearModel(classes=2, dtype=torch.float64)
    model = behind(Round(256), clean)
    x = images(4, low=0.4, high=0.6).double()
    y = predicted(model, x)
    eps = 1.3 * float(clean.distance(x, y, "linf").max())
    with pytest.raises(GradientError):
        pgd(model, x, y, eps=eps)
    x_adv = spsa(model, x, y, eps=eps, steps=30, samples=60, sigma=0.05)
    assert bool((predicted(model, x_adv) != y).all())


def test_the_nes_preset_is_its_keywords() -> None:
    # Oracle: the same run, spelled out.
    model, x = LinearModel(), images(3)
    y = predicted(model, x)
    kwargs = {"steps": 3, "stop": "never"}
    named = spsa(model, x, y, preset="nes", **kwargs)
    spelled = spsa(
        model, x, y, estimator="nes", samples=50, sigma=0.001, optimizer="steepest", **kwargs
    )
    assert torch.equal(named, spelled)


def test_bad_options() -> None:
    x, y = images(1), torch.tensor([0])
    for wrong in ({"estimator": "spas"}, {"optimizer": "sgd"}):
        with pytest.raises(ConfigError, match="expected"):
            spsa(LinearModel(), x, y, **wrong)
    for wrong in ({"samples": 0}, {"sigma": 0.0}):
        with pytest.raises(RangeError, match="spsa"):
            spsa(LinearModel(), x, y, **wrong)
