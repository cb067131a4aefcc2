"""Make the bank of patches that `feint.defenses.Quilting` uses by default.

    python tools/make_patch_bank.py CIFAR10.npz src/feint/defenses/quilting_bank.safetensors

Takes 4096 patches of 5×5 from the first 4096 training images of CIFAR-10, one from each at a place
drawn from its key; the bundled images that are evaluated by default are test images.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from feint.defenses.quilting import patch_bank, save_bank

COUNT = 4096


def main(source: str, target: str) -> None:
    images = torch.from_numpy(np.load(source)["x_train"][:COUNT]).float() / 255
    save_bank(patch_bank(images, count=COUNT), target)


if __name__ == "__main__":
    main(*sys.argv[1:])
