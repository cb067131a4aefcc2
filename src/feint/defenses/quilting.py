"""Image quilting: the image rebuilt from patches of other images."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from feint.core import random
from feint.core.checks import check_images
from feint.core.errors import ConfigError, DataError, DtypeError, RangeError, ShapeError
from feint.core.registry import defense
from feint.defenses._seams import quilt
from feint.defenses.base import Defense, Params, backward_rule

__all__ = ["Quilting", "patch_bank", "save_bank"]

BUNDLED = Path(__file__).with_name("quilting_bank.safetensors")
"""4096 patches of 5×5 from CIFAR-10's training images, made by `tools/make_patch_bank.py`."""

_BLOCK = 1 << 23
"""Distances that are held at a time."""
_SPARE = 8
"""Candidates beyond the wanted ones whose distances are computed again in float64."""


@defense(
    "quilting",
    paper="Guo, Rana, Cissé, van der Maaten, 2018, arXiv:1711.00117",
    presets={
        "paper": {"neighbors": 10, "seams": "cut"},
        "repo": {"neighbors": 1, "seams": "overwrite"},
    },
)
class Quilting(Defense):
    """Image quilting: every patch of the image replaced by a similar one of a clean bank.

    The image is taken apart into patches on a grid, each overlapping its neighbors. For each one of
    its nearest patches in the bank is drawn; these are laid in reading order, every overlap cut
    along the seam of least squared difference (Efros & Freeman).

    Claim: one of the two most effective of five transformations, the best of which undoes 60 % of
    strong gray-box and 90 % of strong black-box attacks on ImageNet (Guo et al., abstract).
    Known break: BPDA with the identity leaves 0 % at a normalized L2 distance of 0.05 (Athalye et
    al. 2018, as in their notebook; their README's table has 0.005).

    Backward rules:
        `surrogate`: the mean of the bank's nearest patches, weighted by the softmax of −distance,
        overlaps averaged; nearly flat where one patch wins. `identity`, the default and the one to
        use: the image itself.

    Args:
        preset: `"paper"` (default): one of ten neighbors, minimum-cut seams. `"repo"`: the authors'
            code, the nearest neighbor. Its graph cut has no source, hence no seam: each patch
            covers what lies there, and so it does here.
        bank: Clean patches, (N, C, P, P) in [0, 1], from `patch_bank`, or the path of a file from
            `save_bank`. None: the bundled 4096 RGB patches of 5×5, from training images of
            CIFAR-10. Never take patches from the images that are to be judged: their clean patches
            would be restored.
        overlap: Pixels shared by neighboring patches, 0 … P − 1. None: ⌊P/2⌋, as in the code.
        neighbors: How many of the nearest patches to draw from.
        seams: `"cut"` or `"overwrite"`.

    Convention:
        The grid starts at the upper left; at the right and lower border the image is continued by
        repeating its last pixels up to a whole patch. The distance is L2 over all values of a
        patch, and the search is exhaustive. Equal distances go to the first patch of the bank.

    Raises:
        RangeError: If the bank has fewer patches than `neighbors`, values outside [0, 1], or
            `overlap` or `neighbors` is out of range.
        ShapeError: If the bank is no (N, C, P, P), or its channels are not the image's.
        ConfigError: If `seams` is unknown.
        DataError: If the bank's file is missing or no bank.

    Cost: N·C·P² multiply–adds per patch of the image, 0.3 M for the bundled bank, then sorting out
        the nearest, then the seams: together two ResNet-50 forward passes (one CPU thread), 1.4
        without seams. In proportion, a million patches as in the paper cost some 300 of them.

    Example:
        >>> import torch
        >>> Quilting()(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 3, 32, 32])

    References:
        Guo, Rana, Cissé, van der Maaten, "Countering adversarial images using input
        transformations", ICLR 2018, §3.2; original code, `quilting_fast.py`, `quilting.cpp`,
        `findseam.cpp`. Efros, Freeman, "Image quilting for texture synthesis and transfer",
        SIGGRAPH 2001. Qiu et al., arXiv:2005.13712 (ten neighbors).

    Deviations:
        The paper's bank has a million patches of ImageNet, searched approximately after a PCA to 64
        dimensions. The code leaves the last pixels at the right and lower border black; here they
        are quilted, too.
    """

    differentiable: ClassVar[bool] = False
    stochastic: ClassVar[bool] = True
    best_rule: ClassVar[str | None] = "identity"

    patches: Tensor

    def __init__(
        self,
        *,
        preset: str | None = "paper",
        bank: Tensor | str | os.PathLike[str] | None = None,
        overlap: int | None = None,
        neighbors: int = 10,
        seams: Literal["cut", "overwrite"] = "cut",
    ) -> None:
        super().__init__()
        patches = bank if isinstance(bank, Tensor) else _load(Path(bank or BUNDLED))
        if patches.ndim != 4 or patches.shape[2] != patches.shape[3] or 0 in patches.shape[1:]:
            raise ShapeError(f"bank has shape {tuple(patches.shape)}; expected (N, C, P, P)")
        check_images(patches, "bank")
        if type(neighbors) is not int or neighbors < 1:
            raise RangeError(f"neighbors is {neighbors!r}; expected a whole number ≥ 1")
        if len(patches) < neighbors:
            raise RangeError(
                f"the bank has {len(patches)} patches; expected at least {neighbors}, the number "
                "of neighbors to draw from; add images, or lower `neighbors`"
            )
        size = patches.shape[-1]
        overlap = size // 2 if overlap is None else overlap
        if type(overlap) is not int or not 0 <= overlap < size:
            raise RangeError(
                f"overlap is {overlap!r}; expected 0 to {size - 1} for patches of {size}×{size}"
            )
        if seams not in ("cut", "overwrite"):
            raise ConfigError(f"seams is {seams!r}; expected 'cut' or 'overwrite'")
        self.size, self.overlap, self.neighbors, self.seams = size, overlap, neighbors, seams
        self.stochastic = neighbors > 1  # type: ignore[misc]
        # The configuration says where it comes from: it does not belong into checkpoints.
        self.register_buffer("patches", patches.detach().clone(), persistent=False)

    def _grid(self, shape: torch.Size) -> tuple[int, int]:
        """Rows and columns of patches."""
        stride = self.size - self.overlap
        rows, columns = (max(0, -(-(n - self.size) // stride)) + 1 for n in shape[-2:])
        return rows, columns

    def draw(self, keys: Tensor, shape: torch.Size) -> Params:
        """`choice`: which neighbor each patch gets, 0 the nearest; int64, (B, rows, columns)."""
        return {"choice": random.integers(keys, 0, self.neighbors, self._grid(shape))}

    def _taken_apart(self, x: Tensor) -> Tensor:
        """The patches of the image, (B, rows, columns, C, P, P)."""
        if x.shape[1] != self.patches.shape[1]:
            raise ShapeError(
                f"x has {x.shape[1]} channels, the bank's patches {self.patches.shape[1]}; "
                "expected the same; make a bank of such images with patch_bank"
            )
        stride = self.size - self.overlap
        sides = [self.size + (n - 1) * stride for n in self._grid(x.shape)]
        beyond = [side - n for side, n in zip(sides, x.shape[-2:], strict=True)]
        wide = nn.functional.pad(x, (0, beyond[1], 0, beyond[0]), mode="replicate")
        apart = wide.unfold(2, self.size, stride).unfold(3, self.size, stride)
        return apart.permute(0, 2, 3, 1, 4, 5)

    def nearest(self, queries: Tensor, count: int) -> Tensor:
        """Indices of the bank's nearest patches, the nearest first: (Q, count) int64.

        Args:
            queries: (Q, C·P²).
            count: How many.
        """
        bank = self.patches.flatten(1).to(queries.dtype)
        length = bank.square().sum(1) / 2
        some = min(count + _SPARE, len(bank))
        found = []
        for part in queries.split(max(1, _BLOCK // len(bank))):
            rough = torch.addmm(length, part, bank.T, alpha=-1)
            near = rough.topk(some, dim=1, largest=False).indices.sort(1).values
            exact = (bank[near].double() - part[:, None].double()).square().sum(-1)
            found.append(near.gather(1, exact.argsort(dim=1, stable=True)[:, :count]))
        return torch.cat(found)

    def transform(self, x: Tensor, params: Params) -> Tensor:
        """The quilt."""
        if x.numel() == 0:
            return x.clone()
        apart = self._taken_apart(x.detach())
        near = self.nearest(apart.flatten(3).flatten(0, 2), self.neighbors)
        choice = params["choice"].flatten() if self.stochastic else near.new_zeros(len(near))
        index = near.gather(1, choice[:, None])[:, 0]
        chosen = self.patches[index].to(x.dtype).view(apart.shape)
        whole = quilt(chosen, self.overlap, self.seams == "cut")
        return whole[..., : x.shape[-2], : x.shape[-1]].contiguous()

    @backward_rule("surrogate")
    def surrogate(self, x: Tensor, params: Params) -> Tensor:
        """Soft nearest neighbors, averaged where they overlap."""
        if x.numel() == 0:
            return x.clone()
        apart = self._taken_apart(x)
        queries = apart.flatten(3).flatten(0, 2)
        near = self.nearest(queries.detach(), min(self.neighbors + _SPARE, len(self.patches)))
        patches = self.patches.flatten(1).to(x.dtype)[near]  # (Q, K, D)
        distance = (queries[:, None] - patches).square().sum(-1)
        # One unit of the exponent is the mean distance: the weights stay spread over the patches.
        share = (-distance / distance.detach().mean(1, keepdim=True).clamp_min(1e-6)).softmax(1)
        soft = (share[..., None] * patches).sum(1)
        b, rows, columns = apart.shape[:3]
        stride = self.size - self.overlap
        sides = [self.size + (n - 1) * stride for n in (rows, columns)]
        columns_of = soft.view(b, rows * columns, -1).mT
        fold = nn.Fold((sides[0], sides[1]), self.size, stride=stride)
        whole = fold(columns_of) / fold(torch.ones_like(columns_of))
        return whole[..., : x.shape[-2], : x.shape[-1]]

    @backward_rule("identity")
    def identity(self, x: Tensor, params: Params) -> Tensor:
        """The image itself."""
        return x


def patch_bank(x: Tensor, *, count: int, size: int = 5, seed: int = 0) -> Tensor:
    """Patches from random places of images, as evenly from each image as can be.

    Args:
        x: Clean images, (B, C, H, W), in [0, 1]; not those that are to be judged.
        count: N, how many patches.
        size: P, their side.
        seed: Of the places.

    Returns:
        (N, C, P, P).

    Raises:
        ShapeError: If there is no image, or one is smaller than a patch.
        RangeError: If `count` or `size` is below 1.

    Example:
        >>> patch_bank(torch.rand(3, 3, 16, 16), count=100).shape
        torch.Size([100, 3, 5, 5])
    """
    check_images(x)
    if count < 1 or size < 1:
        raise RangeError(f"count and size are {count}, {size}; expected at least 1 each")
    if not len(x) or min(x.shape[-2:]) < size:
        raise ShapeError(
            f"x has shape {tuple(x.shape)}; expected images of at least {size}×{size}, the patch"
        )
    keys = random.keys(seed, count).to(x.device)
    top = random.integers(random.fold(keys, "top"), 0, x.shape[-2] - size + 1)
    left = random.integers(random.fold(keys, "left"), 0, x.shape[-1] - size + 1)
    place = torch.arange(size, device=x.device)
    rows = (top[:, None] + place)[:, None, :, None]
    columns = (left[:, None] + place)[:, None, None, :]
    image = (torch.arange(count, device=x.device) % len(x))[:, None, None, None]
    channel = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    return x[image, channel, rows, columns]


def save_bank(bank: Tensor, path: str | os.PathLike[str]) -> None:
    """Write patches to a file that `Quilting(bank=path)` reads, as 8-bit values.

    Args:
        bank: (N, C, P, P) in [0, 1].
        path: Of the safetensors file.
    """
    check_images(bank, "bank")
    save_file({"patches": (bank * 255).round().to(torch.uint8).contiguous()}, path)


def _load(path: Path) -> Tensor:
    try:
        changed = path.stat().st_mtime_ns
    except OSError as error:
        raise DataError(f"bank {str(path)!r} cannot be read: {error.strerror}") from error
    return _read(path, changed)


@lru_cache(maxsize=4)
def _read(path: Path, changed: int) -> Tensor:
    try:
        stored = load_file(path)["patches"]
    except (SafetensorError, KeyError, OSError) as error:
        raise DataError(
            f"bank {str(path)!r} is no file of patches ({error}); make one with save_bank"
        ) from error
    if stored.dtype != torch.uint8:
        raise DtypeError(f"bank {str(path)!r} has dtype {stored.dtype}; expected uint8")
    return stored.float() / 255
