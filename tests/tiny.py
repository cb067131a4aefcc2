"""Tiny models for the tests. Each one is deterministic and has a property known in closed form."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from feint.core import random

SHAPE = (3, 4, 4)


def images(count: int, shape: tuple[int, ...] = SHAPE, seed: int = 0, **kwargs: Any) -> Tensor:
    """Uniform images in [low, high), (count, *shape), from keys."""
    return random.uniform(random.keys(seed, count), shape, **kwargs)


def predicted(model: nn.Module, x: Tensor) -> Tensor:
    """The model's own classes, so that every sample starts out correct."""
    with torch.no_grad():
        return model(x).argmax(1)


class LinearModel(nn.Module):
    """Logits W·x + b on images of `shape`: every distance to a class boundary is known.

    The products are summed sample by sample, so that no matrix kernel makes a row depend on the
    batch size: results are independent of it bit by bit.
    """

    def __init__(
        self,
        classes: int = 5,
        shape: tuple[int, ...] = SHAPE,
        dtype: torch.dtype = torch.float32,
        seed: int = 1,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        keys = random.keys(seed, classes)
        weight = random.normal(keys, shape, torch.float64) * scale
        # The middle of the box is on every boundary: classes share the images about evenly.
        bias = -0.5 * weight.flatten(1).sum(1)
        self.weight = nn.Parameter(weight.to(dtype))
        self.bias = nn.Parameter(bias.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, None] * self.weight).flatten(2).sum(2) + self.bias

    def distances(self, x: Tensor, y: Tensor, norm: str) -> Tensor:
        """Distance of each sample to the boundary between `y` and every class, (B, K) float64.

        For a linear score difference d(x) = z_y − z_j the nearest point with d = 0 is at
        |d(x)| / ‖w_y − w_j‖_q, q dual to the norm; own class: infinite; negative if across.
        """
        weight, bias = self.weight.detach().double(), self.bias.detach().double()
        logits = (x.double()[:, None] * weight).flatten(2).sum(2) + bias
        gap = logits.gather(1, y[:, None]) - logits
        slope = (weight[y][:, None] - weight[None]).flatten(2)
        order = {"linf": 1, "l2": 2, "l1": float("inf")}[norm]
        size = torch.linalg.vector_norm(slope, order, dim=2)
        return (gap / size).scatter(1, y[:, None], torch.inf)

    def distance(self, x: Tensor, y: Tensor, norm: str) -> Tensor:
        """Least distance to another class, (B,) float64."""
        return self.distances(x, y, norm).amin(1)


class TinyConv(nn.Module):
    """Two convolutions and a linear layer with smooth activations; 5 classes; any image size."""

    def __init__(
        self,
        batch_norm: bool = False,
        dtype: torch.dtype = torch.float64,
        classes: int = 5,
        seed: int = 2,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6) if batch_norm else nn.Identity()
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.linear = nn.Linear(6, classes)
        for name, tensor in self.state_dict().items():
            if tensor.is_floating_point():
                key = random.fold(random.keys(seed, 1), name)
                tensor.copy_(random.normal(key, tensor.shape)[0] * 0.5)
        if batch_norm:
            self.norm.running_var.abs_().add_(0.5)
        self.to(dtype).eval()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv2(torch.nn.functional.silu(self.norm(self.conv1(4 * x - 2)))))
        return 4 * self.linear(x.mean((2, 3)))


class StochasticLinear(LinearModel):
    """A linear model behind a keyed shift of all logits' images: z = W·(x + noise) + b."""

    stochastic = True

    def __init__(self, sigma: float = 0.05, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sigma = sigma

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        if keys is None:
            keys = random.entropy_keys(len(x), x.device)
        return super().forward(x + self.sigma * random.normal(keys, x.shape[1:], x.dtype))


class StochasticSlope(nn.Module):
    """Two classes whose gradient itself is random: z = (0, (s·w)·(x − ½)), s ∈ {½, 3/2} keyed.

    The mean of the gradient over draws is that of the linear model with weights w.
    """

    stochastic = True

    def __init__(self, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.weight = random.normal(random.keys(3, 1), shape, dtype)[0]

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        if keys is None:
            keys = random.entropy_keys(len(x), x.device)
        scale = random.integers(keys, 0, 2, x.shape[1:]).to(x.dtype) + 0.5
        score = ((x - 0.5) * self.weight * scale).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(score), score], 1)


class Sawtooth(nn.Module):
    """Class 1 where the fractional part of u = start + slope·Σ(x − ½) exceeds ¾, else class 0.

    Its gradient always points up, so an ascent that enters the success band walks out of it again
    at the next step, onto a lower loss.
    """

    def __init__(self, slope: float, start: float = 0.4) -> None:
        super().__init__()
        self.slope, self.start = slope, start

    def forward(self, x: Tensor) -> Tensor:
        u = self.start + self.slope * (x - 0.5).flatten(1).sum(1)
        score = u - u.detach().floor() - 0.75
        return torch.stack([torch.zeros_like(score), 10 * score], 1)


class Shifted(nn.Module):
    """Adds a constant to all logits: a number, or one per sample taken from the image itself."""

    def __init__(self, model: nn.Module, shift: float, per_sample: bool = False) -> None:
        super().__init__()
        self.model, self.shift, self.per_sample = model, shift, per_sample

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        if not self.per_sample:
            return logits + self.shift
        # Another constant for every sample, with no gradient of its own.
        own = torch.cos(1e3 * x.detach().flatten(1).sum(1, keepdim=True))
        return logits + self.shift * own


class Scaled(nn.Module):
    """Multiplies the logits: with 1000, the softmax saturates in float32 and float64."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.model(x)


class Round(nn.Module):
    """Rounding to `levels` steps: its derivative is zero almost everywhere."""

    def __init__(self, levels: int = 16) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        return torch.round(x * self.levels) / self.levels


class Detach(nn.Module):
    """Cuts the graph."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach().clone()


def behind(front: nn.Module, model: nn.Module) -> nn.Sequential:
    """`model(front(x))`, the parts named `front` and `model`."""
    return nn.Sequential(OrderedDict(front=front, model=model))


class _Count(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counter: Counting) -> Tensor:
        ctx.counter = counter
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.counter.backwards += len(gradient)
        return gradient, None


class Counting(nn.Module):
    """Counts the samples that go forward and the samples that come back."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        return self.model(_Count.apply(x, self))
