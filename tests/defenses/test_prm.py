"""PRM. Oracles: pixel_shift and the mixture by hand, sample by sample; autograd; counting."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from feint.core import random
from feint.core.errors import ConfigError, RangeError, ShapeError
from feint.core.weights import initialise
from feint.defenses import ACE, PRM, PixelShift
from feint.models.bundle import save_weights
from tests.contracts.defense import DefenseContract, images

TINY = {"weights": "untrained", "width": 3, "depth": 2}
POOL = TINY | {"weights": ["untrained", "untrained"]}


class TestPRM(DefenseContract):
    cls = PRM
    configs = (
        TINY,
        TINY | {"preset": "repo"},
        TINY | {"shift": False, "lam": 0.5},
        POOL | {"modules": 2, "lam": [0.5, 0.9]},
    )
    channels = (3,)
    min_side = 4
    batch_atol = 1e-4
    rtol = 1e-4


def moved(x: Tensor, dx: int, dy: int) -> Tensor:
    return PixelShift(preset="paper", dx=dx, dy=dy)(x)


def test_a_stack_is_its_modules_one_by_one() -> None:
    """Oracle: a plain loop over samples and modules."""
    prm = PRM(**POOL | {"modules": 3, "lam": [0.3, 1.0]}).double()
    for seed, net in enumerate(prm.pool):
        initialise(net, 20 + seed)
    x, keys = images(0, 6, 3, 9, 8).double(), random.keys(4, 6)
    choice = prm.sample(x, keys)["choice"]
    assert choice.shape == (6, 3)
    expected = []
    for image, own in zip(x[:, None], choice.tolist(), strict=True):
        for number in own:
            network, lam, (dx, dy) = prm.options[number]
            image = moved(image, dx, dy)
            made = prm.on_normalized(prm.pool[network], image)
            image = (1 - lam) * image + lam * made
        expected.append(image)
    torch.testing.assert_close(prm(x, keys), torch.cat(expected))
    straight = []
    for image, own in zip(x[:, None], choice.tolist(), strict=True):
        for number in own:
            image = moved(image, *prm.options[number][2])
        straight.append(image)
    assert torch.equal(prm.identity(x, {"choice": choice}), torch.cat(straight))


def test_zero_lambda_is_the_shift_alone() -> None:
    x = images(0, 8, 3, 8, 8)
    prm = PRM(**TINY, lam=0.0)
    params = {"choice": torch.arange(8)[:, None]}
    near = [(dx, dy) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dx, dy) != (0, 0)]
    expected = torch.cat([moved(x[i : i + 1], *near[i]) for i in range(8)])
    assert torch.equal(prm.replay(x, params), expected)


def test_without_the_shift_it_is_the_unet_form_of_ace() -> None:
    x = images(0, 2, 3, 8, 8)
    for lam in (0.0, 0.7, 1.0):
        prm, ace = PRM(**TINY, lam=lam, shift=False), ACE(form="unet", **TINY, lam=lam)
        assert not prm.stochastic
        torch.testing.assert_close(prm(x), ace(x), rtol=1e-6, atol=1e-6)


def test_presets_and_their_draws() -> None:
    assert len(PRM(**TINY).support(torch.Size((1, 3, 8, 8)))) == 8
    repo = PRM(**TINY, preset="repo")
    assert {o[1] for o in repo.options} == {0.0, 0.5, 0.7, 0.9, 0.99, 1.0}
    assert len({o[2] for o in repo.options}) == 9
    assert len(repo.support(torch.Size((1, 3, 8, 8)))) == 54
    assert len(PRM(**TINY, modules=2).support(torch.Size((1, 3, 8, 8)))) == 64
    assert PRM(**TINY, preset="repo", modules=5).support(torch.Size((1, 3, 8, 8))) is None


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.9, 1.0])
def test_the_gradient_moves_to_the_connected_pixels(lam: float) -> None:
    """S4 §3: only the connected pixels at λ = 1; ever more of the rest as λ falls."""
    mask = [[0, 0], [0, 1]]
    share = {}
    for value in (lam, 1.0):
        prm = PRM(weights="untrained", width=8, depth=2, mask=mask, lam=value, shift=False)
        x = images(3, 2, 3, 8, 8).requires_grad_()
        (g,) = torch.autograd.grad(prm(x).square().sum(), x)
        connected = prm.connected(8, 8)
        assert bool(connected[0, 0, 1, 1])
        share[value] = float((g.square() * connected).sum() / g.square().sum())
    assert share[1.0] == 1.0
    assert (share[lam] < 1.0) == (lam < 1.0)


def test_networks_with_masks_of_their_own(tmp_path: Path) -> None:
    """A stack of files, as the original's v0 … v5; each brings its mask."""
    paths = []
    for i, mask in enumerate([[[1, 0], [0, 0]], [[0, 1], [1, 0]]]):
        prm = PRM(weights="untrained", width=3, depth=2, mask=mask)
        initialise(prm.network, i)
        paths.append(str(tmp_path / f"{i}.safetensors"))
        save_weights(Path(paths[-1]), prm.network.state_dict(), prm.metadata(), {})
    both = PRM(weights=paths, modules=2)
    assert [net.mask for net in both.pool] == [((1, 0), (0, 0)), ((0, 1), (1, 0))]
    assert len(both.options) == 16
    assert "weights=['" in both.spec
    with pytest.raises(ConfigError, match=r"mask is \[\[1\]\], but weights"):
        PRM(weights=paths, mask=[[1]])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lam": 1.5}, RangeError, "lam is 1.5; expected 0 ≤ λ ≤ 1"),
        ({"lam": [0.5, -1]}, RangeError, "expected 0 ≤ λ ≤ 1"),
        ({"lam": float("nan")}, RangeError, "expected 0 ≤ λ ≤ 1"),
        ({"lam": []}, ConfigError, "empty list"),
        ({"weights": []}, ConfigError, "empty list"),
        ({"modules": 0}, RangeError, "modules is 0; expected a whole number from 1"),
        ({"shift": False, "include_identity": True}, ConfigError, "needs shift=True"),
        ({"mask": [[0, 0]]}, ConfigError, "not all zeros"),
        ({"mask": [[1, 0], [1]]}, ConfigError, "rows of different or no length"),
        ({"mask": [[2]]}, ConfigError, "zeros and ones"),
        ({"mask": 3}, ConfigError, "expected a tile"),
        ({"depth": 0}, RangeError, "whole numbers from 1"),
    ],
)
def test_bad_settings(settings: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PRM(**TINY | settings)


def test_bad_images() -> None:
    prm = PRM(**TINY)
    with pytest.raises(ShapeError, match="sides of at least 4 pixels, the stride of the network"):
        prm(images(0, 1, 3, 3, 9))
    with pytest.raises(ShapeError, match="expected 3 channels"):
        prm(images(0, 1, 1, 8, 8))
