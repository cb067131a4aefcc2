"""Reparameterized attack: search over the inputs of a generator instead of over images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from feint.attacks._ascent import EPS, Stop, Trace, _check_walk
from feint.attacks._best import Best
from feint.attacks._minimal import Rows, check_count, check_number, flag
from feint.core import random
from feint.core.errors import ConfigError, GradientError, ShapeError
from feint.core.gradients import GradientEstimator, Model
from feint.core.losses import Loss
from feint.core.norms import steepest_ascent
from feint.core.registry import attack

__all__ = ["reparameterized"]

_NORMS = ("linf", "l2")
Map = Callable[[Tensor], Tensor]


@dataclass
class _State(Rows):
    rows: Tensor
    z: Tensor


@attack(
    goal="budget",
    knowledge="gradient",
    norms=_NORMS,
    paper="Athalye et al., 2018, arXiv:1802.00420",
)
def reparameterized(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    decoder: Map | None = None,
    encoder: Map | None = None,
    latent: tuple[int, ...] | None = None,
    invert_steps: int = 200,
    invert_step_size: float = 0.05,
    eps: float | None = None,
    norm: str = "linf",
    steps: int = 40,
    step_size: float | None = None,
    targeted: bool = False,
    loss: str | Loss = "cross_entropy",
    gradient: GradientEstimator | None = None,
    mask: Tensor | None = None,
    seed: int | Tensor = 0,
    stop: Stop | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """Ascent on a latent z, the image being decoder(z) brought into the ball around `x`.

    For a defense g that moves images onto a manifold: with a differentiable decoder h onto that
    manifold, g(h(z)) ≈ h(z), so that gradients go through h, which does not shatter them.

    Convention:
        Images are float RGB, NCHW, in [0, 1]; `eps` is in the same units, `step_size` in those of
        z. The gradient at the image in the ball is pulled back through the decoder at z.

    Args:
        model: Maps images in [0, 1] to logits (B, K); with `keys=` if it is stochastic.
        x: Images, (B, C, H, W), in [0, 1].
        y: True labels (B,), or targets if `targeted`.
        decoder: The generator h: z (B, …) to images (B, C, H, W), differentiable, sample by sample.
            It must be given.
        encoder: Its inverse, exact or not: images to z, the start of the search.
        latent: Without an encoder, the shape of one sample's z: the start is then sought by
            gradient descent on the squared distance of decoder(z) to `x`, from keyed normal
            numbers.
        invert_steps: Steps of that descent (Adam).
        invert_step_size: Its step size.
        eps: Budget in image units; by default 8/255 (linf) or 0.5 (l2).
        norm: `"linf"` or `"l2"`; of the ball, and of the steps in z.
        steps: Number of steps.
        step_size: Length of a step of z in `norm`; by default 2.5·eps/steps, which suits a decoder
            that keeps lengths. Give it for any other.
        targeted: Minimise the loss towards `y` instead.
        loss: `"cross_entropy"`, `"margin"`, `"dlr"`, or a function to maximise.
        gradient: Estimator of the model's part of the gradient; by default `backprop`. `eot(30)`
            for stochastic models.
        mask: Pixels that may change, bool (B or 1, 1 or C, H, W).
        seed: Integer, or one key per sample from `feint.core.random.keys`.
        stop: `"success"` drops a sample once adversarial, `"never"` takes every step; by default
            `"success"` for a deterministic model.
        trace: Called as `trace(step, x_adv, logits, loss, active)` at every evaluated point.

    Returns:
        x_adv: Like `x`, in [0, 1], within `eps` measured in float64: the best evaluated point.

    Raises:
        ConfigError: If there is no decoder, or neither an encoder nor a latent shape.
        RangeError, ShapeError, DtypeError, DeviceError: On bad arguments, or a decoder that does
            not give images like `x`.
        GradientError: If no gradient reaches the image or z, or one that is not finite.
        ModelError: If the logits are NaN or have the wrong shape.

    Cost:
        Per sample at most steps + 1 forward and `steps` backward passes of the model and of the
        decoder, times the estimator's draws for the model; `invert_steps` of the decoder without
        an encoder.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> x, y = torch.rand(2, 3, 2, 2), torch.tensor([0, 1])
        >>> x_adv = reparameterized(
        ...     model, x, y, decoder=torch.sigmoid, encoder=lambda x: torch.logit(x, 1e-3)
        ... )
        >>> bool(((x_adv - x).abs() <= 8 / 255 + 1e-9).all())
        True

    References:
        Athalye, Carlini, Wagner, "Obfuscated gradients give a false sense of security", ICML 2018,
        §4.2 and §5.4 (reparameterization against PixelDefend and Defense-GAN).

    Deviations:
        The budget is kept by projecting the decoded image; the original penalises the distance.
        The projection lets the gradient pass, so that a sample at its bound is not stuck.
    """
    if decoder is None or not callable(decoder):
        raise ConfigError("decoder is missing; give the function from latents to images")
    if encoder is None and latent is None:
        raise ConfigError("neither encoder nor latent is given; the search needs a start")
    budget = EPS.get(norm, 0.0) if eps is None else eps
    if step_size is None:
        step_size = 2.5 * budget / max(1, steps)
    check_count("invert_steps", invert_steps)
    check_number("invert_step_size", invert_step_size)
    best = Best(
        model,
        x,
        y,
        eps=budget,
        norm=norm,
        norms=_NORMS,
        targeted=targeted,
        loss=loss,
        gradient=gradient,
        mask=mask,
        seed=seed,
        stop=stop,
        trace=trace,
    )
    # Latents have a scale of their own, so that no step is too long.
    _check_walk("latent", steps, step_size, False, 1, "sign")
    if len(x) == 0:
        return x.clone()
    if encoder is not None:
        with torch.no_grad():
            z = encoder(best.x).detach()
    else:
        z = _invert(best, decoder, latent or (), invert_steps, invert_step_size)
    if len(z) != len(x):
        raise ShapeError(f"the start has {len(z)} latents; expected {len(x)}, one per image")
    state = _State(best.everyone, z)
    for step in range(steps + 1):
        last = step == steps
        leaf, image = _decode(decoder, state.z, best.x[state.rows], last)
        point = best.confine(image.detach(), state.rows)
        slope = best.ask(point, state.rows, step, forward_only=last)
        if last:
            break
        pulled = _pull_back(image, leaf, slope)
        bad = ~pulled.flatten(1).sum(1).isfinite()
        best.broken[state.rows] = best.broken[state.rows] | bad
        pulled = pulled.masked_fill(flag(bad, pulled), 0)
        if best.early:
            left = best.standing(state.rows)
            if len(left) == 0:
                break
            if len(left) < len(state.rows):
                state.keep(left)
                pulled = pulled[left]
        state.z = state.z.add(steepest_ascent(pulled, norm), alpha=step_size)
    return best.result()


def _decode(decoder: Map, z: Tensor, like: Tensor, last: bool) -> tuple[Tensor, Tensor]:
    """The latent as a leaf, and its images with the graph between them."""
    leaf = z.detach().requires_grad_(not last)
    with torch.set_grad_enabled(not last):
        image = decoder(leaf)
    if image.shape != like.shape or image.dtype != like.dtype:
        raise ShapeError(
            f"the decoder gave {image.dtype} {tuple(image.shape)}; expected images like x, "
            f"{like.dtype} {tuple(like.shape)}"
        )
    return leaf, image


def _pull_back(image: Tensor, leaf: Tensor, slope: Tensor) -> Tensor:
    """The gradient at the image as one at z."""
    found: Tensor | None = None
    if image.requires_grad:
        (found,) = torch.autograd.grad(image, leaf, slope, allow_unused=True)
    if found is None:
        raise GradientError(
            "no gradient reaches the latent: the decoder's graph is cut; give a differentiable one"
        )
    return found


def _invert(
    best: Best, decoder: Map, latent: tuple[int, ...], steps: int, step_size: float
) -> Tensor:
    """The latents whose images are nearest to `x` among those of a descent by Adam."""
    x = best.x
    z = random.normal(random.fold(best.keys, "latent"), latent, x.dtype)
    first, second = torch.zeros_like(z), torch.zeros_like(z)
    nearest, least = z, torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
    for step in range(steps + 1):
        last = step == steps
        leaf, image = _decode(decoder, z, x, last)
        far = (image.detach() - x).flatten(1).square().sum(1)
        nearest = torch.where(flag(far < least, z), z, nearest)
        least = torch.minimum(far, least)
        if last:
            break
        slope = _pull_back(image, leaf, 2 * (image.detach() - x))
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope.square()
        mean, square = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        z = z - step_size * mean / (square.sqrt() + 1e-8)
    return nearest
