"""Datasets as (x, y, target, index): bundled, CIFAR-10/100, image folder, image list, npz."""

from __future__ import annotations

from feint.data.dataset import Batch, Dataset
from feint.data.images import read_image, write_png
from feint.data.resize import Resize
from feint.data.specs import DEFAULT, load

__all__ = ["DEFAULT", "Batch", "Dataset", "Resize", "load", "read_image", "write_png"]
