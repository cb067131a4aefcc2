"""Gradients at the input and at every layer, and the heat maps that are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from feint.core.errors import GradientError, ModelError, RangeError, UnknownNameError
from feint.core.gradients import GradientEstimator, Model, backprop, call, require_gradient
from feint.core.losses import Loss, get_loss
from feint.diagnostics._common import check, sample_keys

__all__ = ["heatmap", "input_gradients", "layer_heatmaps", "pixel_robustness"]


def input_gradients(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    loss: str | Loss = "cross_entropy",
    gradient: GradientEstimator | None = None,
    seed: int | Tensor = 0,
    batch_size: int = 128,
) -> Tensor:
    """Gradient of each image's loss with respect to it: what an attacker sees first.

    Args:
        model: Gives logits. For a defense, the attacker's view of it (`Pipeline.view()`).
        x: Images, (B, C, H, W), in [0, 1].
        y: Labels, (B,).
        loss: A name of `feint.core.losses.LOSSES`, or a function `(logits, y)`.
        gradient: Estimator; `backprop` by default, `eot(30)` for random models.
        seed: Integer, or one key per sample.
        batch_size: Images per pass.

    Returns:
        Like `x`.

    Raises:
        ShapeError, DtypeError, RangeError, DeviceError: On bad arguments.
        GradientError: No gradient reaches the input, it is zero for a structural reason, or it is
            not finite.

    Cost: one forward and one backward pass per image, times the estimator's draws.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        >>> input_gradients(model, torch.rand(2, 3, 2, 2), torch.tensor([0, 1])).shape
        torch.Size([2, 3, 2, 2])

    References:
        ACE (anonymous ICLR 2019 submission), App. B.
    """
    check(x, y, batch_size)
    keys, objective, estimate = sample_keys(seed, x), get_loss(loss), gradient or backprop
    rows = [slice(i, i + batch_size) for i in range(0, len(x), batch_size)]
    found = torch.cat([estimate(model, x[r], y[r], objective, keys[r]).gradient for r in rows])
    if not bool(found.isfinite().all()):
        raise GradientError("NaN or infinite input gradients; look for sqrt, log or a division")
    if not getattr(estimate, "scores_only", False):
        require_gradient(model, x, keys, found)
    return found


def heatmap(gradients: Tensor, *, reduce: Literal["sum", "mean"] = "sum") -> Tensor:
    r"""Heat map of a set of gradients: Σ or mean over images and channels of \|g\|.

    Args:
        gradients: (B, C, H, W).
        reduce: `"sum"` is S0's (App. B), `"mean"` S4's (§2).

    Returns:
        float64 (H, W).

    Raises:
        RangeError: Unknown `reduce`, or not four dimensions.

    Cost: no pass of a model.

    Example:
        >>> heatmap(torch.tensor([[[[1.0]], [[-2.0]]]]))
        tensor([[3.]], dtype=torch.float64)

    References:
        ACE (anonymous ICLR 2019 submission), App. B, Figs. 3, 6 and 7.
    """
    if reduce not in ("sum", "mean") or gradients.ndim != 4:
        raise RangeError(
            f"reduce is {reduce!r} for gradients {tuple(gradients.shape)}; expected 'sum' or "
            "'mean', and (B, C, H, W)"
        )
    size = gradients.detach().double().abs()
    return size.sum((0, 1)) if reduce == "sum" else size.mean((0, 1))


def pixel_robustness(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    loss: str | Loss = "cross_entropy",
    gradient: GradientEstimator | None = None,
    seed: int | Tensor = 0,
    batch_size: int = 128,
) -> Tensor:
    r"""R of S4: mean over images and channels of \|∂L/∂x\|. Large R means a *vulnerable* pixel.

    Args:
        model: As for `input_gradients`.
        x: Images, (B, C, H, W), in [0, 1].
        y: Labels, (B,).
        loss: As for `input_gradients`.
        gradient: As for `input_gradients`.
        seed: As for `input_gradients`.
        batch_size: Images per pass.

    Returns:
        float64 (H, W).

    Raises:
        ShapeError, DtypeError, RangeError, DeviceError, GradientError: As `input_gradients`.

    Cost: one forward and one backward pass per image.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        >>> pixel_robustness(model, torch.rand(2, 3, 2, 2), torch.tensor([0, 1])).shape
        torch.Size([2, 2])

    References:
        Hwang et al., "Where to be adversarial perturbations added? Investigating and manipulating
        pixel robustness using input gradients", ICLR DebugML workshop 2019, §2 of its blog post.

    Deviations:
        The text calls the quantity robustness although it grows with vulnerability; so does ours.
    """
    found = input_gradients(
        model, x, y, loss=loss, gradient=gradient, seed=seed, batch_size=batch_size
    )
    return heatmap(found, reduce="mean")


def layer_heatmaps(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    layers: Sequence[str] | None = None,
    loss: str | Loss = "cross_entropy",
    seed: int | Tensor = 0,
    batch_size: int = 128,
) -> dict[str, Tensor]:
    r"""Gradient heat maps of the input and of the features after every convolution.

    h^l = Σ over images Σ over channels of \|∂L/∂features^l\|; before a strided layer it shows the
    checkerboard that the layer makes.

    Args:
        model: An `nn.Module` that gives logits.
        x: Images, (B, C, H, W), in [0, 1].
        y: Labels, (B,).
        layers: Qualified names of modules whose output has four dimensions; by default every
            convolution that runs exactly once.
        loss: As for `input_gradients`.
        seed: Integer, or one key per sample.
        batch_size: Images per pass.

    Returns:
        `"input"` and the layers in the order in which they run, each float64 (H_l, W_l).

    Raises:
        UnknownNameError: No such module.
        ModelError: A named module that does not run, or gives no feature map.
        GradientError: No gradient reaches a layer.
        ShapeError, DtypeError, RangeError, DeviceError: On bad arguments.

    Cost: one forward and one backward pass per image; the features of a batch are kept.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
        >>> maps = layer_heatmaps(model, torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))
        >>> {name: tuple(m.shape) for name, m in maps.items()}
        {'input': (8, 8), '0': (3, 3)}

    References:
        ACE (anonymous ICLR 2019 submission), App. B, Figs. 6 and 7.

    Deviations:
        "conv1" is the output of the convolution itself, before normalisation and rectifier.
    """
    check(x, y, batch_size)
    modules = dict(model.named_modules())
    asked = list(layers) if layers is not None else None
    for name in asked or ():
        if name not in modules or not name:
            raise UnknownNameError("layer", name, [n for n in modules if n])
    chosen = [n for n, m in modules.items() if isinstance(m, nn.Conv2d)] if asked is None else asked
    objective, keys = get_loss(loss), sample_keys(seed, x)
    total: dict[str, Tensor] = {}
    for start in range(0, len(x), batch_size):
        rows = slice(start, start + batch_size)
        kept = _run(model, x[rows], y[rows], keys[rows], objective, chosen, asked is not None)
        for name, heat in kept.items():
            total[name] = total[name] + heat if name in total else heat
    return total


def _run(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    keys: Tensor,
    objective: Loss,
    chosen: Sequence[str],
    strict: bool,
) -> dict[str, Tensor]:
    """Heat maps of one batch; layers that run more than once are left out unless asked for."""
    modules = dict(model.named_modules())
    seen: dict[str, list[Tensor]] = {}

    def recorder(name: str) -> Any:
        def hook(_: nn.Module, __: object, output: object) -> Tensor | None:
            if not isinstance(output, Tensor) or output.ndim != 4:
                return None
            seen.setdefault(name, []).append(output)
            return output.clone()  # what follows may write in place; the kept tensor stays whole

        return hook

    handles = [modules[name].register_forward_hook(recorder(name)) for name in chosen]
    leaf = x.detach().requires_grad_()
    try:
        with torch.enable_grad():
            value = objective(call(model, leaf, keys), y)
    finally:
        for handle in handles:
            handle.remove()
    once = {n: v[0] for n, v in seen.items() if len(v) == 1 and v[0].requires_grad}
    if strict and (lost := [n for n in chosen if n not in once]):
        raise ModelError(
            f"layer {lost[0]!r} gives no feature map (B, C, H, W) exactly once with a gradient; "
            f"layers that do: {', '.join(once) or 'none of those asked for'}"
        )
    if not value.requires_grad:
        raise GradientError("no gradient reaches the input: the graph is cut")
    found = torch.autograd.grad(value.sum(), [leaf, *once.values()], allow_unused=True)
    if found[0] is None:
        raise GradientError("no gradient reaches the input: the graph is cut")
    named = zip(["input", *once], found, strict=True)
    maps = {name: heatmap(g) for name, g in named if g is not None and len(g) == len(x)}
    if not all(bool(m.isfinite().all()) for m in maps.values()):
        raise RangeError("NaN or infinite gradients inside of the model")
    return maps
