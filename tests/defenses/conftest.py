"""Natural images for the figures that were measured on them (tests marked `reference`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from feint.core import random
from feint.core.quantise import from_uint8
from feint.defenses import Defense

FOLDER = Path(__file__).parents[3] / "shared" / "data" / "nips2017"


class Natural:
    """The first images of the shared set by file name, 299×299: those of the frozen values."""

    def __init__(self, count: int) -> None:
        files = sorted((FOLDER / "images").glob("*.png"))[:count]
        arrays = [np.asarray(Image.open(file).convert("RGB")) for file in files]
        self.x = from_uint8(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous())

    def distances(self, defense: Defense, seed: int = 0) -> tuple[float, float]:
        """Means over the images of rms = √mean(d²) and of scikit-image's SSIM (7×7, uniform)."""
        from skimage.metrics import structural_similarity

        def ssim(a: Tensor, b: Tensor) -> float:
            return structural_similarity(a.numpy(), b.numpy(), channel_axis=0, data_range=1.0)

        keys = random.keys(seed, len(self.x))
        y = torch.cat([defense(x, k) for x, k in zip(self.x.split(5), keys.split(5), strict=True)])
        rms = ((y - self.x) ** 2).flatten(1).mean(1).sqrt().mean()
        return float(rms), float(np.mean([ssim(*pair) for pair in zip(self.x, y, strict=True)]))


@pytest.fixture(scope="session")
def natural() -> Natural:
    return Natural(25)
