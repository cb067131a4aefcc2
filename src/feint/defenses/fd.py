"""Feature Distillation (FD): quantise the 8×8 DCT of each color channel."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from feint.core.dct import block_dct, block_idct, round_stable_, soft_round
from feint.core.errors import ConfigError, RangeError
from feint.core.pieces import in_pieces
from feint.core.registry import defense
from feint.defenses.base import Defense, Params, backward_rule

__all__ = ["FD", "shift_map"]

_BLOCK = 8
_FLOOR = 0.05
"""Slope of the surrogate's rounding at the integers, where the cubic's is 0."""

_PRESETS: dict[str, dict[str, object]] = {
    "repo": {"align": "repo", "step": 30.0, "low_step": 25.0},
    "paper": {"align": "exact", "step": 30.0, "low_step": 25.0},
}


@defense("fd", paper="Liu et al. 2019, CVPR; as used by Qiu et al. 2020, §V-B", presets=_PRESETS)
class FD(Defense):
    """Feature Distillation: DCT, quantise, inverse DCT, as Qiu et al. run it.

    Each of the R, G and B channels is scaled to 0…255, padded by reflection to a multiple of 8,
    cut into 8×8 blocks, transformed, rounded to multiples of a step (25 for the sixteen lowest
    frequencies, DC included; 30 for the rest), transformed back, scaled and clipped to [0, 1].
    There is no YCbCr, no level shift by 128, no chroma subsampling, and the result stays float.

    The padding is split before and after (for a side n: p = −n mod 8, ⌊p/2⌋ before). The original
    code then crops from the corner of the *padded* image, so it also moves the content by ⌊p/2⌋
    pixels down and right: 2 px at 299. That move, not the DCT, makes nearly all of its distance
    from the input (bare shift by (2, 2): rms 0.1035; `align="exact"`: 0.019) and mis-registers the
    identity backward pass. A side that is a multiple of 8 (32, 224) is neither padded nor moved:
    there the two alignments are the same.

    Claim: BPDA with the identity leaves 45 % accuracy and 17 % target hits after 50 rounds
    (S1 Fig. 3). Known break: the same attack with the shift undone in the backward pass (rule
    `aligned`) hits every target; so does the identity on `align="exact"`.

    Backward rules:
        `surrogate`: the whole codec with cubic rounding (Shin & Song), its slope raised by 0.05
        so that it vanishes nowhere, clipping ignored. The best one, and the default: six sign
        steps within linf 1/255 on a ResNet-50 end at a cross-entropy of 14.5, with `aligned` at
        9.1, with `identity` at 2.0 (0.22 before; 11 natural images).
        `aligned`: the adjoint of the shift with reflected border, FD without its DCT; what it
        gains over the identity is the part of FD's resistance that was the shift.
        `identity`: S1's own.

    Args:
        preset: `"repo"` (default: the published numbers are its) is the original code with its
            shift; `"paper"` is the text, which knows of no shift.
        passes: How many times in a row; with `align="repo"` each pass shifts again.
        align: `"repo"` crops from (0, 0) of the padded image, `"exact"` from the image's place.
        step: Quantisation step for all other frequencies, in 0…255 units.
        low_step: Step for the 4×4 lowest frequencies.

    Convention:
        Float RGB, [0, 1], any number of channels and any size ≥ 1 in and out. Rounding is half to
        even. The DCT is computed in float64, whatever the dtype of the images.

    Raises:
        RangeError: If `passes` < 1 or a step is not positive.
        ConfigError: If `align` is unknown.

    Cost: Per pass 64 float64 multiply–adds per value: in batches of 64 at 224 or 299 px 2 to 3 % of
        the time of a ResNet-50 forward pass on the same images, one twenty-third to one
        twenty-fifth of a loop over blocks (CPU time, `benchmarks/results/defenses.md`). `surrogate`
        runs the codec forward and backward once more.

    Example:
        >>> import torch
        >>> FD()(torch.rand(2, 3, 37, 37)).shape
        torch.Size([2, 3, 37, 37])

    References:
        Liu, Liu, Liu, Xu, Lin, Wang, Wen, "Feature distillation: DNN-oriented JPEG compression
        against adversarial examples", CVPR 2019. Qiu, Zeng, Zheng, Gong, Zhang, Qiu,
        "Mitigating advanced adversarial attacks with more advanced gradient obfuscation
        techniques", arXiv 2005.13712, §V-B2; original code, `defense.py`.

    Deviations:
        Coefficients within 5·10⁻⁷ of a half are rounded to even; in the original the last bits of
        the DCT decide there (about one 8×8 block in a hundred of an 8-bit image is concerned).
        The reflection is periodic, so sides shorter than the padding work too.
    """

    differentiable: ClassVar[bool] = False
    stochastic: ClassVar[bool] = False
    best_rule: ClassVar[str | None] = "surrogate"

    def __init__(
        self,
        *,
        preset: str | None = "repo",
        passes: int = 1,
        align: Literal["repo", "exact"] = "repo",
        step: float = 30.0,
        low_step: float = 25.0,
    ) -> None:
        super().__init__()
        if passes < 1:
            raise RangeError(f"passes is {passes}; expected at least 1")
        if not (step > 0 and low_step > 0):
            raise RangeError(f"step is {step}, low_step {low_step}; expected positive, in 0…255")
        if align not in ("repo", "exact"):
            raise ConfigError(f"align is {align!r}; expected 'repo' or 'exact'")
        self.passes, self.align = passes, align
        self.step, self.low_step = float(step), float(low_step)

    def transform(self, x: Tensor, params: Params) -> Tensor:
        """`passes` times: pad, DCT, quantise, inverse DCT, clip, crop."""
        return in_pieces(lambda z: self._passes(z, soft=False), x)

    def table(self, device: torch.device | None = None) -> Tensor:
        """The 8×8 quantisation steps, lowest frequency first, float64."""
        table = torch.full((_BLOCK, _BLOCK), self.step, dtype=torch.float64, device=device)
        table[:4, :4] = self.low_step
        return table

    @backward_rule("aligned")
    def shift(self, x: Tensor, params: Params) -> Tensor:
        """The shift alone, borders reflected; the image itself where there is none."""
        rows, columns = (
            shift_map(n, self.passes if self.align == "repo" else 0, x.device) for n in x.shape[-2:]
        )
        return x[..., rows, :][..., columns]

    @backward_rule("identity")
    def identity(self, x: Tensor, params: Params) -> Tensor:
        """The image itself, shift and all ignored (S1's BPDA)."""
        return x

    @backward_rule("surrogate")
    def surrogate(self, x: Tensor, params: Params) -> Tensor:
        """The codec with cubic rounding."""
        return in_pieces(lambda z: self._passes(z, soft=True), x)

    def _passes(self, x: Tensor, soft: bool) -> Tensor:
        for _ in range(self.passes):
            x = self._codec(x, soft)
        return x

    def _codec(self, x: Tensor, soft: bool) -> Tensor:
        height, width = x.shape[-2:]
        padded = _pad(x * 255)
        table = self.table(x.device).repeat(padded.shape[-2] // _BLOCK, padded.shape[-1] // _BLOCK)
        levels = block_dct(padded.double()).div_(table)
        levels = soft_round(levels, _FLOOR) if soft else round_stable_(levels)
        y = block_idct(levels.mul_(table)).div_(255)
        y = (y + (y.clamp(0, 1) - y).detach() if soft else y.clamp_(0, 1)).to(x.dtype)
        top, left = (0, 0) if self.align == "repo" else (_before(height), _before(width))
        return y[..., top : top + height, left : left + width]


def _before(n: int) -> int:
    """Pixels padded before a side of n, out of −n mod 8."""
    return (-n % _BLOCK) // 2


def _reflect(index: Tensor, n: int) -> Tensor:
    """Indices folded into [0, n) by reflection that does not repeat the border pixel."""
    period = max(2 * (n - 1), 1)
    index = index % period
    return torch.minimum(index, period - index) if n > 1 else index


def _pad(x: Tensor) -> Tensor:
    """`x` with both sides brought to a multiple of 8, reflected about the border pixels."""
    height, width = x.shape[-2:]
    if min(height, width) >= _BLOCK and len(x):  # the kernel wants padding < side, and a batch
        top, left = _before(height), _before(width)
        bottom, right = -height % _BLOCK - top, -width % _BLOCK - left
        return nn.functional.pad(x, (left, right, top, bottom), mode="reflect")
    rows, columns = (
        _reflect(torch.arange(n + -n % _BLOCK, device=x.device) - _before(n), n)
        for n in (height, width)
    )
    return x[..., rows, :][..., columns]


def shift_map(n: int, passes: int, device: torch.device | None = None) -> Tensor:
    """Where each pixel of a side comes from after `passes` passes with `align="repo"`: (n,) int64.

    Example:
        >>> shift_map(299, 1)[:4]
        tensor([2, 1, 0, 1])
    """
    once = _reflect(torch.arange(n, device=device) - _before(n), n)
    total = torch.arange(n, device=device)
    for _ in range(passes):
        total = total[once]
    return total
