"""TV. Oracles: closed forms on steps, scikit-image's two solvers, scipy's general minimizer
for the masked energy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from skimage.restoration import denoise_tv_bregman, denoise_tv_chambolle
from torch import Tensor

from feint.core import random
from feint.core.errors import RangeError
from feint.defenses import TV
from feint.defenses.tv import tv_energy, tv_minimise
from tests.contracts.defense import DefenseContract, images


class TestTV(DefenseContract):
    cls = TV
    configs = (
        {},
        {"sweeps": 2, "steps": 12},
        {"preset": "qiu", "steps": 15},
        {"keep": 1.0, "steps": 8, "sweeps": 1},
    )
    step = 1e-8  # shorter than the distance to most kinks


def minimum(x: Tensor, mask: Tensor | None = None, **kwargs: object) -> Tensor:
    mask = torch.ones_like(x) if mask is None else mask
    return tv_minimise(x, mask, steps=2000, tol=1e-11, **kwargs)  # type: ignore[arg-type]


def natural(side: int) -> np.ndarray:
    """A gray photograph from scikit-image, shrunk, with noise."""
    from skimage import data

    image = data.camera()[60 : 60 + 4 * side : 4, 160 : 160 + 4 * side : 4] / 255
    noise = random.normal(random.keys(0, 1), image.shape, torch.float64)[0].numpy()
    return np.clip(image + 0.05 * noise, 0, 1)


@pytest.mark.parametrize("isotropic", [True, False])
def test_a_step_is_lowered_on_both_sides(isotropic: bool) -> None:
    """Closed form: two plateaus of n₁ and n₂ columns approach by weight/n₁ and weight/n₂."""
    x = torch.full((1, 1, 6, 10), 0.2, dtype=torch.float64)
    x[..., 4:] = 0.9
    got = minimum(x, weight=0.1, isotropic=isotropic)
    expected = x.clone()
    expected[..., :4] += 0.1 / 4
    expected[..., 4:] -= 0.1 / 6
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    flat = minimum(x, weight=5.0, isotropic=isotropic)
    torch.testing.assert_close(flat, torch.full_like(x, float(x.mean())), rtol=0, atol=1e-5)


def test_isotropic_minimum_is_chambolles() -> None:
    """Oracle: scikit-image's dual projection, run to convergence: the same energy, and nothing in
    common with this solver."""
    image = natural(32)
    expected = denoise_tv_chambolle(image, weight=0.06, eps=1e-12, max_num_iter=6000)
    got = minimum(torch.from_numpy(image)[None, None], weight=0.06, isotropic=True)
    np.testing.assert_allclose(got[0, 0].numpy(), expected, rtol=0, atol=5e-4)
    x = torch.from_numpy(image)[None, None]
    ours, theirs = (
        float(tv_energy(z, x, torch.ones_like(x), weight=0.06, isotropic=True))
        for z in (got, torch.from_numpy(expected)[None, None])
    )
    assert ours <= theirs + 1e-9


def test_anisotropic_minimum_is_scikit_images_split_bregman() -> None:
    """Away from the border, which scikit-image ties to copies of the noisy image. (Its isotropic
    form shrinks by s·λ/(s·λ + 1), which is not the minimum; hence the other oracle above.)"""
    image = natural(48)
    expected = denoise_tv_bregman(
        image, weight=1 / 0.03, max_num_iter=5000, eps=1e-10, isotropic=False
    )
    got = minimum(torch.from_numpy(image)[None, None], weight=0.03, isotropic=False)
    inner = np.s_[14:-14, 14:-14]
    np.testing.assert_allclose(got[0, 0].numpy()[inner], expected[inner], rtol=0, atol=1e-4)


@pytest.mark.parametrize("isotropic", [True, False])
def test_masked_minimum_is_that_of_a_general_minimizer(isotropic: bool) -> None:
    """Oracle: scipy's L-BFGS on the energy with |t| replaced by √(t² + s), from another start. That
    energy is above the true one by at most weight·√s per difference, so the two minima are, too."""
    h, w, weight = 6, 7, 0.05
    x = images(1, 1, 1, h, w).double()
    mask = (images(2, 1, 1, h, w) < 0.5).double()
    z = minimum(x, mask, weight=weight, isotropic=isotropic)
    best = float(tv_energy(z, x, mask, weight=weight, isotropic=isotropic))
    smooth = 1e-7

    def energy(v: np.ndarray) -> tuple[float, np.ndarray]:
        t = torch.from_numpy(v).view(1, 1, h, w).requires_grad_()
        across = torch.nn.functional.pad(t[..., 1:] - t[..., :-1], (0, 1))
        down = torch.nn.functional.pad(t[..., 1:, :] - t[..., :-1, :], (0, 0, 0, 1))
        if isotropic:
            size = (across**2 + down**2 + smooth).sqrt()
        else:
            size = (across**2 + smooth).sqrt() + (down**2 + smooth).sqrt()
        value = (mask * (t - x) ** 2).sum() / 2 + weight * size.sum()
        (g,) = torch.autograd.grad(value, t)
        return float(value.detach()), g.flatten().numpy()

    options = {"maxiter": 5000, "maxfun": 9000}
    start = np.full(h * w, 0.5)
    found = minimize(energy, start, jac=True, method="L-BFGS-B", tol=1e-14, options=options)
    slack = 2 * h * w * weight * smooth**0.5
    assert best <= found.fun + 1e-9
    assert best >= found.fun - slack


@pytest.mark.parametrize("preset", ["guo", "qiu"])
def test_energy_falls_and_the_defaults_get_near_to_the_minimum(preset: str) -> None:
    x = torch.from_numpy(natural(24))[None, None]
    defense = TV(preset=preset)
    mask = defense.sample(x, random.keys(3, 1))["mask"].to(x.dtype)
    kind = {"weight": defense.weight, "isotropic": defense.isotropic}

    def energy(z: Tensor) -> float:
        return float(tv_energy(z, x, mask, **kind))  # type: ignore[arg-type]

    runs = [
        energy(tv_minimise(x, mask, steps=n, sweeps=defense.sweeps, tol=0.0, **kind))  # type: ignore[arg-type]
        for n in (2, 5, 20, 100)
    ]
    assert runs == sorted(runs, reverse=True)
    best = energy(minimum(x, mask, **kind))
    assert energy(defense(x, random.keys(3, 1))) < (1.3 if preset == "guo" else 1.1) * best
    assert runs[-1] < 1.005 * best


def test_dropped_values_are_not_seen() -> None:
    """The result and the gradient hang on what was observed alone."""
    x, keys = images(0, 2, 3, 9, 9).double(), random.keys(0, 2)
    defense = TV()
    mask = defense.sample(x, keys)["mask"]
    other = torch.where(mask, x, images(1, 2, 3, 9, 9).double())
    assert not torch.equal(other, x)
    assert torch.equal(defense(x, keys), defense(other, keys))
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(defense(leaf, keys).square().sum(), leaf)
    assert not g[~mask].any()
    assert bool((g[mask] != 0).double().mean() > 0.9)


@pytest.mark.parametrize("preset", ["guo", "qiu"])
def test_samples_stop_by_themselves(preset: str) -> None:
    """A sample that is done early leaves; the others and the order do not suffer."""
    x = torch.cat([torch.full((1, 3, 12, 12), 0.3), images(0, 2, 3, 12, 12)])[[1, 0, 2]]
    keys, defense = random.keys(0, 3), TV(preset=preset)
    whole = defense(x, keys)
    for i in range(3):
        assert torch.equal(defense(x[i : i + 1], keys[i : i + 1]), whole[i : i + 1])
    torch.testing.assert_close(whole[1], x[1], rtol=0, atol=1e-6)


def test_masks_are_drawn_as_said() -> None:
    """Oracle: counting, within five standard deviations."""
    shape = torch.Size((20, 3, 32, 32))
    mask = TV(keep=0.7).draw(random.keys(0, 20), shape)["mask"]
    assert mask.shape == shape
    spread = 5 * (0.21 / mask.numel()) ** 0.5
    assert abs(float(mask.double().mean()) - 0.7) < spread
    assert TV(preset="qiu").draw(random.keys(0, 20), shape)["mask"].shape == (20, 1, 32, 32)


def test_an_image_of_which_nothing_is_observed_is_gray() -> None:
    x = images(0, 1, 1, 1, 1)
    gray = tv_minimise(x, torch.zeros_like(x), weight=0.1, isotropic=True)
    assert float(gray) == 0.5


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"keep": 0.0}, "keep is 0.0; expected a share"),
        ({"keep": 1.1}, "keep is 1.1"),
        ({"weight": 0.0}, "above 0"),
        ({"weight": float("nan")}, "above 0"),
        ({"tol": -1.0}, "at least 0"),
        ({"steps": 0}, "steps is 0; expected a whole number"),
        ({"sweeps": 1.5}, "sweeps is 1.5"),
    ],
)
def test_bad_arguments(config: dict[str, float], match: str) -> None:
    with pytest.raises(RangeError, match=match):
        TV(**config)  # type: ignore[arg-type]
