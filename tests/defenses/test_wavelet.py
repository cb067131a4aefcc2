"""Wavelet. Oracles: PyWavelets, scikit-image per channel, a numpy rewrite of the 2018 function."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
import torch
from skimage import color
from skimage.restoration import denoise_wavelet

from feint.core import random
from feint.core.color import rgb_to_ycbcr, ycbcr_to_rgb
from feint.core.errors import ConfigError, RangeError, ShapeError
from feint.defenses import Wavelet
from feint.defenses.wavelet import haar, haar_inverse
from tests.contracts.defense import DefenseContract, images


class TestWavelet(DefenseContract):
    cls = Wavelet
    configs = (
        {},
        {"method": "visu", "levels": 2},
        {"method": "visu", "sigma": None},
        {"method": "sure", "sigma": 0.1},
        {"method": "hard"},
    )
    channels = (3,)


class TestWaveletOfRGB(DefenseContract):
    cls = Wavelet
    configs = ({"color": "rgb"}, {"color": "rgb", "method": "hard", "levels": 1})


SIDES = [(299, 50), (37, 37), (32, 32), (224, 33), (16, 5), (3, 2)]


def natural(seed: int, height: int, width: int) -> torch.Tensor:
    """A smooth image with some noise, float64: sub-bands above and below the noise level."""
    i, j = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    waves = [torch.sin(i / (7 + c) + j / (11 - c)) * torch.cos(j / (5 + c)) for c in range(3)]
    noise = random.normal(random.keys(seed, 1), (3, height, width), torch.float64)[0]
    return (0.5 + 0.35 * torch.stack(waves) + 0.05 * noise).clamp(0, 1)[None].double()


@pytest.mark.filterwarnings("ignore:Level value:UserWarning")  # of pywt, for the smallest images
@pytest.mark.parametrize(("height", "width"), [*SIDES, (1, 1), (1, 6)])
def test_one_level_is_pywavelets(height: int, width: int) -> None:
    x = images(0, 2, 3, height, width).double()
    approximation, details = haar(x)
    a, d = pywt.wavedecn(x.numpy(), "db1", mode="symmetric", level=1, axes=(2, 3))
    np.testing.assert_allclose(approximation, a, atol=1e-14)
    for k, name in enumerate(("da", "ad", "dd")):
        np.testing.assert_allclose(details[:, :, k], d[name], atol=1e-14)
    back = haar_inverse(approximation, details)[..., :height, :width]
    torch.testing.assert_close(back, x, rtol=0, atol=1e-14)


# --- the 2018 function, channel by channel, in numpy --------------------------------------------


def sure(d: np.ndarray) -> float:
    """SureShrink's threshold for unit noise, straight from Donoho and Johnstone 1995."""
    d = np.abs(d.ravel())
    n = d.size
    universal = np.sqrt(2 * np.log(n))
    if np.mean(d**2) - 1 <= np.log2(n) ** 1.5 / np.sqrt(n):
        return universal
    candidates = [0.0, *sorted(v for v in d if v <= universal)]
    risks = [n - 2 * np.sum(d <= t) + np.sum(np.minimum(d, t) ** 2) for t in candidates]
    return candidates[int(np.argmin(risks))]


def shrink_channel(channel: np.ndarray, method: str, sigma: float, levels: int | None = None):
    if levels is None:
        levels = max(min(pywt.dwt_max_level(n, 2) for n in channel.shape) - 3, 1)
    approximation, *details = pywt.wavedecn(channel, "db1", mode="symmetric", level=levels)
    for level in details:
        for name, d in level.items():
            if method == "bayes":
                eps = np.finfo(np.float64).eps
                threshold = sigma**2 / np.sqrt(max(np.mean(d**2) - sigma**2, eps))
            elif method == "sure":
                threshold = sigma * sure(d / sigma)
            else:
                threshold = sigma * np.sqrt(2 * np.log(channel.size))
            if threshold > 0:  # pywt divides by zero for zeros at a threshold of zero
                level[name] = pywt.threshold(d, threshold, "hard" if method == "hard" else "soft")
    out = pywt.waverecn([approximation, *details], "db1", mode="symmetric")
    return out[tuple(slice(n) for n in channel.shape)]


def by_hand(image: np.ndarray, method: str, sigma: float, levels: int | None = None) -> np.ndarray:
    """RGB (C, H, W) → YCbCr, min-max, shrink, clip, back: scikit-image 0.13/0.14."""
    ycbcr = color.rgb2ycbcr(np.moveaxis(image, 0, -1))
    for i in range(3):
        low, high = ycbcr[..., i].min(), ycbcr[..., i].max()
        channel = (ycbcr[..., i] - low) / (high - low)
        channel = np.clip(shrink_channel(channel, method, sigma, levels), 0, 1)
        ycbcr[..., i] = channel * (high - low) + low
    # the raw inverse: today's ycbcr2rgb does the same
    return np.clip(np.moveaxis(color.ycbcr2rgb(ycbcr), -1, 0), 0, 1)


@pytest.mark.filterwarnings("ignore:Level value:UserWarning")  # of pywt, for the smallest images
@pytest.mark.parametrize("method", ["bayes", "visu", "sure", "hard"])
@pytest.mark.parametrize(("height", "width"), SIDES)
def test_equals_the_function_of_2018(method: str, height: int, width: int) -> None:
    for x in (natural(1, height, width), images(2, 1, 3, height, width).double()):
        for sigma in (0.04, 0.15):
            got = Wavelet(method=method, sigma=sigma)(x)[0].numpy()
            expected = by_hand(x[0].numpy(), method, sigma)
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("method", "name"), [("bayes", "BayesShrink"), ("visu", "VisuShrink")])
def test_equals_todays_scikit_image_on_one_plain_channel(method: str, name: str) -> None:
    # On a single channel without rescaling, today's function still has the semantics of 2018.
    x = natural(3, 91, 75)[:, :1]
    got = Wavelet(method=method, sigma=0.1, color="rgb")(x)[0, 0].numpy()
    expected = denoise_wavelet(
        x[0, 0].numpy(), sigma=0.1, wavelet="db1", method=name, mode="soft", rescale_sigma=False
    )
    np.testing.assert_allclose(got, np.clip(expected, 0, 1), atol=1e-12)


@pytest.mark.parametrize(("method", "name"), [("bayes", "BayesShrink"), ("visu", "VisuShrink")])
def test_estimated_noise_is_scikit_images(method: str, name: str) -> None:
    x = natural(3, 91, 75)[:, :1]
    x[..., :9, :] = 0.5  # zeros do not count
    got = Wavelet(method=method, sigma=None, color="rgb")(x)[0, 0].numpy()
    expected = denoise_wavelet(
        x[0, 0].numpy(), wavelet="db1", method=name, mode="soft", rescale_sigma=False
    )
    np.testing.assert_allclose(got, np.clip(expected, 0, 1), atol=1e-12)


@pytest.mark.parametrize("method", ["bayes", "visu", "sure", "hard"])
def test_estimated_noise_is_each_channels_own(method: str) -> None:
    """By hand: the noise of every stretched channel, then as with that σ; flat images stay."""
    x = natural(1, 48, 40)
    ycbcr = color.rgb2ycbcr(np.moveaxis(x[0].numpy(), 0, -1))
    for i in range(3):
        channel = ycbcr[..., i]
        low, high = channel.min(), channel.max()
        stretched = (channel - low) / (high - low)
        diagonal = np.abs(pywt.dwtn(stretched, "db1", mode="symmetric")["dd"])
        sigma = np.median(diagonal[diagonal > 0]) / 0.6744897501960817
        out = np.clip(shrink_channel(stretched, method, sigma), 0, 1)
        ycbcr[..., i] = out * (high - low) + low
    expected = np.clip(np.moveaxis(color.ycbcr2rgb(ycbcr), -1, 0), 0, 1)
    denoiser = Wavelet(method=method, sigma=None)
    np.testing.assert_allclose(denoiser(x)[0].numpy(), expected, rtol=0, atol=1e-9)
    flat = torch.full((2, 3, 33, 20), 0.3, dtype=torch.float64)
    torch.testing.assert_close(denoiser(flat), flat, rtol=0, atol=1e-12)


def test_float32_is_float64_rounded() -> None:
    x = natural(4, 64, 48)
    assert torch.allclose(Wavelet()(x.float()).double(), Wavelet()(x), atol=2e-5)


@pytest.mark.parametrize(("side", "levels"), [(32, 2), (224, 4), (299, 5), (16, 1), (3, 1)])
def test_default_depth(side: int, levels: int) -> None:
    """Frozen values of FACTS §5.3, from pywt: max(⌊log₂ n⌋ − 3, 1)."""
    x = natural(5, side, side + 3)
    assert torch.equal(Wavelet()(x), Wavelet(levels=levels)(x))
    assert not torch.equal(Wavelet()(x), Wavelet(levels=levels + 1)(x))


def test_explicit_depth_equals_the_function_of_2018() -> None:
    x = natural(6, 40, 40)
    np.testing.assert_allclose(
        Wavelet(levels=3)(x)[0], by_hand(x[0].numpy(), "bayes", 0.04, 3), atol=1e-10
    )


def test_conversion_is_scikit_images() -> None:
    x = images(7, 2, 3, 9, 5).double()
    last = np.moveaxis(x.numpy(), 1, -1)
    ycbcr = rgb_to_ycbcr(x)
    np.testing.assert_allclose(np.moveaxis(ycbcr.numpy(), 1, -1), color.rgb2ycbcr(last), atol=1e-12)
    torch.testing.assert_close(ycbcr_to_rgb(ycbcr), x, rtol=0, atol=1e-14)
    with pytest.raises(ShapeError, match="3, H, W"):
        rgb_to_ycbcr(x[:, :2])


def test_a_flat_image_stays_as_it_is() -> None:
    # Closed form: every channel is constant; nothing to stretch, nothing to shrink, no 0/0.
    for value in (0.0, 0.3, 1.0):
        x = torch.full((1, 3, 33, 20), value, dtype=torch.float64)
        leaf = x.clone().requires_grad_()
        y = Wavelet()(leaf)
        assert torch.allclose(y, x, atol=1e-12)
        (g,) = torch.autograd.grad(y.sum(), leaf)
        assert bool(g.isfinite().all())


def test_a_flat_image_beside_a_varied_one() -> None:
    # Property: the guard against 0/0 is per sample and channel.
    flat, varied = torch.full((1, 3, 32, 32), 0.4, dtype=torch.float64), natural(8, 32, 32)
    both = Wavelet()(torch.cat([flat, varied]))
    torch.testing.assert_close(both[1:], Wavelet()(varied))
    torch.testing.assert_close(both[:1], flat)


def test_bad_configurations_are_refused() -> None:
    for keyword, value in (("method", "garrote"), ("wavelet", "db2"), ("color", "lab")):
        with pytest.raises(ConfigError, match=keyword):
            Wavelet(**{keyword: value})
    with pytest.raises(RangeError, match="sigma"):
        Wavelet(sigma=0.0)
    with pytest.raises(RangeError, match="levels"):
        Wavelet(levels=0)
    with pytest.raises(ShapeError, match="rgb"):
        Wavelet()(images(0, 1, 1, 8, 8))


@pytest.mark.reference
def test_golden_distances_on_natural_images(request) -> None:
    """Frozen values of FACTS §9.2: rms 0.0244, SSIM 0.920 over 25 of the shared images."""
    rms, ssim = request.getfixturevalue("natural").distances(Wavelet())
    assert rms == pytest.approx(0.0244, rel=0.1)
    assert ssim == pytest.approx(0.920, rel=0.1)
