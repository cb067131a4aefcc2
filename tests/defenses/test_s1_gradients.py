"""S1's transformations as a whole: exact values and gradients of the gathers, alone and in chains.

Oracles: `torch.nn.functional.grid_sample`, finite differences (`torch.autograd.gradcheck`),
OpenCV's remap and albumentations' GridDistortion, which RDG is but for its rounding.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.errors import ShapeError
from feint.defenses import Defense, parse
from feint.defenses.fd import shift_map
from tests.contracts.defense import images


def sampled(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """out[b, :, i, j] = x[b, :, rows[b, i], columns[b, j]] by torch's own sampler."""
    height, width = x.shape[-2:]
    down = rows.to(x.dtype) * 2 / (height - 1) - 1  # corners aligned: −1 and 1 are pixel centers
    across = columns.to(x.dtype) * 2 / (width - 1) - 1
    shape = (len(x), rows.shape[1], columns.shape[1])
    grid = torch.stack([across[:, None].expand(shape), down[:, :, None].expand(shape)], -1)
    return nn.functional.grid_sample(
        x, grid, mode="nearest", padding_mode="border", align_corners=True
    )


@pytest.mark.parametrize("text", ["rdg", "rdg(preset='paper')", "rdg(delta=0.9)"])
@pytest.mark.parametrize(("height", "width"), [(299, 31), (32, 32), (10, 57)])
def test_rdg_is_grid_sample_with_its_gradient(text: str, height: int, width: int) -> None:
    defense, keys = parse(text), random.keys(1, 2)
    x = images(0, 2, 3, height, width).double()
    params = defense.draw(keys, x.shape)
    mine, oracle = x.clone().requires_grad_(), x.clone().requires_grad_()
    got = defense.view()(mine, keys)
    expected = sampled(oracle, params["rows"], params["columns"])
    assert torch.equal(got, expected)
    weight = random.normal(random.keys(2, 2), x.shape[1:], torch.float64)
    (g,) = torch.autograd.grad((got * weight).sum(), mine)
    (h,) = torch.autograd.grad((expected * weight).sum(), oracle)
    torch.testing.assert_close(g, h, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "text",
    ["rdg", "rdg(preset='paper')", "rand", "rand(preset='xie')", "pixel_deflection", "wavelet"],
)
def test_gradients_are_finite_differences(text: str) -> None:
    # Every partial derivative, in float64, for one draw.
    defense = parse(text)
    x = images(3, 2, 3, 11, 10, low=0.2, high=0.8).double()
    params = defense.sample(x, random.keys(5, 2))
    assert torch.autograd.gradcheck(
        lambda z: defense.replay(z, params), x.requires_grad_(), eps=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("second", ["rdg", "rand"])
def test_the_aligned_view_of_a_chain_is_shift_then_gather(passes: int, second: str) -> None:
    """Closed form: the gradient of FD×n + g is that of g at FD's output, moved back by n shifts."""
    defense, keys = parse(f"fd(passes={passes}) + {second}"), random.keys(4, 2)
    x = images(6, 2, 3, 19, 27).double()
    weight = random.normal(random.keys(7, 2), x.shape[1:], torch.float64)
    leaf = x.clone().requires_grad_()
    out = defense.view("aligned")(leaf, keys)
    assert torch.equal(out, defense(x, keys))
    (got,) = torch.autograd.grad((out * weight).sum(), leaf)

    assert isinstance(defense.members[1], Defense)  # type: ignore[attr-defined]
    fd, g = defense.members  # type: ignore[attr-defined]
    middle = fd(x).requires_grad_()
    own = random.fold(keys, "chain", 1)
    (inner,) = torch.autograd.grad((g(middle, own) * weight).sum(), middle)
    rows, columns = shift_map(19, passes), shift_map(27, passes)
    expected = torch.zeros_like(x)
    for i, r in enumerate(rows.tolist()):
        for j, c in enumerate(columns.tolist()):
            expected[..., r, c] += inner[..., i, j]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(inner, expected)


def test_passes_are_repeats() -> None:
    # Closed form: `passes=n` is n defenses in a row.
    x = images(0, 2, 3, 21, 32)
    for passes in (2, 3):
        assert torch.equal(parse(f"fd(passes={passes})")(x), parse(f"fd*{passes}")(x))


SMALLEST = {"fd": 1, "rand": 1, "rdg": 10, "wavelet": 1, "pixel_deflection": 2, "jpeg": 1}


@pytest.mark.parametrize(("text", "side"), SMALLEST.items())
@pytest.mark.parametrize("channels", [1, 3])
def test_small_odd_gray_and_empty_batches(text: str, side: int, channels: int) -> None:
    """Property: every size from the smallest on works, odd ones too; below it the limit is named;
    what wants color says so."""
    defense = parse(text)
    if text == "wavelet" and channels == 1:
        with pytest.raises(ShapeError, match="three channels"):
            defense(images(0, 1, 1, 9, 9))
        defense = parse("wavelet(color='rgb')")
    for height, width in ((side, side), (side, side + 6), (side + 3, side), (13, 29)):
        for batch in (0, 1, 3):
            x = images(1, batch, channels, height, width)
            y = defense(x, random.keys(0, batch))
            assert y.shape == x.shape
            assert bool(((y >= 0) & (y <= 1)).all())
    if side > 1:
        with pytest.raises(ShapeError, match=str(side)):
            defense(images(0, 1, channels, side - 1, 20))


@pytest.mark.reference
@pytest.mark.parametrize(("height", "width"), [(299, 299), (224, 301), (64, 40)])
def test_rdg_is_albumentations_grid_distortion(height: int, width: int) -> None:
    """Oracle: albumentations' `grid_distortion` with the same factors; nearest, border repeated.

    Made with albumentations 1.3.1 and OpenCV 4.11. S1 rounds the map, then interpolates; OpenCV's
    nearest interpolation rounds the map itself.
    """
    import albumentations.augmentations.geometric.functional as functional
    import cv2

    defense = parse("rdg")
    x, keys = images(8, 3, 3, height, width), random.keys(3, 3)
    got = defense(x, keys)
    for i in range(3):
        factors = []
        for name, side in (("columns", width), ("rows", height)):
            count = -(-side // (side // 10))
            u = random.uniform(random.fold(keys, name), (count,), -0.25, 0.25, torch.float64)
            factors.append((1 + u[i].numpy()).tolist())
        expected = functional.grid_distortion(
            np.ascontiguousarray(x[i].permute(1, 2, 0).numpy()),
            num_steps=10,
            xsteps=factors[0],
            ysteps=factors[1],
            interpolation=cv2.INTER_NEAREST,
            border_mode=cv2.BORDER_REPLICATE,
        )
        differs = (got[i].permute(1, 2, 0).numpy() != expected).any(-1)
        # A position within OpenCV's fixed-point precision of a half may round the other way.
        assert differs.mean() < 0.01, differs.mean()
