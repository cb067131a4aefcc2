"""Bit depth. Oracles: numpy's integer shifts and rint, the closed form of the surrogate."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from feint.core.errors import ConfigError, RangeError
from feint.defenses import BitDepth
from tests.contracts.defense import DefenseContract, images


class TestBitDepth(DefenseContract):
    cls = BitDepth
    configs = ({}, {"bits": 1}, {"bits": 5, "rounding": "truncate"}, {"preset": "qiu"})
    batch_atol = 0.0


@pytest.mark.parametrize("bits", range(1, 9))
def test_truncation_is_a_shift_of_bytes(bits: int) -> None:
    x = images(0, 2, 3, 9, 9)
    byte = (x.numpy() * 255).astype(np.uint8)
    expected = ((byte >> (8 - bits)) << (8 - bits)).astype(np.float32) / np.float32(255)
    got = BitDepth(bits=bits, rounding="truncate")(x)
    np.testing.assert_array_equal(got.numpy(), expected)


@pytest.mark.parametrize("bits", range(1, 9))
def test_rounding_is_that_of_feature_squeezing(bits: int) -> None:
    x = images(0, 2, 3, 9, 9)
    top = np.float32(2**bits - 1)
    expected = np.rint(x.numpy() * top) / top
    got = BitDepth(bits=bits)(x)
    np.testing.assert_array_equal(got.numpy(), expected)
    assert len(got.unique()) <= 2**bits
    assert torch.equal(BitDepth(bits=bits)(got), got)


def test_s1_reaches_224_of_255() -> None:
    levels = BitDepth(preset="qiu")(torch.linspace(0, 1, 256).view(1, 1, 16, 16)) * 255
    assert levels.unique().round().tolist() == [0, 32, 64, 96, 128, 160, 192, 224]


@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_surrogate_stays_near_and_has_the_cubic_derivative(bits: int, rounding: str) -> None:
    """Oracle: |r³| ≤ 1/8 of a level, derivative 3r² with r the distance to the rounded value."""
    defense = BitDepth(bits=bits, rounding=rounding)  # type: ignore[arg-type]
    x = images(1, 1, 1, 40, 40).double().requires_grad_()
    level = 2 ** (8 - bits) / 255 if rounding == "truncate" else 1 / (2**bits - 1)
    soft = defense.surrogate(x, {})
    assert float((soft.detach() - defense(x.detach())).abs().max()) <= level / 8 + 1e-12
    (g,) = torch.autograd.grad(soft.sum(), x)
    v = x.detach() / level - (0.5 if rounding == "truncate" else 0)
    torch.testing.assert_close(g, 3 * (v - v.round()) ** 2)


def test_the_surrogate_dies_on_squeezed_images_and_the_default_does_not() -> None:
    defense = BitDepth(bits=3)
    squeezed = defense(images(0, 1, 3, 8, 8)).requires_grad_()
    for rule, alive in (("surrogate", False), ("identity", True), (None, True)):
        (g,) = torch.autograd.grad(defense.view(rule)(squeezed).sum(), squeezed)
        assert (float(g.abs().max()) > 1e-6) == alive


@pytest.mark.parametrize("bits", [0, 9, 2.5])
def test_bad_bits(bits: float) -> None:
    with pytest.raises(RangeError, match="1 to 8"):
        BitDepth(bits=bits)  # type: ignore[arg-type]


def test_bad_rounding() -> None:
    with pytest.raises(ConfigError, match="'nearest' or 'truncate'"):
        BitDepth(rounding="up")  # type: ignore[arg-type]
