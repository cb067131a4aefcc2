"""SSIM. Oracle: scikit-image's `structural_similarity` with its defaults (7×7, uniform)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from feint.core import random
from feint.core.errors import RangeError, ShapeError
from feint.core.similarity import ssim


def pair(b: int, c: int, h: int, w: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    keys = random.keys(0, b)
    x = random.uniform(keys, (c, h, w))
    y = x + noise * random.normal(random.fold(keys, "noise"), (c, h, w))
    return x, y.clamp(0, 1)


@pytest.mark.parametrize("window", [7, 3, 11])
@pytest.mark.parametrize(("c", "h", "w"), [(3, 32, 32), (1, 11, 25), (4, 40, 13)])
@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_equals_scikit_image(c: int, h: int, w: int, noise: float, window: int) -> None:
    x, y = pair(3, c, h, w, noise)
    expected = [
        structural_similarity(
            a.double().numpy(), b.double().numpy(), channel_axis=0, data_range=1.0, win_size=window
        )
        for a, b in zip(x, y, strict=True)
    ]
    np.testing.assert_allclose(ssim(x, y, window).numpy(), expected, rtol=0, atol=1e-12)


def test_equal_and_flat_images() -> None:
    # Closed form: one for equal images; for flat ones only the first factor is left.
    x, _ = pair(2, 3, 16, 16, 0.0)
    assert torch.equal(ssim(x, x), torch.ones(2, dtype=torch.float64))
    dark, light = torch.full((1, 1, 8, 8), 0.25), torch.full((1, 1, 8, 8), 0.75)
    expected = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    assert float(ssim(dark, light)) == pytest.approx(expected, rel=1e-12)
    assert ssim(x[:0], x[:0]).shape == (0,)


def test_bad_input_is_refused() -> None:
    x = torch.zeros(1, 3, 6, 20)
    with pytest.raises(ShapeError, match="at least 7"):
        ssim(x, x)
    with pytest.raises(ShapeError, match="twice"):
        ssim(x, x[..., :10])
    for window in (1, 4):
        with pytest.raises(RangeError, match="odd"):
            ssim(x, x, window)
