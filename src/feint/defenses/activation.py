"""Robust activation maps: where a classifier looks, averaged over its likeliest classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from feint.core.errors import ConfigError, RangeError, ShapeError
from feint.core.gradients import call, is_stochastic

__all__ = ["ActivationMap"]

_CONVOLUTIONS = (torch.conv2d, torch.conv_transpose2d, torch.convolution)

Variant = Literal["paper", "repo"]


class ActivationMap:
    """The robust activation map (R-CAM) of a classifier: a function from images to maps.

    A class activation map weighs the channels of the last convolutional features by what they do
    for a class. The robust one is the sum over the likeliest classes, the i-th with weight 2^-i,
    since an attack that changes the first class mostly leaves the next ones. It is computed on the
    image at hand, adversarial or not, without a gradient.

    Args:
        model: Maps images in [0, 1] to logits, without randomness, with a convolution somewhere.
        top: How many classes; all of them if there are fewer.
        variant: `"paper"` (default: equations 4 and 5) sums the class maps as they are, sets
            negative values to 0 and divides by the maximum. `"repo"`, the map generator that the
            original code points to, stretches each class map to [0, 1] first, weighs the last
            class by 1.2 · 2^(1−top) and stretches the result to [0, 1].

    Convention:
        The features are found by watching a forward pass: the last tensor (B, K, h, w) of the size
        that the last convolution over more than one place gives. So the activation behind it is
        included, and convolutions that are no `nn.Conv2d` are seen. A channel's weight is the mean
        over places of the logit's derivative, which for a global average pool before a linear layer
        is the layer's weight up to a constant factor, as in the original class activation map.

    Returns:
        Called with images (B, C, H, W): maps (B, 1, H, W), float32 in [0, 1], enlarged bilinearly;
        zeros where no feature speaks for the classes.

    Raises:
        RangeError: If `top` < 1.
        ConfigError: If the variant is unknown, the model is random, or it has no convolution. What
            is certain without a forward pass (no weight could be a convolution's) is refused at
            once, the rest on the first image.
        ShapeError: If the images are so small that every convolution gives a single place.

    Cost: One forward pass of the model, and one backward pass from the logits to the features
        (`"repo"`: `top` of them); another forward pass on one image for every new image size.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6))
        >>> ActivationMap(net)(torch.rand(2, 3, 8, 8)).shape
        torch.Size([2, 1, 8, 8])

    References:
        Prakash, Moran, Garber, DiLillo, Storer, "Deflecting adversarial attacks with pixel
        deflection", CVPR 2018, §6.1. Zhou, Khosla, Lapedriza, Oliva, Torralba, "Learning deep
        features for discriminative localization", CVPR 2016. Selvaraju et al., "Grad-CAM", ICCV
        2017: the weights for any classifier.

    Deviations:
        The paper takes "a global max pool on each channel" for w, but cites class activation maps,
        whose weights are a linear layer's. The original's maps come from a VGG of its own, trained
        on Caltech-256 and stored as pictures; here they come from the classifier itself.
    """

    def __init__(self, model: nn.Module, *, top: int = 5, variant: Variant = "paper") -> None:
        if top < 1:
            raise RangeError(f"top is {top}; expected at least 1 class")
        if variant not in ("paper", "repo"):
            raise ConfigError(f"variant is {variant!r}; expected 'paper' or 'repo'")
        if is_stochastic(model):
            raise ConfigError(
                "an activation map needs a classifier without randomness of its own; "
                f"{type(model).__name__} declares some; put it into the defense in front instead"
            )
        weights = [*model.parameters(), *model.buffers()]
        if weights and not any(w.ndim == 4 and len(w) > 1 for w in weights):
            raise _no_convolution(model)
        self.model, self.top, self.variant = model, top, variant
        self._places: dict[tuple[int, ...], int] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Maps of a batch of images; see the class."""
        if len(x) == 0:
            return x.new_zeros(0, 1, *x.shape[-2:], dtype=torch.float32)
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)
        with torch.inference_mode(False):
            x = x.detach().clone().to(dtype or x.dtype)
            shape = tuple(x.shape[1:])
            if shape not in self._places:
                self._places[shape] = self._find(x[:1])
            features, logits = self._run(x, self._places[shape])
            maps = self._maps(features, logits)
            maps = nn.functional.interpolate(
                maps, x.shape[-2:], mode="bilinear", align_corners=False
            )
        return _stretched(maps) if self.variant == "repo" else _divided(maps)

    def _find(self, x: Tensor) -> int:
        """Number of the operation that gives the features."""
        watch = _Watch()
        with torch.no_grad(), watch:
            call(self.model, x)
        if watch.found is not None:
            return watch.found
        if not watch.point:
            raise _no_convolution(self.model)
        raise ShapeError(
            f"images of {x.shape[-2]}×{x.shape[-1]} pixels leave a single place in the "
            f"convolutions of {type(self.model).__name__}; expected at least two, or there is no "
            "map; use larger images"
        )

    def _run(self, x: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """Features and the logits that follow from them, with the graph between the two."""
        cut = _Cut(place)
        with torch.no_grad(), cut:  # the mode allows gradients from the features on
            logits = call(self.model, x)
        if cut.features is None or not logits.requires_grad:
            raise ConfigError(
                f"the logits of {type(self.model).__name__} do not follow from its last "
                "convolutional features; an activation map cannot be made"
            )
        return cut.features, logits

    def _maps(self, features: Tensor, logits: Tensor) -> Tensor:
        """(B, 1, h, w), weighed and summed over the likeliest classes."""
        best = logits.detach().topk(min(self.top, logits.shape[1]), dim=1).indices
        count = best.shape[1]
        share = 2.0 ** -torch.arange(1, count + 1, device=logits.device, dtype=logits.dtype)
        if self.variant == "paper":  # maps add up, so one backward pass serves all classes
            return _weighed(features, (logits.gather(1, best) * share).sum())
        share[-1] *= 2 * 1.2 if count > 1 else 1
        maps = [
            _stretched(_weighed(features, logits.gather(1, c[:, None]).sum()))
            for c in best.unbind(1)
        ]
        return (torch.stack(maps, -1) * share).sum(-1)


def _weighed(features: Tensor, score: Tensor) -> Tensor:
    """Channels weighed by the mean derivative of the score, summed: (B, 1, h, w)."""
    # The graph is kept for those who watch modules with hooks; it goes with its last tensor.
    (slope,) = torch.autograd.grad(score, features, retain_graph=True)
    weight = slope.mean((2, 3), keepdim=True)
    return (weight * features.detach()).sum(1, keepdim=True).float()


def _divided(maps: Tensor) -> Tensor:
    positive = maps.clamp_min(0)
    return positive / _safe(positive.amax((2, 3), keepdim=True))


def _stretched(maps: Tensor) -> Tensor:
    low = maps.amin((2, 3), keepdim=True)
    return (maps - low) / _safe(maps.amax((2, 3), keepdim=True) - low)


def _safe(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)


def _no_convolution(model: nn.Module) -> ConfigError:
    return ConfigError(
        f"{type(model).__name__} has no convolution that could be seen, "
        "so there is no activation map; use a convolutional classifier (not compiled to "
        "TorchScript), or give activation_map a tensor or a function"
    )


def _is_plane(out: object) -> TypeGuard[Tensor]:
    """Whether an operation gives images or features; others are not counted.

    What a first call alone does (memory that is asked for once, say) would shift the numbers.
    """
    return isinstance(out, Tensor) and out.ndim == 4 and out.is_floating_point()


class _Watch(TorchFunctionMode):
    """Counts operations; `found` is the last one with features of the last convolution's size."""

    def __init__(self) -> None:
        super().__init__()
        self.number, self.point = 0, False
        self.size: torch.Size | None = None
        self.found: int | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if _is_plane(out):
            size = out.shape[-2:]
            if func in _CONVOLUTIONS:
                self.point = self.point or size.numel() == 1
                self.size = size if size.numel() > 1 else self.size
            if size == self.size:
                self.found = self.number
            self.number += 1
        return out


class _Cut(TorchFunctionMode):
    """Makes the output of one operation a leaf, and lets a graph begin there."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.number, self.place = 0, place
        self.features: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if _is_plane(out):
            if self.number == self.place:
                out = self.features = out.detach().requires_grad_()
                torch.set_grad_enabled(True)  # the surrounding no_grad puts back what was there
            self.number += 1
        return out
