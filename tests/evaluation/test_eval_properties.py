"""Measured properties. Oracles: closed forms, numpy, planted defenses, pieces against the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from feint.core import random
from feint.core.errors import RangeError, ShapeError
from feint.defenses import Defense, Params, parse
from feint.evaluation.properties import mean, measure, properties, summarise
from tests.contracts.defense import images


class FirstPixel(nn.Module):
    """Class 1 if the first value exceeds a half."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.full((len(x),), 0.5), x[:, 0, 0, 0]], 1)


class Invert(Defense):
    """Turns every image into its negative with probability one half."""

    stochastic = True

    def draw(self, keys: Tensor, shape: torch.Size) -> Params:
        return {"flip": random.integers(keys, 0, 2)}

    def transform(self, x: Tensor, params: Params) -> Tensor:
        flip = params["flip"].view(-1, 1, 1, 1).to(x.dtype)
        return x * (1 - flip) + (1 - x) * flip


def natural(b: int, side: int) -> Tensor:
    """Smooth images: what a codec is made for."""
    coarse = images(3, b, 3, side // 8 + 2, side // 8 + 2)
    wide = nn.functional.interpolate(coarse, (side, side), mode="bicubic", align_corners=True)
    return wide.clamp(0, 1)


def test_distances_of_a_known_shift() -> None:
    # Oracle: numpy on the shifted array itself.
    x, y = images(0, 5, 3, 12, 12), torch.zeros(5, dtype=torch.int64)
    found = properties(parse("pixel_shift(dx=2, pad='zero')"), FirstPixel(), x, y)
    moved = np.zeros_like(x.numpy())
    moved[..., 2:] = x.numpy()[..., :-2]
    each = np.sqrt(np.mean((moved.astype(np.float64) - x.numpy()) ** 2, axis=(1, 2, 3)))
    assert found.rms.value == pytest.approx(each.mean(), rel=1e-6)
    low, high = stats.t.interval(0.95, 4, each.mean(), stats.sem(each))
    assert (found.rms.low, found.rms.high) == pytest.approx((low, high), rel=1e-5)
    assert found.spread.value == 0
    assert not found.stochastic
    assert found.gradient.value == pytest.approx(1)
    assert found.fidelity["exact"].value == pytest.approx(1)
    # The new first pixel is black: class 0 for all, which is the label.
    assert found.accuracy.value == 1
    assert found.clean.value == float((x[:, 0, 0, 0] <= 0.5).double().mean())
    assert found.agreement.value == found.clean.value


def test_accuracy_and_spread_of_a_planted_defense() -> None:
    """Closed form: a negative flips the class, so a share of one half is right; the pixelwise
    variance over draws that are x or 1 − x equally often is (1 − 2x)²/4."""
    n, draws = 6, 400
    x = images(1, n, 1, 8, 8)
    y = FirstPixel()(x).argmax(1)
    found = properties(Invert(), FirstPixel(), x, y, draws=draws, model_draws=draws)
    assert found.clean.value == 1
    assert found.accuracy.value == found.agreement.value
    assert abs(found.accuracy.value - 0.5) < 5 * 0.5 / (n * draws) ** 0.5
    expected = ((1 - 2 * x) / 2).square().flatten(1).mean(1).sqrt().mean()
    assert found.spread.value == pytest.approx(float(expected), rel=0.01)
    assert found.stochastic
    assert found.differentiable


@pytest.mark.parametrize("text", ["bit_depth", "jpeg", "fd(align='exact')", "fd + rdg"])
def test_step_functions_have_no_gradient(text: str) -> None:
    x = natural(3, 32)
    found = properties(parse(text), FirstPixel(), x, torch.zeros(3, dtype=torch.int64))
    assert found.gradient.value == pytest.approx(0, abs=0.05)
    assert not found.differentiable


@pytest.mark.parametrize("text", ["rdg", "rand", "pixel_deflection", "wavelet", "noise", "none"])
def test_gathers_and_smooth_functions_have_one(text: str) -> None:
    x = natural(3, 32)
    found = properties(parse(text), FirstPixel(), x, torch.zeros(3, dtype=torch.int64))
    assert found.differentiable
    assert found.stochastic == (text not in ("wavelet", "none"))


@pytest.mark.parametrize("text", ["fd", "fd + rdg"])
def test_the_shift_is_what_the_identity_misses(text: str) -> None:
    """Property: 43 px are padded by 5, so FD as coded moves by 2 px; only `aligned` undoes that."""
    x, y = natural(4, 43), torch.zeros(4, dtype=torch.int64)
    found = properties(parse(text), FirstPixel(), x, y)
    assert abs(found.fidelity["identity"].value) < 0.1
    assert found.fidelity["aligned"].value > 0.4
    exact = properties(parse(text.replace("fd", "fd(align='exact')")), FirstPixel(), x, y)
    assert exact.fidelity["identity"].value == exact.fidelity["aligned"].value > 0.4


def test_pieces_make_the_whole() -> None:
    x, y = images(2, 7, 3, 16, 16), torch.zeros(7, dtype=torch.int64)
    defense = parse("noise(scale=0.1) + rdg")
    whole = properties(defense, FirstPixel(), x, y, draws=3, probed=5)
    parts = [
        measure(
            defense,
            FirstPixel(),
            x[i],
            y[i],
            draws=3,
            probed=5,
            index=torch.tensor(i),
            batch_size=2,
        )
        for i in ([0, 1, 2], [3], [4, 5, 6])
    ]
    again = summarise(parts, str(defense), draws=3)
    assert again.as_dict() == whole.as_dict()
    assert whole.gradient.n == 5
    assert whole.as_dict()["stochastic"] is True


def test_means() -> None:
    assert mean([1.0, np.nan, 3.0]).value == 2
    assert mean([1.0, np.nan, 3.0]).n == 2
    assert mean([0.5]).low == -np.inf
    with pytest.raises(RangeError, match="no values"):
        mean([np.nan])


def test_bad_input_is_refused() -> None:
    model, defense = FirstPixel(), parse("noise")
    x, y = images(0, 2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RangeError, match="at least one"):
        properties(defense, model, x[:0], y[:0])
    with pytest.raises(RangeError, match="draws"):
        properties(defense, model, x, y, draws=1)
    with pytest.raises(RangeError, match="model_draws"):
        properties(defense, model, x, y, model_draws=9)
    with pytest.raises(ShapeError, match="at least 7"):
        properties(defense, model, x[..., :6], y)
