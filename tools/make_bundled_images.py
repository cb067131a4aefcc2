#!/usr/bin/env python3
"""Write the CIFAR-10 test images that the package carries: a PNG sheet and a JSON card.

usage: make_bundled_images.py CIFAR10.npz [FOLDER]

The npz holds x_test (10000, 3, 32, 32) uint8 and y_test (10000,), in the original order. Taken are
the first 50 images of each class, kept in test order; FOLDER is src/feint/data/bundled by default.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ["airplane", "automobile", "bird", "cat", "deer"]
CLASSES += ["dog", "frog", "horse", "ship", "truck"]
PER_CLASS, COLUMNS, SIDE = 50, 25, 32
FOLDER = Path(__file__).resolve().parent.parent / "src" / "feint" / "data" / "bundled"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("npz", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    arguments = parser.parse_args()
    with np.load(arguments.npz, allow_pickle=False) as data:
        x, y = data["x_test"], data["y_test"]
    first = [np.flatnonzero(y == label)[:PER_CLASS] for label in range(len(CLASSES))]
    index = np.sort(np.concatenate(first))
    pixels = np.ascontiguousarray(x[index])
    # (rows, columns, channel, y, x) → one picture (rows·y, columns·x, channel)
    tiles = pixels.reshape(-1, COLUMNS, 3, SIDE, SIDE).transpose(0, 3, 1, 4, 2)
    sheet = tiles.reshape(-1, COLUMNS * SIDE, 3)
    Image.fromarray(sheet, "RGB").save(arguments.folder / "cifar10.png", optimize=True)
    card = {
        "name": "cifar10",
        "source": "the CIFAR-10 test set; A. Krizhevsky, Learning multiple layers of features from "
        "tiny images, 2009; https://www.cs.toronto.edu/~kriz/cifar.html",
        "rule": f"the first {PER_CLASS} images of each class, in test order",
        "made_by": "tools/make_bundled_images.py",
        "layout": f"tiles of {SIDE}×{SIDE} pixels, {COLUMNS} to a row, row by row",
        "side": SIDE,
        "classes": CLASSES,
        "sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
        "sha256_of": "the pixels, uint8 (500, 3, 32, 32)",
        "index": index.tolist(),
        "label": y[index].tolist(),
    }
    text = json.dumps(card, indent=1, ensure_ascii=False)
    (arguments.folder / "cifar10.json").write_text(_compact(text) + "\n", encoding="utf-8")
    size = (arguments.folder / "cifar10.png").stat().st_size
    print(f"{len(index)} images, indices {index[0]} to {index[-1]}, {size} bytes")


def _compact(text: str) -> str:
    """Lists of numbers on one line."""
    lines: list[str] = []
    for line in text.splitlines():
        if lines and line.startswith("  ") and line.strip(" ,").isdigit():
            lines[-1] += line.strip() + " "
        elif lines and line.strip(" ,") == "]" and lines[-1].endswith(" "):
            lines[-1] = lines[-1].rstrip() + line.strip()
        else:
            lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
