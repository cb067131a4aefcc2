"""Total-variation minimization: drop pixels at random, rebuild the image by split Bregman."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from feint.core import random
from feint.core.errors import RangeError
from feint.core.pieces import in_pieces
from feint.core.registry import defense
from feint.defenses.base import Defense, Params, backward_rule

__all__ = ["TV", "tv_energy", "tv_minimise"]


@defense(
    "tv",
    paper="Guo, Rana, Cissé, van der Maaten, 2018, arXiv:1711.00117",
    presets={
        "guo": {"weight": 0.03, "isotropic": True, "shared": False, "tol": 0.01, "sweeps": 10},
        "qiu": {"weight": 0.015, "isotropic": False, "shared": True, "tol": 0.001, "sweeps": 1},
    },
)
class TV(Defense):
    """Total-variation minimization of a randomly subsampled image.

    Each value is observed with probability `keep`. The result is the image z with the least
    Σ over observed (z − x)² / 2 + weight · TV(z), by split Bregman iterations; each channel is
    minimized by itself.

    Claim: one of the two most effective of five transformations, the best of which undoes 60 % of
    strong gray-box and 90 % of strong black-box attacks on ImageNet (Guo et al., abstract).
    Known break: BPDA with the identity leaves 0 % at a normalized L2 distance of 0.05 (Athalye et
    al. 2018, as in their notebook; their README's table has 0.005).

    Backward rules:
        `exact`, the default: autograd through the iterations; what a draw dropped has no gradient,
        so use it with EOT. `identity`: the published break's, and by far the cheaper one.

    Args:
        preset: `"guo"` (default): the paper, with its code's settings; its coarse `tol` stops some
            20 % above the least energy. `"qiu"`: S1's code (its 2/0.03 is `weight` 0.015), with
            one mask for all channels.
        keep: Probability that a value is observed, in (0, 1]; the paper drops half.
        weight: Of the total variation.
        isotropic: TV as the sum of the gradient's lengths, otherwise of |horizontal| + |vertical|
            differences.
        shared: Drop pixels with all their channels, not each value by itself.
        steps: Most Bregman iterations.
        sweeps: Gauss–Seidel sweeps per iteration.
        tol: An image is done when an iteration changes it by at most this much (rms).

    Convention:
        Forward differences, none across the border. The penalty of the splitting is 2/weight, as
        in scikit-image. Unobserved values start at the channel's observed mean, so that nothing of
        what was dropped can be seen. Any size, any number of channels.

    Raises:
        RangeError: If `keep` is not in (0, 1], `weight` not above 0, `tol` negative, or `steps` or
            `sweeps` below 1.

    Cost: About 20 + 7·sweeps passes over the image per iteration: on a photograph a third to a half
        (`"guo"`) or four fifths (`"qiu"`) of a ResNet-50 forward pass, on a CPU. A view's `exact`
        backward pass takes four to six times the forward pass.

    Example:
        >>> import torch
        >>> x = torch.rand(2, 3, 16, 16)
        >>> TV()(x).shape
        torch.Size([2, 3, 16, 16])

    References:
        Guo, Rana, Cissé, van der Maaten, "Countering adversarial images using input
        transformations", ICLR 2018, §3.1; original code, `tvm.py`. Goldstein, Osher, "The split
        Bregman method for L1-regularized problems", SIAM J. Imaging Sciences 2009. Qiu et al.,
        arXiv:2005.13712, Table I; original code, `defense.py`.

    Deviations:
        Sweeps visit the pixels in checkerboard order, not row by row: a batch axis can do it, and
        the minimum is the same. The border is free; scikit-image, on whose solver both originals
        build, ties the outermost pixels to fixed copies of the noisy image. Guo's code takes a
        black value that it drops for an observed one; here it is dropped.
    """

    differentiable: ClassVar[bool] = True
    stochastic: ClassVar[bool] = True

    def __init__(
        self,
        *,
        preset: str | None = "guo",
        keep: float = 0.5,
        weight: float = 0.03,
        isotropic: bool = True,
        shared: bool = False,
        steps: int = 100,
        sweeps: int = 10,
        tol: float = 0.01,
    ) -> None:
        super().__init__()
        if not 0 < keep <= 1:
            raise RangeError(f"keep is {keep}; expected a share in (0, 1]")
        if not 0 < weight < float("inf"):
            raise RangeError(f"weight is {weight}; expected a finite number above 0")
        if not tol >= 0:
            raise RangeError(f"tol is {tol}; expected a change in image units, at least 0")
        for name, value in (("steps", steps), ("sweeps", sweeps)):
            if type(value) is not int or value < 1:
                raise RangeError(f"{name} is {value!r}; expected a whole number ≥ 1")
        self.keep, self.weight, self.tol = float(keep), float(weight), float(tol)
        self.isotropic, self.shared = bool(isotropic), bool(shared)
        self.steps, self.sweeps = steps, sweeps
        self.stochastic = keep < 1  # type: ignore[misc]

    def draw(self, keys: Tensor, shape: torch.Size) -> Params:
        """`mask`: what is observed, bool, (B, C or 1, H, W)."""
        c = 1 if self.shared else shape[1]
        return {"mask": random.uniform(keys, (c, *shape[2:])) < self.keep}

    def transform(self, x: Tensor, params: Params) -> Tensor:
        """The minimum, as far as the iterations get."""
        if x.numel() == 0:
            return x.clone()
        mask = params["mask"].expand_as(x) if self.stochastic else torch.ones_like(x)
        minimise = partial(
            tv_minimise,
            weight=self.weight,
            isotropic=self.isotropic,
            steps=self.steps,
            sweeps=self.sweeps,
            tol=self.tol,
        )
        y = in_pieces(minimise, x, mask.to(x.dtype))
        # The minimum lies between the observed extremes; what is beyond is the iteration's error.
        return y + (y.detach().clamp(0, 1) - y.detach())

    @backward_rule("identity")
    def identity(self, x: Tensor, params: Params) -> Tensor:
        """The image itself."""
        return x


def tv_energy(z: Tensor, x: Tensor, mask: Tensor, *, weight: float, isotropic: bool) -> Tensor:
    """What `tv_minimise` makes small, per sample: (B,).

    Args:
        z: Where, (B, C, H, W).
        x: Image, (B, C, H, W).
        mask: 1 where it is observed, else 0, (B, C, H, W).
        weight: Of the total variation.
        isotropic: Which total variation.
    """
    across, down = _differences(z)
    size = (across**2 + down**2).sqrt() if isotropic else across.abs() + down.abs()
    return ((mask * (z - x) ** 2) / 2 + weight * size).flatten(1).sum(1)


def tv_minimise(
    x: Tensor,
    mask: Tensor,
    *,
    weight: float,
    isotropic: bool,
    steps: int = 100,
    sweeps: int = 1,
    tol: float = 1e-3,
) -> Tensor:
    """The image of least `tv_energy`, by split Bregman iterations; differentiable in `x`.

    Args:
        x: Images, (B, C, H, W).
        mask: 1 where it is observed, else 0, in the dtype of `x`, (B, C, H, W).
        weight: See `TV`.
        isotropic: See `TV`.
        steps: See `TV`.
        sweeps: See `TV`.
        tol: See `TV`; done samples leave the batch.

    Returns:
        Like `x`; each sample's result hangs on nothing but itself.

    Cost: See `TV`. With gradient each iteration's input is kept and its inside computed again.
    """
    height, width = x.shape[-2:]
    known = mask.sum((-2, -1), keepdim=True)
    mean = (mask * x).sum((-2, -1), keepdim=True) / known.clamp_min(1)
    z = torch.where(mask > 0, x, torch.where(known > 0, mean, 0.5))
    if height * width == 1:  # no differences
        return z
    pull = mask / 2
    inverse = 1 / (pull + _around(torch.ones_like(x[:1, :1])))

    def step(
        z: Tensor, across: Tensor, down: Tensor, pulled: Tensor, inverse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One iteration, everything divided by the splitting's penalty, 2/weight.

        `across` and `down` are s = ∇z + b before the last shrinkage. After it the Bregman variable
        b is s cut to the ball of radius weight/2, and the split gradient d is the rest, s − b.
        """
        bx, by = _cut(across, down, weight / 2, isotropic)
        right = _transposed(across.sub(bx, alpha=2), down.sub(by, alpha=2)).add_(pulled)
        z = _swept(z, right, inverse, sweeps)
        bx[..., :-1] += z[..., 1:] - z[..., :-1]
        by[..., :-1, :] += z[..., 1:, :] - z[..., :-1, :]
        return z, bx, by

    learn = torch.is_grad_enabled() and x.requires_grad
    state = (z, torch.zeros_like(x), torch.zeros_like(x))
    pulled = pull * x
    index = torch.arange(len(x), device=x.device)
    done: list[tuple[Tensor, Tensor]] = []
    for number in range(steps):
        before = state[0].detach()
        if learn:
            state = checkpoint(
                step, *state, pulled, inverse, use_reentrant=False, preserve_rng_state=False
            )
        else:
            state = step(*state, pulled, inverse)
        if number == steps - 1:
            break
        change = (state[0].detach() - before).square().mean((1, 2, 3)).sqrt()
        still = change > tol
        if not bool(still.all()):
            done.append((index[~still], state[0][~still]))
            if not bool(still.any()):
                index = index[still]
                break
            index, pulled, inverse = index[still], pulled[still], inverse[still]
            state = (state[0][still], state[1][still], state[2][still])
    if len(index):
        done.append((index, state[0]))
    order = torch.cat([places for places, _ in done]).argsort()
    return torch.cat([images for _, images in done])[order]


def _differences(z: Tensor) -> tuple[Tensor, Tensor]:
    """Forward differences across and down, zero at the last column and row."""
    across = nn.functional.pad(z[..., 1:] - z[..., :-1], (0, 1))
    down = nn.functional.pad(z[..., 1:, :] - z[..., :-1, :], (0, 0, 0, 1))
    return across, down


def _transposed(across: Tensor, down: Tensor) -> Tensor:
    """The transpose of `_differences`; the last column and row of its arguments do not count."""
    out = nn.functional.pad(across[..., :-1], (1, 0))
    out[..., :-1] -= across[..., :-1]
    out[..., 1:, :] += down[..., :-1, :]
    out[..., :-1, :] -= down[..., :-1, :]
    return out


def _swept(z: Tensor, right: Tensor, inverse: Tensor, sweeps: int) -> Tensor:
    """Gauss–Seidel: each pixel becomes (right + the sum of its neighbors)·inverse, red, then black.

    Pixels of one color have no neighbors of it. So the image is taken apart into the four corners
    of its 2×2 squares, two of each color, and whole corners are computed at once from those of the
    other color, half of the image at a time. Odd sides get a last line of zeros that stays zero.
    """
    height, width = z.shape[-2:]
    z, right, inverse = (_even(t) for t in (z, right, inverse))
    at = [[z[..., i::2, j::2] for j in (0, 1)] for i in (0, 1)]
    wanted = [[right[..., i::2, j::2] for j in (0, 1)] for i in (0, 1)]
    factor = [[inverse[..., i::2, j::2] for j in (0, 1)] for i in (0, 1)]
    for _ in range(sweeps):
        for i, j in ((0, 0), (1, 1), (0, 1), (1, 0)):
            # The corner itself, and what lies one square before or behind it.
            lines, columns = at[1 - i][j], at[i][1 - j]
            total = lines.clone(memory_format=torch.contiguous_format)
            if i == 0:
                total[..., 1:, :] += lines[..., :-1, :]
            else:
                total[..., :-1, :] += lines[..., 1:, :]
            if j == 0:
                total[..., 1:] += columns[..., :-1]
            total += columns
            if j == 1:
                total[..., :-1] += columns[..., 1:]
            total += wanted[i][j]
            total *= factor[i][j]
            at[i][j] = total
    whole = torch.stack([torch.stack(row, -1) for row in at], -3)
    return whole.reshape(*whole.shape[:2], right.shape[-2], right.shape[-1])[..., :height, :width]


def _even(z: Tensor) -> Tensor:
    """With a last row or column of zeros where a side is odd."""
    odd = z.shape[-1] % 2, z.shape[-2] % 2
    return nn.functional.pad(z, (0, odd[0], 0, odd[1])) if any(odd) else z


def _around(z: Tensor) -> Tensor:
    """The sum of each pixel's four neighbors, zero beyond the border."""
    wide = nn.functional.pad(z, (1, 1, 1, 1))
    rows, columns = wide[..., 1:-1], wide[..., 1:-1, :]
    return rows[..., :-2, :] + rows[..., 2:, :] + columns[..., :-2] + columns[..., 2:]


def _cut(across: Tensor, down: Tensor, reach: float, isotropic: bool) -> tuple[Tensor, Tensor]:
    """Both to [−reach, reach], or as a vector to that length."""
    if not isotropic:
        return across.clamp(-reach, reach), down.clamp(-reach, reach)
    square = across**2 + down**2
    outside = square > reach**2
    scale = torch.where(outside, reach / torch.where(outside, square, 1.0).sqrt(), 1.0)
    return across * scale, down * scale
