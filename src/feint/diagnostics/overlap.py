"""Gradient overlap Ω: how many parameters of a network hang on each pixel."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from feint.core import random
from feint.core.errors import GradientError, ModelError, RangeError, ShapeError, UnknownNameError
from feint.core.gradients import call

__all__ = ["OVERLAP_PRESETS", "gradient_overlap"]

OVERLAP_PRESETS: dict[str, dict[str, Any]] = {
    "repo": {"weight": 0.1, "shortcut": None, "linear": False},
    "paper": {"weight": 1.0, "shortcut": 1, "linear": True},
}
_PASSED = frozenset(
    {"relu", "relu_", "relu6", "hardtanh", "leaky_relu", "elu", "silu", "gelu", "tanh", "sigmoid"}
)


class _Linear(TorchFunctionMode):
    """Runs a network as its convolutional and dense layers alone.

    Activations pass their input on; a maximum over a window becomes the mean over it, so that every
    pixel that it looks at counts.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name, options = getattr(func, "__name__", ""), dict(kwargs or {})
        if name in _PASSED and args and isinstance(args[0], Tensor):
            return args[0]
        if name == "max_pool2d" or name == "_max_pool2d":
            given = dict(
                zip(("input", "kernel_size", "stride", "padding"), args[:4], strict=False),
                **options,
            )
            return F.avg_pool2d(
                given["input"],
                given["kernel_size"],
                given.get("stride") or None,
                given.get("padding", 0),
                bool(given.get("ceil_mode", False)),
            )
        return func(*args, **options)


def gradient_overlap(
    model: nn.Module,
    shape: tuple[int, int, int],
    *,
    preset: str | None = "repo",
    weight: float | None = None,
    shortcut: int | None = None,
    linear: bool | None = None,
) -> Tensor:
    r"""Gradient overlap Ω of every pixel, from the architecture alone.

    A copy of the network gets one constant for every weight and 0 for every bias (batch
    normalisation: mean 0, variance 1); the gradient of the sum of its logits then counts, pixel by
    pixel, the paths that lead from it to the output: Ω = mean over channels of \|∂Σz/∂x\|. What was
    learned plays no part; strides, kernels, skip connections and ACE's λ do.

    Args:
        model: A classifier on images in [0, 1]; it is left as it is.
        shape: Of one image, (C, H, W).
        preset: `"repo"` (default: it gives S0's Table 2 exactly, all 16 numbers) has weights of
            0.1, runs rectifiers and maxima as they are, and takes the weights of 1×1 convolutions
            with stride 2 to the power `shortcut`, so that a projection shortcut weighs as much as
            the layers that it passes. `"paper"` is S0 App. C: weights of 1, and only convolutional
            and dense layers: rectifiers pass their input, a maximum counts all that it looks at.
        weight: The constant; above 0. It decides how much a skip connection (ACE's, too) weighs
            beside the layers that it passes, so the two presets order the pixels differently.
        shortcut: Power for 1×1 convolutions with stride 2, ACE's encoder among them; by default 2,
            or 3 in networks with bottleneck blocks (of three layers), known by their class name.
        linear: Whether to leave rectifiers and maxima out.

    Convention:
        The image is all ones, so with the usual normalisation every activation is positive and no
        rectifier cuts anything. The result is divided by its largest value.

    Returns:
        Ω, float64 (H, W), in [0, 1], largest 1.

    Raises:
        UnknownNameError: No such preset.
        RangeError: The weight or the power is not positive, or the numbers leave the range of
            float64 (deep networks with a weight of 1: take 0.1).
        ShapeError: `shape` is not (C, H, W).
        ModelError: The model has no parameters to set.
        GradientError: Nothing reaches the input.

    Cost: one forward and one backward pass of one image, in float64.

    Example:
        >>> omega = gradient_overlap(nn.Sequential(nn.Conv2d(1, 1, 3, 2), nn.Flatten()), (1, 5, 5))
        >>> omega[2]
        tensor([0.5000, 0.5000, 1.0000, 0.5000, 0.5000], dtype=torch.float64)

    References:
        ACE (anonymous ICLR 2019 submission), §2.2, App. C and Fig. 2; original code, `get_rf`.

    Deviations:
        Float64 throughout. The original feeds ones *behind* the normalisation, which scales a
        channel and changes no proportion. Weights that are buffers or are made inside of `forward`
        are beyond reach.
    """
    chosen: dict[str, Any] = {}
    if preset is not None:
        if preset not in OVERLAP_PRESETS:
            raise UnknownNameError("preset of gradient_overlap", preset, OVERLAP_PRESETS)
        chosen = OVERLAP_PRESETS[preset]
    value = chosen.get("weight", 0.1) if weight is None else weight
    power = chosen.get("shortcut") if shortcut is None else shortcut
    plain = chosen.get("linear", False) if linear is None else linear
    if not value > 0 or (power is not None and power < 1):
        raise RangeError(f"weight {value}, shortcut {power}; expected above 0, and at least 1")
    if len(shape) != 3 or min(shape) < 1:
        raise ShapeError(f"shape is {shape!r}; expected (channels, height, width)")
    network = _constant(model, value, power)
    device = next(network.parameters()).device
    ones = torch.ones((1, *shape), dtype=torch.float64, device=device, requires_grad=True)
    keys = random.keys(0, torch.zeros(1, dtype=torch.int64, device=device))
    with torch.enable_grad():
        if plain:
            with _Linear():
                total = call(network, ones, keys).sum()
        else:
            total = call(network, ones, keys).sum()
        if not total.requires_grad:
            raise GradientError("no gradient reaches the input: the graph is cut")
        (gradient,) = torch.autograd.grad(total, ones, allow_unused=True)
    if gradient is None or not bool(gradient.any()):
        raise GradientError(
            "the overlap is zero everywhere: activations cut every path; take preset='paper' "
            "(--overlap paper), which leaves them out"
        )
    overlap = gradient[0].abs().mean(0)
    if not bool(overlap.isfinite().all()):
        raise RangeError(
            f"the overlap leaves the range of float64 with weight {value:g}; take a smaller one, "
            "such as weight=0.1"
        )
    return overlap / overlap.max()


def _constant(model: nn.Module, value: float, power: int | None) -> nn.Module:
    """A copy in eval mode and float64 whose weights are all `value` and whose biases are 0."""
    network = copy.deepcopy(model).double().eval()
    if next(network.parameters(), None) is None:
        raise ModelError("the model has no parameters; the overlap counts paths through them")
    if power is None:
        named = any("bottleneck" in type(m).__name__.lower() for m in network.modules())
        power = 3 if named else 2
    with torch.no_grad():
        for module in network.modules():
            strided = isinstance(module, nn.Conv2d) and (
                tuple(module.kernel_size) == (1, 1) and tuple(module.stride) == (2, 2)
            )
            filled = value**power if strided else value
            for name, parameter in module.named_parameters(recurse=False):
                parameter.fill_(0.0 if name.endswith("bias") else filled)
            for name, buffer in module.named_buffers(recurse=False):
                if name in ("running_mean", "running_var"):
                    buffer.fill_(float(name == "running_var"))
    return network
