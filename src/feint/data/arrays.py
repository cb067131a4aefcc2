"""Images in arrays: an npz file, CIFAR through torchvision, the images in the package."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from feint.core.errors import ConfigError, DataError, UnknownNameError
from feint.data.dataset import Dataset
from feint.data.images import read_image
from feint.data.sources import ArraySource

__all__ = ["BUNDLED", "bundled", "bundled_names", "cifar", "npz"]

BUNDLED = Path(__file__).parent / "bundled"


def npz(path: str | Path, name: str, split: str) -> Dataset:
    """Arrays `x_SPLIT` and `y_SPLIT`, or else `x` and `y`, of an npz file.

    Convention:
        Images uint8 (N, 3, H, W), labels any integer dtype (N,); `index` is the row. Nothing is
        unpickled.

    Raises:
        DataError: The file is missing, damaged, holds pickled objects, lacks an array, or an array
            has another shape or dtype.
        ConfigError: `x` and `y` are not split, but the training part was asked for.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; expected an npz with x_{split}, y_{split}")
    try:
        if not zipfile.is_zipfile(path):
            raise DataError(f"{path} is no npz archive, or a truncated one; expected numpy.savez")
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            keys = (f"x_{split}", f"y_{split}")
            if keys[0] not in archive and "x" in archive:
                keys = ("x", "y")
                if split != "test":
                    raise ConfigError(f"{path} holds x and y, not {split}; leave the split out")
            for key in keys:
                if key not in archive:
                    raise DataError(
                        f"{path} has no array {key!r}; it holds {', '.join(archive.files) or '–'}; "
                        f"expected x_{split} and y_{split}, or x and y"
                    )
            x, y = archive[keys[0]], archive[keys[1]]
            if not (isinstance(x, np.ndarray) and isinstance(y, np.ndarray)):
                raise DataError(f"{path} is damaged: {keys[0]} or {keys[1]} is no array")
    except (DataError, ConfigError):
        raise
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise DataError(
                f"{path} holds pickled objects, which may run code; expected plain arrays: "
                "x uint8 (N, 3, H, W), y integers (N,)"
            ) from None
        raise DataError(f"{path} is damaged ({error})") from None
    except Exception as error:  # zip, zlib and header errors of a damaged archive
        raise DataError(f"{path} is damaged ({error}); make it anew") from None
    return _dataset(name, f"{path}:{keys[0]}", x, y)


def _dataset(
    name: str,
    where: str,
    x: npt.NDArray[Any],
    y: npt.NDArray[Any],
    classes: tuple[str, ...] | None = None,
) -> Dataset:
    if x.dtype != np.uint8:
        fix = "np.rint(255 * x).astype('uint8')" if x.dtype.kind == "f" else "x.astype('uint8')"
        raise DataError(f"{where} has dtype {x.dtype}; expected uint8; store {fix}")
    if x.ndim != 4 or x.shape[1] != 3:
        channels_last = x.ndim == 4 and x.shape[3] == 3
        fix = "; store x.transpose(0, 3, 1, 2)" if channels_last else ""
        raise DataError(f"{where} has shape {x.shape}; expected (N, 3, H, W), RGB{fix}")
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
        raise DataError(
            f"the labels of {where} are {y.dtype} {y.shape}; expected integers ({len(x)},)"
        )
    if len(y) and (int(y.min()) < 0 or int(y.max()) >= 1 << 31):
        row = int(np.flatnonzero((y < 0) | (y >= 1 << 31))[0])
        raise DataError(f"row {row} of {where} has label {y[row]}; expected a class index from 0")
    return Dataset(
        name=name,
        source=ArraySource(torch.from_numpy(np.ascontiguousarray(x)), where),
        positions=tuple(range(len(x))),
        index=torch.arange(len(x)),
        labels=torch.from_numpy(y.astype(np.int64)),
        classes=classes,
    )


def cifar(kind: str, split: str, root: str | Path | None, download: bool) -> Dataset:
    """CIFAR-10 or CIFAR-100 through torchvision; `index` is the place in the original order.

    Args:
        kind: `"cifar10"` or `"cifar100"`.
        split: `"test"` or `"train"`.
        root: The folder that holds `cifar-10-batches-py` (`cifar-100-python`); by default that of
            the environment variable FEINT_DATA, or else `~/.cache/feint`.
        download: Fetch it if it is not there.

    Raises:
        DataError: It is not there or damaged.

    References:
        Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
    """
    folder = Path(root or os.environ.get("FEINT_DATA") or Path.home() / ".cache" / "feint")
    from torchvision import datasets  # loads slowly, and only these two sets need it

    maker = datasets.CIFAR10 if kind == "cifar10" else datasets.CIFAR100
    try:
        with warnings.catch_warnings():
            # The original batches were pickled with an old numpy, at which a new numpy grumbles.
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            data = maker(str(folder), train=split == "train", download=download)
    except (RuntimeError, OSError) as error:
        if download:
            raise DataError(f"{kind} could not be fetched to {folder}: {error}") from None
        raise DataError(
            f"{kind} is not in {folder}, or damaged; give the folder that holds "
            f"{maker.base_folder} as root=DIR (--data-root, environment FEINT_DATA), or fetch it "
            "with download=True (--download)"
        ) from None
    x = np.ascontiguousarray(data.data.transpose(0, 3, 1, 2))
    return _dataset(kind, f"{kind}:{split}", x, np.asarray(data.targets), tuple(data.classes))


def bundled_names() -> list[str]:
    """Names of the image sets in the package."""
    return sorted(p.stem for p in BUNDLED.glob("*.json"))


def bundled(name: str) -> Dataset:
    """A set of images in the package: a sheet of tiles (PNG) and what they are (JSON).

    `index` is each image's place in the set that it was taken from.

    Raises:
        UnknownNameError: No such set.
        DataError: The package's files are damaged.
    """
    if name not in bundled_names():
        raise UnknownNameError("bundled image set", name, bundled_names())
    card = json.loads((BUNDLED / f"{name}.json").read_text(encoding="utf-8"))
    sheet = read_image(BUNDLED / f"{name}.png")
    side, count = int(card["side"]), len(card["index"])
    tiles = sheet.unflatten(1, (-1, side)).unflatten(3, (-1, side)).permute(1, 3, 0, 2, 4)
    pixels = tiles.reshape(-1, 3, side, side)[:count].contiguous()
    if hashlib.sha256(pixels.numpy().tobytes()).hexdigest() != card["sha256"]:
        raise DataError(f"the bundled images {name!r} are damaged; install feint anew")
    return Dataset(
        name=f"bundled:{name}",
        source=ArraySource(pixels, f"bundled:{name}"),
        positions=tuple(range(count)),
        index=torch.tensor(card["index"]),
        labels=torch.tensor(card["label"]),
        classes=tuple(card["classes"]),
    )
