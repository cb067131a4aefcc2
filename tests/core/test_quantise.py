"""8-bit conversion against numpy and torchvision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from feint.core import random
from feint.core.errors import ConfigError, DtypeError
from feint.core.quantise import from_uint8, quantise, to_uint8, to_uint8_numpy

LEVELS = torch.arange(256, dtype=torch.uint8)
VALUES = torch.cat([random.uniform(random.keys(0, 1), (5000,))[0], torch.tensor([0.0, 1.0])])


def test_nearest_equals_numpy() -> None:
    expected = np.round(VALUES.double().numpy() * 255).astype(np.uint8)
    assert np.array_equal(to_uint8(VALUES.double()).numpy(), expected)


def test_truncate_equals_numpy() -> None:
    expected = (VALUES.double().numpy() * 255).astype(np.uint8)
    assert np.array_equal(to_uint8(VALUES.double(), "truncate").numpy(), expected)


def test_torchvision_equals_torchvision() -> None:
    expected = tv.to_dtype_image(VALUES.view(1, 1, -1), torch.uint8, scale=True).flatten()
    assert torch.equal(to_uint8(VALUES, "torchvision"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rounding", ["nearest", "truncate", "torchvision"])
def test_the_array_form_is_the_tensor_form(rounding: str, dtype: torch.dtype) -> None:
    # Oracle: `to_uint8`; halves between levels, what is outside of [0, 1] and no number included.
    odd = torch.tensor([-0.5, 1.5, torch.nan, torch.inf, -torch.inf])
    values = torch.cat([VALUES, (LEVELS + 0.5) / 255, odd]).to(dtype)
    got = to_uint8_numpy(values.numpy(), rounding)  # type: ignore[arg-type]
    assert got.dtype == np.uint8
    assert np.array_equal(got, to_uint8(values, rounding).numpy())  # type: ignore[arg-type]


def test_the_three_differ_on_floats() -> None:
    # Oracle: closed form for uniform values: ½ of them truncate elsewhere; torchvision's levels
    # are nearly ⌊256x⌋, which differs from the nearest level for a quarter.
    nearest, cut, tv_ = (to_uint8(VALUES, r) for r in ("nearest", "truncate", "torchvision"))
    assert float((nearest != cut).double().mean()) == pytest.approx(0.5, abs=0.03)
    assert float((nearest != tv_).double().mean()) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("rounding", ["nearest", "truncate", "torchvision"])
def test_the_three_agree_on_8_bit_images(rounding: str, dtype: torch.dtype) -> None:
    # Oracle: identity on all 256 levels.
    assert torch.equal(to_uint8(from_uint8(LEVELS, dtype), rounding), LEVELS)


def test_quantise_is_idempotent(dtype: torch.dtype) -> None:
    once = quantise(VALUES.to(dtype))
    assert once.dtype == dtype
    assert torch.equal(quantise(once), once)
    assert float((once - VALUES).abs().max()) <= 0.5 / 255 + 1e-7


def test_errors() -> None:
    with pytest.raises(ConfigError, match="expected 'nearest', 'truncate' or 'torchvision'"):
        to_uint8(VALUES, "floor")
    with pytest.raises(DtypeError, match="floating point"):
        to_uint8(LEVELS)
    with pytest.raises(DtypeError, match="uint8"):
        from_uint8(VALUES)
