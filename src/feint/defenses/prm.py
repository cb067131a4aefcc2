"""Pixel Robustness Manipulator (PRM): a sparse autoencoder behind a random one-pixel shift."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.errors import ConfigError, RangeError
from feint.core.registry import defense
from feint.core.spec import format_value
from feint.defenses._learned import Learned
from feint.defenses._unet import CHECKERBOARD, UNet, tile_mask
from feint.defenses.base import Params, backward_rule
from feint.defenses.pixel_shift import PixelShift

__all__ = ["PRM"]

MAX_SUPPORT = 1024
"""Most draws that are written out for an exact expectation."""


@defense(
    "prm",
    paper="Hwang et al. 2019, DebugML workshop (PRM), and its blog post, §3",
    presets={
        "paper": {},
        "repo": {"lam": (0.0, 0.5, 0.7, 0.9, 0.99, 1.0), "include_identity": True},
    },
)
class PRM(Learned):
    r"""Pixel Robustness Manipulator, one module or a stack of randomly chosen ones.

    .. math:: PRM(x) = (1 − λ)·s(x) + λ·A(s(x))

    `s` is a random shift by one pixel with zeros behind it, and `A` an autoencoder whose first
    layer is connected to a part of the pixels only. Without the shift the gradient of the whole
    lies on these pixels the more, the nearer λ is to 1; attacks made there miss once the shift has
    moved the image.

    Claim: attacks on a deterministic PRM in front of an ImageNet classifier have almost no effect
    behind the random one, which would be 100 % of its clean accuracy (blog, table of four defenses;
    gray box, the paper's own words; the numbers are lost).
    Known break: the exact expectation over the eight shifts (`support`) with differentiation
    through the autoencoder, or past it (`identity`).

    The bundled UNet is made for 32×32 images, where a quarter of the pixels is 16×16: the bundled
    plain ResNet-20 classifies 50.8 % of the CIFAR-10 test set behind it at λ=0.99 without the shift
    (90.8 % bare). Of 64 bundled images, means of four draws, PGD at linf 8/255: 31 right; 31 after
    20 steps on the deterministic module (λ=1, no shift), which fall to 0 there: the claim; 0.25
    after 10 steps with `exact` under EOT-4, 9 with `identity`: the break.

    Backward rules:
        `exact` is autograd, through shift and network. `identity` differentiates the shifts and
        takes each network as the identity: BPDA, as A(x) ≈ x.

    Args:
        preset: `"paper"` (default) is the blog's one module with one λ and the eight neighbours.
            `"repo"` draws λ from six values and the shift from nine, (0, 0) among them, as the
            original code of February 2019 does for one UNet.
        weights: Name of bundled weights, `trained:NAME`, a `.safetensors` file of `feint train`, or
            `"untrained"`; or a list of them, from which every module of the stack draws its own. By
            default `cifar10-unet`.
        lam: 0 ≤ λ ≤ 1, or a list of values from which every module draws. The paper's is not
            given; S0's for ImageNet is 0.99.
        modules: Modules in the stack, one after the other, each with its own draw (original code:
            1, later 5 out of 30 networks).
        shift: False leaves the shift out: what the original's gray-box attacker attacks.
        include_identity: Draw the shift from nine, (0, 0) among them.
        width: Channels of the UNet's first level; by default as the weights say, 64 if untrained.
        depth: Levels of the UNet; by default as the weights say, 5 if untrained.
        mask: Tile of zeros and ones, repeated over the image: the connected pixels, such as
            `[[1, 0], [0, 0]]` (default: a 1×1 convolution with stride 2); by default as the
            weights say.

    Convention:
        Images in [0, 1]; normalisation (ImageNet's constants) inside; the output is not clipped.
        Every sample draws its own modules, λ and shifts.

    Raises:
        RangeError: λ outside [0, 1], modules below 1, a width or depth below 1.
        ConfigError: An empty list, a mask that is no tile, weights of another network.
        UnknownNameError, DataError: Weights that are not there, or damaged.
        ShapeError: Images without three channels, or smaller than 2^depth pixels.

    Cost: One gather and one forward pass of a UNet per module; the paper's UNet takes 9.2 G
        multiply–adds at 224×224, 2.3 times a ResNet-50; the bundled one 16 % of a ResNet-20.

    Example:
        >>> import torch
        >>> from feint.core import random
        >>> prm = PRM(weights="untrained", width=4, depth=2)
        >>> prm(torch.rand(2, 3, 16, 16), keys=random.keys(0, 2)).shape
        torch.Size([2, 3, 16, 16])

    References:
        Hwang et al., "Where to be adversarial perturbations added? Investigating and manipulating
        pixel robustness using input gradients", ICLR DebugML workshop, 2019; Kim,
        "Investigating pixel robustness using input gradients" (blog), §3; original code, `ACE` of
        branch nsml.

    Deviations:
        The original draws once per batch, here every sample draws. Its thirty networks were not
        published. How it feeds masks other than the default is not documented: ours reads the
        masked image by a 2×2 convolution with stride 2.
    """

    differentiable: ClassVar[bool] = True
    stochastic: ClassVar[bool] = True
    family: ClassVar[str] = "unet"
    bundled: ClassVar[str] = "cifar10-unet"

    network: UNet

    def __init__(
        self,
        *,
        preset: str | None = "paper",
        weights: str | Sequence[str] | None = None,
        lam: float | Sequence[float] = 0.99,
        modules: int = 1,
        shift: bool = True,
        include_identity: bool = False,
        width: int | None = None,
        depth: int | None = None,
        mask: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.lams = tuple(map(float, lam if isinstance(lam, list | tuple) else (lam,)))  # type: ignore[arg-type]
        files = list(weights) if isinstance(weights, list | tuple) else [weights]
        if not self.lams or not files:
            raise ConfigError("lam or weights is an empty list; expected at least one")
        for value in self.lams:
            if not 0 <= value <= 1:
                raise RangeError(f"lam is {format_value(lam)}; expected 0 ≤ λ ≤ 1")
        if type(modules) is not int or modules < 1:
            raise RangeError(f"modules is {modules}; expected a whole number from 1")
        if include_identity and not shift:
            raise ConfigError("include_identity needs shift=True")
        self.count = modules
        self.shifts = (
            PixelShift(preset="prm", include_identity=include_identity).offsets
            if shift
            else ((0, 0),)
        )
        asked = {"width": width, "depth": depth, "mask": mask}
        usual = {"width": 64, "depth": 5, "mask": CHECKERBOARD}
        self.open(files[0], asked, usual, UNet)  # type: ignore[arg-type]
        self.others = nn.ModuleList(
            self.opened(file, asked, usual, UNet, seed)[0]  # type: ignore[arg-type]
            for seed, file in enumerate(files[1:], 1)
        )
        self.stride = max(net.stride for net in self.pool)
        self.options = tuple(
            itertools.product(range(len(self.pool)), self.lams, self.shifts),
        )
        self.stochastic = len(self.options) > 1  # type: ignore[misc]
        self._shift = PixelShift(preset="prm", include_identity=True)

    @property
    def pool(self) -> tuple[UNet, ...]:
        """The networks from which a module draws."""
        return (self.network, *self.others)  # type: ignore[arg-type]

    def draw(self, keys: Tensor, shape: torch.Size) -> Params:
        """`choice`, int64 (B, modules): which of `options`, (network, λ, shift), each takes."""
        return {"choice": random.integers(keys, 0, len(self.options), (self.count,))}

    def support(
        self, shape: torch.Size, device: torch.device | str | None = None
    ) -> tuple[Params, ...] | None:
        """Every choice, if they are at most 1024; a value that `lam` repeats counts twice."""
        if not self.stochastic:
            return ({},)
        if len(self.options) ** self.count > MAX_SUPPORT:
            return None
        every = itertools.product(range(len(self.options)), repeat=self.count)
        return tuple(
            {"choice": torch.tensor([option], device=device).expand(shape[0], -1)}
            for option in every
        )

    def transform(self, x: Tensor, params: Params) -> Tensor:
        """The stack, module by module."""
        self.check_shape(x, self.stride)
        return self._stacked(x, params, through=True)

    def learn(self, x: Tensor, params: Params) -> Tensor:
        """The first network alone, which training compares with the image."""
        self.check_shape(x, self.stride)
        return self.on_normalized(self.network, x)

    @backward_rule("identity")
    def identity(self, x: Tensor, params: Params) -> Tensor:
        """The shifts alone."""
        return self._stacked(x, params, through=False)

    def _stacked(self, x: Tensor, params: Params, *, through: bool) -> Tensor:
        device = x.device
        networks, lams, offsets = zip(*self.options, strict=True)
        which = torch.tensor(networks, device=device)
        mixed = torch.tensor(lams, device=device, dtype=x.dtype)
        dx, dy = torch.tensor(offsets, device=device).unbind(1)
        for i in range(self.count):
            choice = (
                params["choice"][:, i].to(device)
                if self.stochastic
                else torch.zeros(len(x), dtype=torch.int64, device=device)
            )
            if len(self.shifts) > 1:
                x = self._shift.transform(x, {"dx": dx[choice], "dy": dy[choice]})
            if through:
                lam = mixed[choice].view(-1, 1, 1, 1)
                x = (1 - lam) * x + lam * self._reconstructed(x, which[choice])
        return x

    def _reconstructed(self, x: Tensor, which: Tensor) -> Tensor:
        """Each sample by its own network: one forward pass per network that was drawn."""
        if len(self.pool) == 1:
            return self.on_normalized(self.network, x)
        made = torch.zeros_like(x)
        for number, network in enumerate(self.pool):
            picked = (which == number).nonzero().flatten()
            if len(picked):
                part = self.on_normalized(network, x[picked])
                made = made.index_copy(0, picked, part.to(made.dtype))
        return made

    def connected(self, height: int, width: int) -> Tensor:
        """The pixels that the first network reads: bool, (1, 1, height, width)."""
        return tile_mask(self.network.mask, height, width)
