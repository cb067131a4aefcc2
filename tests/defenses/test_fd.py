"""FD. Oracles: scipy's DCT block by block in float64, closed forms of the shift, FACTS' goldens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import fft

from feint.core.errors import ConfigError, RangeError
from feint.defenses import FD
from feint.defenses.fd import shift_map
from tests.contracts.defense import DefenseContract, images


class TestFD(DefenseContract):
    cls = FD
    configs = (
        {},
        {"align": "exact"},
        {"passes": 2},
        {"preset": "paper"},
        {"step": 12.0, "low_step": 7.5},
    )


def by_hand(image: np.ndarray, *, align: str = "repo", high: float = 30, low: float = 25):
    """One image (C, H, W), float64: numpy's padding, scipy's DCT, numpy's rounding, block by block.

    The padding rule is albumentations 0.4.6's PadIfNeeded: int(missing / 2) before, the rest after.
    """
    height, width = image.shape[1:]
    missing = [-n % 8 for n in (height, width)]
    before = [int(m / 2.0) for m in missing]
    pads = [(0, 0), *((b, m - b) for b, m in zip(before, missing, strict=True))]
    canvas = np.pad(image * 255, pads, mode="reflect")  # numpy's "reflect" is REFLECT_101
    table = np.full((8, 8), high, float)
    table[:4, :4] = low
    for channel in canvas:
        for i in range(0, canvas.shape[1], 8):
            for j in range(0, canvas.shape[2], 8):
                c = fft.dctn(channel[i : i + 8, j : j + 8], norm="ortho")
                c = np.round(c / table) * table
                channel[i : i + 8, j : j + 8] = fft.idctn(c, norm="ortho")
    top, left = (0, 0) if align == "repo" else before
    return np.clip(canvas / 255, 0, 1)[:, top : top + height, left : left + width]


@pytest.mark.parametrize("align", ["repo", "exact"])
@pytest.mark.parametrize(("height", "width"), [(299, 43), (32, 24), (12, 9), (17, 15)])
def test_equals_scipy_block_by_block(align: str, height: int, width: int) -> None:
    x = images(3, 2, 3, height, width).double()  # 24-bit values: no coefficient on a half
    expected = np.stack([by_hand(image, align=align) for image in x.numpy()])
    got = FD(align=align)(x).numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_other_steps_and_passes_equal_scipy() -> None:
    x = images(4, 1, 3, 21, 30).double()
    once = by_hand(x[0].numpy(), high=12, low=7.5)
    got = FD(step=12, low_step=7.5, passes=2)(x)[0].numpy()
    np.testing.assert_allclose(got, by_hand(once, high=12, low=7.5), rtol=0, atol=1e-12)


def test_float32_is_float64_rounded_but_for_halves() -> None:
    x = images(5, 2, 3, 40, 40)
    assert torch.allclose(FD()(x), FD()(x.double()).float(), atol=1e-6)


def test_quantisation_table() -> None:
    # Closed form: 25 in the 4×4 corner of low frequencies, DC included, 30 elsewhere.
    table = FD().table()
    assert table.shape == (8, 8)
    assert bool((table[:4, :4] == 25).all())
    assert float(table.sum()) == 16 * 25 + 48 * 30


def test_flat_blocks_of_every_level_are_rounded_half_to_even() -> None:
    # Closed form: the DC term is 8v; with step 16 every odd v lies on a half. So rounds Python.
    v = torch.arange(256)
    flat = (v / 255)[:, None, None, None].expand(-1, 1, 8, 8)
    got = FD(step=16, low_step=16)(flat)[:, 0, 0, 0] * 255
    expected = torch.tensor([min(2.0 * round(n / 2), 255.0) for n in range(256)])
    assert torch.allclose(got, expected, atol=1e-4)


def test_the_repo_is_the_exact_one_moved_by_the_padding() -> None:
    # Closed form: the two crops differ by (⌊p/2⌋, ⌊p/2⌋) = (2, 2) at 299 px, away from borders.
    x = images(6, 1, 3, 299, 299)
    repo, exact = FD()(x), FD(align="exact")(x)
    assert torch.equal(repo[..., 2:, 2:], exact[..., :-2, :-2])
    assert not torch.equal(repo, exact)


def test_a_multiple_of_eight_is_not_moved() -> None:
    x = images(7, 1, 3, 32, 24)
    assert torch.equal(FD(align="repo")(x), FD(align="exact")(x))
    assert torch.equal(FD().shift(x, {}), x)


@given(n=st.integers(1, 40), passes=st.integers(0, 4))
def test_the_aligned_rule_is_the_codec_without_its_loss(n: int, passes: int) -> None:
    # Oracle: the codec itself with steps so small that it changes nothing but the place.
    x = images(n, 1, 1, n, 2 * n + 1).double()
    if passes:
        fd = FD(passes=passes, step=1e-4, low_step=1e-4)
        assert torch.allclose(fd(x), fd.shift(x, {}), atol=1e-5)
        exact = FD(passes=passes, step=1e-4, low_step=1e-4, align="exact")
        assert torch.equal(exact.shift(x, {}), x)
    assert torch.equal(shift_map(n, 0), torch.arange(n))


def test_the_aligned_rule_moves_two_four_six_pixels() -> None:
    # Closed form (reflection without repeating the border): 2 1 0 1 2 … after one pass at 299 px.
    assert shift_map(299, 1)[:5].tolist() == [2, 1, 0, 1, 2]
    for passes in (1, 2, 3):
        index = torch.arange(299)
        assert torch.equal(shift_map(299, passes)[6:], index[6:] - 2 * passes)


def test_the_views_move_the_gradient_back() -> None:
    # Closed form: an image gradient that reads one output pixel lands on its source pixel.
    x = images(8, 1, 1, 12, 12)
    for rule, source in (("aligned", (4, 5)), ("identity", (6, 7))):
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(FD().view(rule)(leaf)[0, 0, 6, 7], leaf)
        assert g.nonzero().tolist() == [[0, 0, *source]]
    assert FD().view().backward_rule == "surrogate"


def test_the_surrogate_is_near_the_codec_and_smooth() -> None:
    # Oracle: finite differences in float64 of the surrogate itself (cubic slope, clipping aside).
    fd = FD(align="exact")
    x = images(9, 1, 1, 10, 10, low=0.3, high=0.7).double()
    assert torch.autograd.gradcheck(lambda z: fd.surrogate(z, {}), x.requires_grad_())
    x = x.detach()
    distance = (fd.surrogate(x, {}) - fd(x)).abs().mean()
    assert 0 < float(distance) < 0.02


def test_the_surrogate_does_not_vanish_where_everything_is_rounded_already() -> None:
    # Closed form: on multiples of the step the slope is 0.05 in every frequency, so the codec's
    # Jacobian is 0.05 times the identity, white and black pixels included.
    levels = torch.tensor([0.0, 50.0, 100.0, 255.0])[:, None, None, None]
    x = (levels / 255).expand(-1, 1, 8, 8).clone().requires_grad_()
    fd = FD(step=1.0, low_step=1.0, align="exact")
    (g,) = torch.autograd.grad(fd.surrogate(x, {}).sum(), x)
    assert torch.allclose(g, torch.full_like(g, 0.05), atol=1e-4)


def test_bad_configurations_are_refused() -> None:
    with pytest.raises(RangeError, match="passes"):
        FD(passes=0)
    with pytest.raises(RangeError, match="step"):
        FD(low_step=0.0)
    with pytest.raises(ConfigError, match="align"):
        FD(align="left")  # type: ignore[arg-type]


@pytest.mark.reference
@pytest.mark.parametrize(
    ("config", "rms", "ssim"),
    [
        ({}, 0.104, 0.52),
        ({"align": "exact"}, 0.019, 0.925),
        ({"passes": 3}, 0.148, 0.377),
    ],
)
def test_golden_distances_on_natural_images(config, rms: float, ssim: float, natural) -> None:
    """Golden figures of FACTS §9.2 for the original code at 299 px."""
    got_rms, got_ssim = natural.distances(FD(**config))
    assert got_rms == pytest.approx(rms, rel=0.1)
    assert got_ssim == pytest.approx(ssim, rel=0.1)
