"""Perturbation maps: where attacks put what they add."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from feint.core.checks import check_images
from feint.core.errors import RangeError, ShapeError

__all__ = ["perturbation_map"]


def perturbation_map(
    x: Tensor, x_adv: Tensor, *, weigh: Literal["size", "place"] = "size"
) -> Tensor:
    """Mean perturbation over images and channels, pixel by pixel.

    Args:
        x: Images, (B, C, H, W), in [0, 1].
        x_adv: The same images attacked.
        weigh: `"size"` is the mean of |x_adv − x| (S0); `"place"` scales each image's |x_adv − x|
            to sum 1 first, so that strong perturbations do not drown the others and the map shows
            *where* attackers go (S2).

    Returns:
        float64 (H, W). With `"place"` it sums to the share of images that were touched.

    Raises:
        ShapeError, DtypeError, RangeError: No two batches of images of one shape; no image.

    Cost: no pass of a model.

    Example:
        >>> perturbation_map(torch.zeros(1, 2, 1, 2), torch.tensor([[[[0.0, 0.5]], [[0.0, 1.0]]]]))
        tensor([[0.0000, 0.7500]], dtype=torch.float64)

    References:
        ACE (anonymous ICLR 2019 submission), App. I, Figs. 10 and 11; Prakash et al., "Deflecting
        adversarial attacks with pixel deflection", CVPR 2018, Fig. 3.
    """
    check_images(x)
    check_images(x_adv, "x_adv")
    if x.shape != x_adv.shape or len(x) == 0:
        raise ShapeError(
            f"x is {tuple(x.shape)}, x_adv {tuple(x_adv.shape)}; expected one shape and an image"
        )
    if weigh not in ("size", "place"):
        raise RangeError(f"weigh is {weigh!r}; expected 'size' or 'place'")
    size = (x_adv.double() - x.double()).abs().mean(1)
    if weigh == "size":
        return size.mean(0)
    whole = size.sum((1, 2), keepdim=True)
    return torch.where(whole > 0, size / whole.clamp_min(torch.finfo(size.dtype).tiny), 0).mean(0)
