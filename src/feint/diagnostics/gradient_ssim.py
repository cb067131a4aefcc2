"""Structural similarity of gradients: between models, between labels, and of reconstructions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from feint.core import random
from feint.core.errors import GradientError, RangeError, ShapeError
from feint.core.similarity import ssim
from feint.diagnostics._common import check, sample_keys

__all__ = ["gradient_magnitude", "gradient_ssim", "other_labels", "reconstruction_gradients"]


def gradient_magnitude(
    gradients: Tensor, *, reduce: Literal["channels", "max", "mean"] = "channels"
) -> Tensor:
    """Magnitudes as images in [0, 1], each divided by its own largest value.

    Args:
        gradients: (B, C, H, W).
        reduce: Keep the channels, or take their largest or mean magnitude.

    Returns:
        (B, C, H, W), or (B, 1, H, W); zero where the gradient is zero everywhere.

    Raises:
        RangeError: Unknown `reduce`.

    Cost: no pass of a model.

    Example:
        >>> gradient_magnitude(torch.tensor([[[[-4.0, 1.0]]]]))
        tensor([[[[1.0000, 0.2500]]]])

    References:
        Folz, Palacio, Hees, Dengel, "Adversarial defense based on structure-to-signal
        autoencoders", arXiv 1803.07994, §3 and Fig. 2.

    Deviations:
        The paper says neither how channels are reduced nor how magnitudes are scaled.
    """
    if reduce not in ("channels", "max", "mean"):
        raise RangeError(f"reduce is {reduce!r}; expected 'channels', 'max' or 'mean'")
    size = gradients.detach().abs()
    if reduce != "channels":
        size = size.amax(1, keepdim=True) if reduce == "max" else size.mean(1, keepdim=True)
    peak = size.flatten(1).amax(1).view(-1, 1, 1, 1)
    return size / torch.where(peak > 0, peak, 1)


def gradient_ssim(
    gradients: Tensor, *, reduce: Literal["channels", "max", "mean"] = "channels", window: int = 7
) -> Tensor:
    """SSIM of gradient magnitudes for every pair of sources, per image.

    Args:
        gradients: (M, B, C, H, W): M sources (models, or labels) of gradients for B images.
        reduce: As for `gradient_magnitude`.
        window: Side of SSIM's window, odd.

    Returns:
        float64 (M, M, B), symmetric, 1 on the diagonal; the mean over B is S3's Table 1.

    Raises:
        ShapeError: Not five dimensions, or images smaller than the window.

    Cost: no pass of a model; M² similarities per image.

    Example:
        >>> g = torch.rand(2, 3, 1, 8, 8)
        >>> gradient_ssim(g).shape
        torch.Size([2, 2, 3])

    References:
        Folz et al., arXiv 1803.07994, Table 1; SSIM: Wang et al., 2004.
    """
    if gradients.ndim != 5:
        raise ShapeError(f"gradients are {tuple(gradients.shape)}; expected (M, B, C, H, W)")
    count, batch = gradients.shape[:2]
    size = gradient_magnitude(gradients.flatten(0, 1), reduce=reduce).unflatten(0, (count, batch))
    first = size[:, None].expand(-1, count, *size.shape[1:]).flatten(0, 2)
    second = size[None].expand(count, *size.shape).flatten(0, 2)
    return ssim(first, second, window).view(count, count, batch)


def other_labels(y: Tensor, classes: int, *, seed: int | Tensor = 0) -> Tensor:
    """A random label per image that is not its own, evenly from the others.

    Args:
        y: Labels, (B,).
        classes: How many there are, at least 2.
        seed: Integer, or one key per sample.

    Returns:
        (B,) int64.

    Raises:
        RangeError: Fewer than two classes, or a label beyond them.

    Cost: no pass of a model.

    Example:
        >>> y = torch.tensor([0, 1, 1])
        >>> bool((other_labels(y, 2) == 1 - y).all())
        True

    References:
        Folz et al., arXiv 1803.07994, §3: "we then randomly select a different label".
    """
    if classes < 2 or (len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes):
        raise RangeError(f"{classes} classes; expected at least 2, and every label below")
    keys = random.fold(sample_keys(seed, y), "other label")
    drawn = random.integers(keys, 0, classes - 1)
    return drawn + (drawn >= y)


def reconstruction_gradients(
    autoencoder: Callable[[Tensor], Tensor], x: Tensor, *, batch_size: int = 64
) -> Tensor:
    """Gradient of ‖A(x) − x‖₂² with respect to the image that goes in; the target is held.

    Args:
        autoencoder: Images to images of the same shape.
        x: Images, (B, C, H, W), in [0, 1].
        batch_size: Images per pass.

    Returns:
        Like `x`.

    Raises:
        ShapeError: The output has another shape.
        GradientError: No gradient reaches the input.

    Cost: one forward and one backward pass per image.

    Example:
        >>> reconstruction_gradients(lambda x: 2 * x, torch.full((1, 1, 1, 1), 0.5))
        tensor([[[[2.]]]])

    References:
        Folz et al., arXiv 1803.07994, §3: gradients of autoencoders without a classifier.
    """
    check(x, batch_size=batch_size)
    found = []
    for start in range(0, len(x), batch_size):
        leaf = x[start : start + batch_size].detach().requires_grad_()
        with torch.enable_grad():
            out = autoencoder(leaf)
            if out.shape != leaf.shape:
                raise ShapeError(
                    f"the autoencoder gives {tuple(out.shape)} for {tuple(leaf.shape)}; "
                    "expected images of the same shape"
                )
            error = (out - leaf.detach()).square().sum()
            if not error.requires_grad:
                raise GradientError("no gradient passes the autoencoder: the graph is cut")
            (gradient,) = torch.autograd.grad(error, leaf)
        found.append(gradient)
    return torch.cat(found)
