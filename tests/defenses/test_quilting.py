"""Quilting. Oracles: a plain loop over patches that tries every seam and all of the bank, in numpy;
images that the bank holds whole; soft neighbors written out for one patch."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from feint.core import random
from feint.core.errors import ConfigError, DataError, DtypeError, RangeError, ShapeError
from feint.defenses import Quilting
from feint.defenses._seams import quilt, seam
from feint.defenses.quilting import patch_bank, save_bank
from tests.contracts.defense import DefenseContract, images

SMALL = images(77, 60, 3, 4, 4)


class TestQuilting(DefenseContract):
    cls = Quilting
    channels = (3,)
    configs = (
        {},
        {"preset": "repo"},
        {"bank": SMALL, "neighbors": 3, "overlap": 1},
        {"bank": SMALL, "neighbors": 1, "overlap": 3},
    )
    batch_atol = 0.0


def best_path(error: np.ndarray) -> tuple[int, ...]:
    """Every path is tried."""
    length, width = error.shape
    paths = (
        p
        for p in itertools.product(range(width), repeat=length)
        if all(abs(a - b) <= 1 for a, b in itertools.pairwise(p))
    )
    return min(paths, key=lambda p: sum(error[i, c] for i, c in enumerate(p)))


def plain_quilt(
    image: np.ndarray, bank: np.ndarray, overlap: int, choice: np.ndarray, cut: bool
) -> np.ndarray:
    """Patch by patch, pixel by pixel."""
    size = bank.shape[-1]
    stride = size - overlap
    rows, columns = choice.shape
    sides = [size + (n - 1) * stride for n in (rows, columns)]
    beyond = [(0, 0)] + [(0, s - n) for s, n in zip(sides, image.shape[1:], strict=True)]
    wide = np.pad(image, beyond, mode="edge")
    board = np.zeros_like(wide)
    for i in range(rows):
        for j in range(columns):
            y, x = i * stride, j * stride
            query = wide[:, y : y + size, x : x + size]
            order = ((bank - query) ** 2).sum((1, 2, 3)).argsort(kind="stable")
            new = bank[order[choice[i, j]]]
            old = board[:, y : y + size, x : x + size].copy()
            error = ((old - new) ** 2).sum(0)
            left, top = [0] * size, [0] * size
            if cut and overlap and j:
                left = list(best_path(error[:, :overlap]))
            if cut and overlap and i:
                top = list(best_path(error[:overlap].T))
            for r in range(size):
                for c in range(size):
                    if c >= left[r] and r >= top[c]:
                        board[:, y + r, x + c] = new[:, r, c]
    return board[:, : image.shape[1], : image.shape[2]]


@pytest.mark.parametrize(("size", "overlap"), [(5, 2), (4, 1), (4, 3), (5, 3), (3, 0), (2, 1)])
@pytest.mark.parametrize("seams", ["cut", "overwrite"])
@pytest.mark.parametrize("shape", [(14, 11), (5, 9), (3, 2)])
def test_equals_the_plain_loop(size: int, overlap: int, seams: str, shape: tuple[int, int]) -> None:
    bank = patch_bank(images(1, 4, 3, 12, 12).double(), count=40, size=size)
    x, keys = images(2, 2, 3, *shape).double(), random.keys(3, 2)
    defense = Quilting(bank=bank, overlap=overlap, neighbors=4, seams=seams).double()  # type: ignore[arg-type]
    choice, got = defense.sample(x, keys)["choice"], defense(x, keys)
    for i in range(2):
        expected = plain_quilt(
            x[i].numpy(), bank.numpy(), overlap, choice[i].numpy(), seams == "cut"
        )
        np.testing.assert_array_equal(got[i].numpy(), expected)


@pytest.mark.parametrize(("length", "width"), [(1, 1), (5, 1), (5, 2), (4, 3), (6, 4), (1, 5)])
def test_seam_is_the_best_of_all_paths(length: int, width: int) -> None:
    error = images(length * 10 + width, 20, length, width).double()
    got = seam(error)
    for i in range(20):
        assert tuple(got[i].tolist()) == best_path(error[i].numpy())


def test_seam_avoids_a_wall() -> None:
    error = torch.ones(1, 4, 3)
    error[0, :, 1] = 0.0
    assert seam(error).tolist() == [[1, 1, 1, 1]]


def test_an_image_made_of_the_bank_comes_back() -> None:
    """Its own patches are the nearest, they agree where they overlap, and no seam can be seen."""
    x = images(5, 1, 3, 17, 14)
    apart = x.unfold(2, 5, 3).unfold(3, 5, 3).permute(0, 2, 3, 1, 4, 5)
    bank = apart.flatten(0, 2)
    for seams in ("cut", "overwrite"):
        assert torch.equal(Quilting(bank=bank, neighbors=1, seams=seams)(x), x)  # type: ignore[arg-type]
    for cut in (True, False):
        assert torch.equal(quilt(apart, 2, cut), x)


def test_ten_neighbors_are_drawn_evenly() -> None:
    """Oracle: counting, within five standard deviations."""
    choice = Quilting().draw(random.keys(0, 60), torch.Size((60, 3, 32, 32)))["choice"]
    assert choice.shape == (60, 10, 10)
    counts = torch.bincount(choice.flatten(), minlength=10)
    expected = choice.numel() / 10
    assert bool(((counts - expected).abs() < 5 * (0.9 * expected) ** 0.5).all())


def test_nearest_is_exhaustive_and_first_among_equals() -> None:
    """Oracle: numpy's stable argsort of the distances in float64, on a bank with doubles."""
    bank = torch.cat([SMALL, SMALL])
    queries = images(9, 500, 48)
    distance = ((queries.double()[:, None] - bank.flatten(1).double()) ** 2).sum(-1).numpy()
    got = Quilting(bank=bank).nearest(queries, 6)
    np.testing.assert_array_equal(got.numpy(), distance.argsort(1, kind="stable")[:, :6])


def test_surrogate_is_a_softmax_over_the_nearest() -> None:
    """Oracle: written out for an image of one patch; the weights follow the distances."""
    bank = SMALL.double()
    defense = Quilting(bank=bank, neighbors=2).double()
    x = images(3, 1, 3, 4, 4).double()
    distance = ((x - bank) ** 2).sum((1, 2, 3))
    near, index = distance.topk(10, largest=False)
    expected = ((-near / near.mean()).softmax(0)[:, None, None, None] * bank[index]).sum(0)
    torch.testing.assert_close(defense.surrogate(x, {})[0], expected)


def test_bundled_bank() -> None:
    bank = Quilting().patches
    assert bank.shape == (4096, 3, 5, 5)
    assert len(bank.flatten(1).unique(dim=0)) > 4000
    assert not Quilting().state_dict()


def test_patch_bank_holds_patches() -> None:
    x = images(0, 3, 3, 9, 12)
    bank = patch_bank(x, count=50, size=4)
    windows = x.unfold(2, 4, 1).unfold(3, 4, 1).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    for i, patch in enumerate(bank):
        assert bool((windows[i % 3] == patch).flatten(1).all(1).any())
    assert torch.equal(patch_bank(x, count=20, size=4), bank[:20])
    assert not torch.equal(patch_bank(x, count=50, size=4, seed=1), bank)


def test_banks_are_kept_in_files(tmp_path: Path) -> None:
    bank = (SMALL * 255).round() / 255
    path = tmp_path / "bank.safetensors"
    save_bank(bank, path)
    x, keys = images(0, 2, 3, 9, 9), random.keys(0, 2)
    stored = Quilting(bank=str(path))
    torch.testing.assert_close(stored.patches, bank, rtol=0, atol=1e-7)
    torch.testing.assert_close(stored(x, keys), Quilting(bank=bank)(x, keys), rtol=0, atol=1e-7)
    assert "bank=" in stored.spec
    save_bank(1 - bank, path)  # a file that has changed is read again
    torch.testing.assert_close(Quilting(bank=path).patches, 1 - bank, rtol=0, atol=1e-6)


def test_files_that_are_no_banks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        Quilting(bank=tmp_path / "none.safetensors")
    noise = tmp_path / "noise"
    noise.write_bytes(b"no tensors")
    with pytest.raises(DataError, match="make one with save_bank"):
        Quilting(bank=noise)
    save_file({"other": SMALL}, tmp_path / "other")
    with pytest.raises(DataError, match="make one with save_bank"):
        Quilting(bank=tmp_path / "other")
    save_file({"patches": SMALL}, tmp_path / "floats")
    with pytest.raises(DtypeError, match="expected uint8"):
        Quilting(bank=tmp_path / "floats")


def test_bad_banks_and_images() -> None:
    with pytest.raises(RangeError, match=r"has 9 patches; expected at least 10"):
        Quilting(bank=SMALL[:9])
    with pytest.raises(ShapeError, match=r"expected \(N, C, P, P\)"):
        Quilting(bank=SMALL[..., :3])
    with pytest.raises(ShapeError, match=r"expected \(N, C, P, P\)"):
        Quilting(bank=SMALL[0])
    with pytest.raises(RangeError, match="bank has values"):
        Quilting(bank=SMALL * 255)
    with pytest.raises(ShapeError, match="x has 1 channels, the bank's patches 3"):
        Quilting()(images(0, 1, 1, 8, 8))
    with pytest.raises(ShapeError, match="at least 5×5"):
        patch_bank(images(0, 2, 3, 4, 9), count=3)
    with pytest.raises(ShapeError, match="at least 5×5"):
        patch_bank(torch.zeros(0, 3, 9, 9), count=3)
    with pytest.raises(RangeError, match="at least 1 each"):
        patch_bank(images(0, 2, 3, 9, 9), count=0)


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        ({"overlap": 5}, RangeError, "0 to 4 for patches of 5×5"),
        ({"overlap": -1}, RangeError, "0 to 4"),
        ({"neighbors": 0}, RangeError, "whole number ≥ 1"),
        ({"neighbors": 5000}, RangeError, "expected at least 5000"),
        ({"seams": "blend"}, ConfigError, "'cut' or 'overwrite'"),
    ],
)
def test_bad_arguments(config: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Quilting(**config)  # type: ignore[arg-type]
