"""Variance-preserving diffusion: schedule, steps of the reverse process, predictors of noise."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from feint.core.errors import ConfigError, DataError, RangeError, ShapeError

__all__ = ["Gaussian", "Predictor", "Schedule", "from_diffusers", "linear_schedule"]

Predictor = Callable[[Tensor, Tensor], Any]
"""`(x_t, t) -> noise`: x_t (B, C, H, W) in [−1, 1] plus noise, t (B,) int64; what has the result
as its attribute `sample` (diffusers) or twice the channels (learned variances) is fine, too."""


@dataclass(frozen=True)
class Schedule:
    """ᾱ_t, the share of the signal's variance that is left after t + 1 of T noising steps.

    Args:
        kept: ᾱ_0 … ᾱ_{T−1}, float64, falling, in (0, 1).

    Raises:
        RangeError: Otherwise.
    """

    kept: tuple[float, ...]

    def __post_init__(self) -> None:
        falls = all(a > b for a, b in zip((1.0, *self.kept), self.kept, strict=False))
        if not self.kept or not falls or not self.kept[-1] > 0:
            raise RangeError(
                f"the schedule keeps {self.kept[:3]} … of the signal; expected falling shares "
                "between 1 and 0"
            )

    def times(self, last: int, steps: int) -> tuple[int, ...]:
        """`steps` numbers from `last` − 1 falling to 0 or above, evenly spread."""
        return tuple((last * i) // steps - 1 for i in range(steps, 0, -1))

    def reverse(self, x: Tensor, noise: Tensor, t: int, before: int, z: Tensor, how: str) -> Tensor:
        """One step of the reverse process, from time `t` to `before` (−1: the image itself).

        Args:
            x: x_t, (B, C, H, W).
            noise: What the predictor sees in it.
            t: Where x is, 0 … T − 1.
            before: Where to go, below t.
            z: Standard normal, of x's shape.
            how: `"ddpm"`, `"ddim"` or `"sde"`.
        """
        now, then = self.kept[t], self.kept[before] if before >= 0 else 1.0
        beta = 1 - now / then
        if how == "sde":
            return x + 0.5 * beta * x - beta / (1 - now) ** 0.5 * noise + beta**0.5 * z
        image = (x - (1 - now) ** 0.5 * noise) / now**0.5
        if how == "ddim":
            return then**0.5 * image + (1 - then) ** 0.5 * noise
        mean = (then**0.5 * beta * image + (now / then) ** 0.5 * (1 - then) * x) / (1 - now)
        return mean + ((1 - then) / (1 - now) * beta) ** 0.5 * z


def linear_schedule(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Schedule:
    """β from `first` to `last` along a line: that of DDPM and of DiffPure's networks."""
    betas = torch.linspace(first, last, steps, dtype=torch.float64)
    return Schedule(tuple((1 - betas).cumprod(0).tolist()))


class Gaussian(nn.Module):
    """The exact predictor for images whose values are independent and normal.

    Then E[noise | x_t] = √(1−ᾱ)·(x_t − √ᾱ·mean) / (ᾱ·std² + 1 − ᾱ): a closed form to test with, and
    a prior that knows nothing but how bright images are.

    Args:
        schedule: Of the diffusion.
        mean: Of the values, in [−1, 1].
        std: Of the values; CIFAR-10's are about −0.05 and 0.5.
    """

    def __init__(self, schedule: Schedule, mean: float = -0.05, std: float = 0.5) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        kept = torch.tensor(schedule.kept, dtype=torch.float64)
        self.register_buffer("kept", kept, persistent=False)

    kept: Tensor

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The expected noise."""
        a = self.kept.to(x.dtype)[t].view(-1, 1, 1, 1)
        expected: Tensor = (1 - a).sqrt() * (x - a.sqrt() * self.mean) / (a * self.std**2 + 1 - a)
        return expected


def from_diffusers(folder: str | Path) -> tuple[nn.Module, Schedule]:
    """Noise predictor and schedule from a folder that diffusers has saved.

    Args:
        folder: Of a pipeline (`unet/`, `scheduler/`) or of a `UNet2DModel` alone, which gets the
            linear schedule. Nothing is fetched, and weights are read from safetensors only.

    Raises:
        ConfigError: diffusers is not installed; a scheduler that does not predict noise.
        DataError: No such folder, or nothing in it that diffusers can read.
    """
    where = Path(folder)
    if not where.is_dir():
        raise DataError(
            f"model {str(folder)!r} is no folder; expected one that diffusers has saved, with "
            "unet/ and scheduler/, or a UNet2DModel's own"
        )
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError:
        raise ConfigError(
            "diffusers is not installed; pip install 'feint[diffusion]', or give a noise "
            "predictor of your own as model="
        ) from None
    inner = where / "unet" if (where / "unet").is_dir() else where
    try:
        network = diffusers.UNet2DModel.from_pretrained(
            str(inner), local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"diffusers cannot read {str(inner)!r}: {error}") from None
    settings = where / "scheduler" / "scheduler_config.json"
    if not settings.is_file():
        return network.eval(), linear_schedule()
    try:
        config = json.loads(settings.read_text("utf-8"))
        scheduler = diffusers.DDPMScheduler.from_config(config)
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        raise DataError(f"diffusers cannot read {str(settings)!r}: {error}") from None
    kind = scheduler.config.prediction_type
    if kind != "epsilon":
        raise ConfigError(
            f"the network in {str(folder)!r} predicts {kind!r}; expected 'epsilon', the noise"
        )
    return network.eval(), Schedule(tuple(scheduler.alphas_cumprod.double().tolist()))


def noise_of(predictor: Predictor, x: Tensor, t: int) -> Tensor:
    """What a predictor sees in x_t, in the dtype of x.

    Raises:
        ShapeError: Not the image's shape, nor twice its channels.
    """
    weight = next(predictor.parameters(), x) if isinstance(predictor, nn.Module) else x
    found: Any = predictor(x.to(weight.dtype), torch.full((len(x),), t, device=x.device))
    found = getattr(found, "sample", found)
    c = x.shape[1]
    if found.shape not in (x.shape, (len(x), 2 * c, *x.shape[2:])):
        raise ShapeError(
            f"the predictor gave {tuple(found.shape)} for {tuple(x.shape)}; expected the same "
            "shape, or twice the channels"
        )
    result: Tensor = found[:, :c].to(x.dtype)
    return result
