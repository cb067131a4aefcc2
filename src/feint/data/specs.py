"""Load a dataset by its spec."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from feint.core.errors import ConfigError, DataError, UnknownNameError
from feint.data.arrays import bundled, bundled_names, cifar, npz
from feint.data.dataset import Dataset
from feint.data.listings import image_folder, image_list
from feint.data.resize import Fit, Mode, Resize

__all__ = ["DEFAULT", "load"]

DEFAULT = "bundled:cifar10"


def load(
    spec: str = DEFAULT,
    *,
    samples: int | None = None,
    split: str = "test",
    resize: int | None = None,
    mode: Mode = "bilinear",
    fit: Fit = "stretch",
    root: str | Path | None = None,
    download: bool = False,
    targets: str | None = None,
) -> Dataset:
    """Load a dataset by its spec.

    ===================  ==========================================================================
    `bundled:cifar10`    500 images of the CIFAR-10 test set, in the package
    `cifar10, cifar100`  the whole sets through torchvision, from `root`
    `imagefolder:DIR`    DIR/CLASS/IMAGE
    `PATH/NAME.csv`      columns file,label[,target]; files beside the list or in `images/` there
    `PATH/NAME.npz`      arrays x_test, y_test (x_train, y_train), or x, y: uint8 (N, 3, H, W)
    ===================  ==========================================================================

    Convention:
        Images are 8-bit RGB, given as float32 in [0, 1]. `Dataset.index` is a sample's identity:
        its place in the whole set (of `bundled:cifar10`: in the CIFAR-10 test set).

    Args:
        spec: See the table.
        samples: How many to take, ranked by a keyed hash of their indices (`Dataset.take`): the
            same ones on every machine, and those for 100 among those for 200. By default all, in
            their own order.
        split: `"test"` or `"train"`, for sets that are split.
        resize: Side in pixels to which every image is brought; needed if sizes differ.
        mode: `"bilinear"` (antialiased) or `"nearest"`; see `Resize`.
        fit: `"stretch"` to the square, or `"crop"` its center.
        root: Where CIFAR is; by default FEINT_DATA, or else `~/.cache/feint`.
        download: Fetch CIFAR if it is missing. Nothing is ever fetched otherwise.
        targets: `"random"` gives every sample a target class for targeted threats: any but its
            own, by a keyed hash of its index. By default the dataset's own, if it has some.

    Raises:
        UnknownNameError: No such kind of data or bundled set.
        ConfigError, RangeError: An option that cannot mean anything.
        DataError: A file that is missing, damaged or not what its name says.
        ShapeError: Images of several sizes, and no `resize`.

    Example:
        >>> data = load("bundled:cifar10", samples=8)
        >>> batch = next(data.batches(4))
        >>> batch.x.shape, batch.y.shape, len(data)
        (torch.Size([4, 3, 32, 32]), torch.Size([4]), 8)
    """
    if split not in ("test", "train"):
        raise ConfigError(f"split is {split!r}; expected 'test' or 'train'")
    resizing = None if resize is None else Resize(resize, mode, fit)
    if resizing is None and (mode, fit) != ("bilinear", "stretch"):
        raise ConfigError(f"mode={mode!r}, fit={fit!r} without a size; give resize=SIDE too")
    data = _open(spec, split, root, download)
    data = replace(data, resize=resizing)
    if targets is not None:
        if targets != "random":
            raise ConfigError(f"targets is {targets!r}; expected 'random', or leave it out")
        data = data.with_random_targets()
    if samples is not None:
        data = data.take(samples)
    _ = data.shape  # images of several sizes are an error now, not in the middle of a run
    return data


def _open(spec: str, split: str, root: str | Path | None, download: bool) -> Dataset:
    kind, colon, rest = spec.partition(":")
    if spec in ("cifar10", "cifar100"):
        return cifar(spec, split, root, download)
    if root is not None or download:
        raise ConfigError(f"root and download are for cifar10 and cifar100; {spec!r} takes neither")
    if spec.lower().endswith(".npz"):
        return npz(spec, spec, split)
    if split != "test":
        raise ConfigError(f"{spec!r} is not split; leave split out, or give the set you mean")
    if kind == "bundled" and colon:
        return bundled(rest)
    if kind == "imagefolder" and colon:
        return image_folder(rest, spec)
    if spec.lower().endswith(".csv"):
        return image_list(spec, spec)
    if Path(spec).is_dir():
        raise ConfigError(f"{spec!r} is a folder; write imagefolder:{spec}, or name a .csv in it")
    if Path(spec).exists():
        raise DataError(f"{spec!r} is no dataset; expected a .csv list or an .npz archive")
    known = ["cifar10", "cifar100", "imagefolder:DIR", "NAME.csv", "NAME.npz"]
    raise UnknownNameError("data", spec, known + [f"bundled:{n}" for n in bundled_names()])
