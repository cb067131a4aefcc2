"""Thermometer encoding. Oracles: numpy's digitize and cumsum, the published soft encoding written
out, and a linear network on codes whose gradient is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from feint.core.errors import ConfigError, RangeError, ShapeError
from feint.defenses import Thermometer
from feint.evaluation import Pipeline
from tests.contracts.defense import DefenseContract, images


class TestThermometer(DefenseContract):
    cls = Thermometer
    configs = ({}, {"levels": 2}, {"levels": 256}, {"levels": 5, "encoding": "one_hot"})
    batch_atol = 0.0


@pytest.mark.parametrize("levels", [2, 7, 16, 256])
def test_bits_are_numpys(levels: int) -> None:
    """Oracle: numpy.digitize for the level; a one-hot row, summed from the end."""
    x = images(0, 2, 3, 9, 5)
    x[0, 0, 0] = torch.tensor([0.0, 1.0, 1 / levels, 0.5, 1 - 1 / levels])
    level = np.digitize(x.double().numpy() * levels, np.arange(1, levels))
    one_hot = np.eye(levels)[level].transpose(0, 1, 4, 2, 3).reshape(2, 3 * levels, 9, 5)
    bits = np.flip(np.flip(np.eye(levels)[level], -1).cumsum(-1), -1)
    bits = bits.transpose(0, 1, 4, 2, 3).reshape(2, 3 * levels, 9, 5)
    hot = Thermometer(levels=levels, encoding="one_hot", output="code")(x)
    warm = Thermometer(levels=levels, output="code")(x)
    np.testing.assert_array_equal(hot.numpy(), one_hot)
    np.testing.assert_array_equal(warm.numpy(), bits)
    middle = (level + 0.5) / levels
    for encoding, code in (("one_hot", hot), ("thermometer", warm)):
        defense = Thermometer(levels=levels, encoding=encoding)  # type: ignore[arg-type]
        np.testing.assert_allclose(defense(x).numpy(), middle, rtol=0, atol=1e-6)
        torch.testing.assert_close(defense.decode(code), defense(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("levels", [2, 16])
def test_image_form_is_idempotent_and_near(levels: int) -> None:
    x = images(1, 2, 3, 20, 20)
    y = Thermometer(levels=levels)(x)
    assert float((y - x).abs().max()) <= 0.5 / levels + 1e-6
    assert torch.equal(Thermometer(levels=levels)(y), y)


def test_ramp_is_the_published_soft_encoding() -> None:
    """Oracle: Athalye et al.'s formula in numpy: (x − (256/L)·(j − 1)) / (256/L), cut to [0, 1]."""
    x = images(2, 2, 3, 6, 6).double()
    v = (x.numpy() * 256)[:, :, None]
    start = (256 / 16) * np.arange(-1, 15).reshape(1, 1, 16, 1, 1)
    expected = np.clip((v - start) / (256 / 16), 0, 1).reshape(2, 48, 6, 6)
    got = Thermometer(output="code").ramp(x, {})
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["ramp", "surrogate"])
@pytest.mark.parametrize("encoding", ["thermometer", "one_hot"])
def test_soft_codes_decode_to_a_straight_line(rule: str, encoding: str) -> None:
    """Oracle: the ramps' sum, s·x + 1/2L, s = 1 for `ramp` below the top level, else (L − 1)/L."""
    top = 15 / 16 if rule == "ramp" else 1.0
    x = images(3, 1, 1, 30, 30, high=top).double().requires_grad_()
    defense = Thermometer(encoding=encoding)  # type: ignore[arg-type]
    y = defense.stand_in(rule)(x, {})
    slope = 1.0 if rule == "ramp" else 15 / 16
    torch.testing.assert_close(y, slope * x + 1 / 32, rtol=0, atol=1e-12)
    (g,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(g, torch.full_like(g, slope))


def test_every_threshold_lies_on_its_ramp() -> None:
    """So that a step along the surrogate's gradient can flip the bit it speaks of."""
    for levels in (2, 3, 16, 100):
        defense = Thermometer(levels=levels, output="code")
        at = (torch.arange(1, levels).double() / levels).view(1, 1, 1, -1)
        soft = defense.surrogate(at, {})[0, 1:, 0]
        own = soft.diagonal()
        assert bool(((own > 0) & (own < 1)).all()) or levels == 2
        assert bool(((own >= 0) & (own <= 1)).all())


class OnCodes(nn.Module):
    """A linear classifier of two classes on 3·L channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = images(9, 2, channels, 4, 4).double() - 0.5

    def forward(self, code: torch.Tensor) -> torch.Tensor:
        return (code[:, None] * self.weight).flatten(2).sum(2)


def test_codes_feed_a_network_and_the_surrogate_its_gradient() -> None:
    """Oracle: for a linear network, Σ over the bits of weight × slope of the bit's ramp."""
    model, x = OnCodes(3 * 16), images(0, 2, 3, 4, 4, low=0.01, high=0.99).double()
    pipeline = Pipeline(model, Thermometer(output="code"))
    assert pipeline(x).shape == (2, 2)
    leaf = x.clone().requires_grad_()
    view = pipeline.view()
    assert torch.equal(view(leaf), pipeline(x))
    (g,) = torch.autograd.grad(view(leaf)[:, 1].sum(), leaf)
    bit = 1 + (x * 15).floor().long()  # the one that is on its ramp
    weight = model.weight[1].unflatten(0, (3, 16)).expand(2, -1, -1, -1, -1)
    expected = 15 * weight.gather(2, bit[:, :, None])[:, :, 0]
    torch.testing.assert_close(g, expected)


def test_codes_default_to_the_surrogate_and_images_to_the_identity() -> None:
    assert Thermometer(output="code").recommended_rule == "surrogate"
    assert Thermometer().recommended_rule == "identity"
    white = torch.ones(1, 3, 4, 4, requires_grad=True)
    alive = {}
    for rule in ("identity", "ramp", "surrogate"):
        code = Thermometer(output="code").view(rule)(white)
        (g,) = torch.autograd.grad(code.sum(), white)
        alive[rule] = bool(g.any())
    assert alive == {"identity": True, "ramp": False, "surrogate": True}


@pytest.mark.parametrize("levels", [1, 257, 4.0])
def test_bad_levels(levels: int) -> None:
    with pytest.raises(RangeError, match="2 to 256"):
        Thermometer(levels=levels)


def test_bad_names_and_codes() -> None:
    with pytest.raises(ConfigError, match="'thermometer' or 'one_hot'"):
        Thermometer(encoding="gray")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'image' or 'code'"):
        Thermometer(output="bits")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="a multiple of 16 channels"):
        Thermometer().decode(torch.zeros(1, 20, 2, 2))
