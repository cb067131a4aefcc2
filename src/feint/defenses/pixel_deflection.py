"""Pixel Deflection: overwrite random pixels by random neighbors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.errors import ConfigError, RangeError, ShapeError
from feint.core.pieces import fresh_like
from feint.core.registry import defense
from feint.defenses.activation import ActivationMap, Variant
from feint.defenses.base import Defense, Params, backward_rule

__all__ = ["PixelDeflection", "resolve_moves"]

Count = Literal["move", "triple", "attempt"]
Edges = Literal["open", "randint", "square"]

_MAPS: dict[str, Variant] = {"rcam": "paper", "rcam_repo": "repo"}
"""Maps of the classifier itself, by the name that people type."""
_NEVER = 1 << 40
"""Number of an attempt that does not come: larger than any count."""

_PRESETS: dict[str, dict[str, object]] = {
    "repo": {"deflections": 200, "count": "move", "edges": "open", "together": False},
    "paper": {"deflections": 100, "count": "attempt", "edges": "square", "together": True},
    "ace": {"deflections": 100, "count": "move", "edges": "randint", "together": False},
    "qiu": {"deflections": 600, "count": "triple", "edges": "open", "together": False},
}


@defense("pixel_deflection", paper="Prakash et al. 2018, CVPR, arXiv 1801.08926", presets=_PRESETS)
class PixelDeflection(Defense):
    """Pixel Deflection without its denoiser: chain it as `pixel_deflection + wavelet`.

    Again and again a place (r, c) is drawn uniformly and its value overwritten by the one at
    (r + a, c + b) from the square window around it; with an activation map the move is made only
    if U(0, 1) reaches the map's value there, so that what the classifier looks at is mostly
    spared. Moves are made in place and in sequence: a later move reads what an earlier one wrote.

    Claim: with an activation map and the wavelet denoiser, 81 to 98 % accuracy on adversarial
    examples made without it (S2, Table 1). Known break: Athalye and Carlini 2018, BPDA with the
    identity: 0 % accuracy, 97 % target hits at linf 4/255.

    Backward rules:
        `exact` (for one draw the defense is a gather, so autograd gives its true gradient; with a
        map computed from `x`, the piecewise constant choice of places contributes none) is the
        best one; `identity` is the published break's. Use either with EOT.

    Args:
        preset: `"repo"` (default: the only complete description) 200 moves, each on one channel;
            `"paper"` 100 attempts on whole pixels, the whole window usable; `"ace"` the copy in
            S0's code, 100 moves; `"qiu"` the copy in S1's, 600 triples, hence 1800 moves.
        deflections: K.
        window: Half side of the window, in pixels.
        count: What K counts. `"move"`: moves made; K is looked at only after a whole turn over the
            channels, so up to two more may happen. `"triple"`: turns, each an attempt per channel.
            `"attempt"`: attempts, whether the map rejects them or not.
        edges: `"open"`: the source lies in rows and columns 1 … n−1, so the first ones are never
            read. `"randint"`: moreover offsets end at window − 1 and the last row and column are
            never overwritten (an exclusive upper end in S0's code). `"square"`: the source is any
            pixel of the window that lies in the image.
        together: Move all channels of a pixel at once, not one channel at its own place.
        activation_map: Where not to deflect, in [0, 1]: a tensor (H, W) or (B or 1, 1, H, W), or
            a function from images to such a tensor, called without gradient. None: everywhere.
            `"rcam"`: the robust activation map of the classifier behind the defense, which a
            `Pipeline` makes known (`bind`); `"rcam_repo"`: with the original generator's weights.
            See `feint.defenses.activation.ActivationMap`.

    Convention:
        Any number of channels; a "triple" is one attempt per channel. A map made by a function or
        by the classifier is computed anew for every image that comes, in the attacker's view too:
        there it follows the adversarial image, and no gradient flows through it (the places hang on
        it in steps). An attacker who would rather freeze the clean image's map passes it as a
        tensor. With `"rcam"` a place may change with the last bit of a convolution.

    Raises:
        RangeError: If `deflections` < 0, the window is too small or the map leaves [0, 1].
        ConfigError: If `count`, `edges` or the map's name is unknown; if a classifier's map is
            wanted and there is no classifier, or one without a convolution.
        ShapeError: If a side is shorter than 2 pixels or the map does not fit.

    Cost: O(K log K) on index vectors, then one copy of the image with K values replaced: in batches
        of 64 at 224 or 299 px 0.3 to 0.4 % of the time of a ResNet-50 forward pass on the same
        images, 600 triples about 1 %. On two threads that is 22 times as fast as a loop over 200
        moves at 32 px, but 9 and 7 times at 224 and 299 px, where checking and copying the images
        alone would be 10 times as fast as the loop; 23 to 42 times as fast as one over 600 triples
        (`benchmarks/results/defenses.md`). One image of 32 px has 12 %, with 600 triples, whose
        number does not shrink with the image, 19 %. `"rcam"` adds a forward pass of the classifier
        for every image and draw.

    Example:
        >>> import torch
        >>> from feint.core import random
        >>> x = torch.rand(2, 3, 32, 32)
        >>> y = PixelDeflection(deflections=30)(x, keys=random.keys(0, 2))
        >>> int((x != y).sum()) <= 60
        True

    References:
        Prakash, Moran, Garber, DiLillo, Storer, "Deflecting adversarial attacks with pixel
        deflection", CVPR 2018, arXiv 1801.08926, §5 and §8; original code, `methods.py`.
        Athalye, Carlini, "On the robustness of the CVPR 2018 white-box adversarial example
        defenses", arXiv 1804.03286.

    Deviations:
        No preset has a map: the original's came from files, its copies in S0's and S1's code and
        the published break use none. Offsets are drawn uniformly from the valid ones, which is
        what the original's redrawing until valid amounts to. Rejected attempts are not drawn one
        by one: the gaps between accepted ones are geometric and their places follow 1 − map, which
        is the same distribution. Where the map is 1 everywhere nothing is moved; the original
        never returns.
    """

    differentiable: ClassVar[bool] = True
    stochastic: ClassVar[bool] = True

    activation_map: Tensor | None
    map_of: Callable[[Tensor], Tensor] | None

    def __init__(
        self,
        *,
        preset: str | None = "repo",
        deflections: int = 200,
        window: int = 10,
        count: Count = "move",
        edges: Edges = "open",
        together: bool = False,
        activation_map: Tensor
        | Callable[[Tensor], Tensor]
        | Literal["rcam", "rcam_repo"]
        | None = None,
    ) -> None:
        super().__init__()
        if deflections < 0:
            raise RangeError(f"deflections is {deflections}; expected K ≥ 0")
        if count not in ("move", "triple", "attempt"):
            raise ConfigError(f"count is {count!r}; expected 'move', 'triple' or 'attempt'")
        if edges not in ("open", "randint", "square"):
            raise ConfigError(f"edges is {edges!r}; expected 'open', 'randint' or 'square'")
        if window < (2 if edges == "randint" else 1):
            raise RangeError(
                f"window is {window}; expected at least {2 if edges == 'randint' else 1} pixels "
                f"for edges={edges!r}, or the first row would have no source"
            )
        self.stochastic = deflections > 0  # type: ignore[misc]
        self.deflections, self.window = deflections, window
        self.count, self.edges, self.together = count, edges, together
        self.map_name = activation_map if isinstance(activation_map, str) else None
        if self.map_name is not None and self.map_name not in _MAPS:
            raise ConfigError(
                f"activation_map is {activation_map!r}; expected {' or '.join(map(repr, _MAPS))}, "
                "a tensor, a function, or None"
            )
        self.map_of = None if isinstance(activation_map, (Tensor, str)) else activation_map
        fixed = activation_map if isinstance(activation_map, Tensor) else None
        if fixed is not None and fixed.ndim == 2:
            fixed = fixed[None, None]
        self.register_buffer("activation_map", fixed)

    def bind(self, model: nn.Module) -> Defense:
        """With the map of this classifier, if one is wanted."""
        if self.map_name is None:
            return self
        bound = copy.copy(self)
        bound._buffers = dict(self._buffers)
        bound.map_of = ActivationMap(model, variant=_MAPS[self.map_name])
        return bound

    def _turn(self, channels: int) -> int:
        """Attempts in one turn over the channels."""
        return 1 if self.together else channels

    def draw(self, keys: Tensor, shape: torch.Size) -> Params:
        """Four uniform float64 numbers per move, each (B, M): `gap`, `place`, `row`, `column`."""
        turn = self._turn(shape[1])
        moves = self.deflections * (turn if self.count == "triple" else 1)
        if self.count == "move" and moves:
            moves += turn - 1  # the turn in which the K-th move happens is finished
        u = random.uniform(keys, (4, moves), dtype=torch.float64)
        return dict(zip(("gap", "place", "row", "column"), u.unbind(1), strict=True))

    def transform(self, x: Tensor, params: Params) -> Tensor:
        """All moves, resolved to one gather and one scatter."""
        if min(x.shape[-2:]) < 2:
            raise ShapeError(f"x has shape {tuple(x.shape)}; expected sides of at least 2 pixels")
        if not (self.deflections and len(x)):
            return x
        c, height, width = x.shape[1:]
        # np.random.randint never gives the last row and column
        rows, columns = (height - 1, width - 1) if self.edges == "randint" else (height, width)
        keep = self._keep(x)
        if keep is None:
            place = (params["place"] * (rows * columns)).long()
            turn = torch.arange(place.shape[1], device=x.device).expand_as(place)
        else:
            share = keep[:, 0, :rows, :columns].flatten(1)
            cumulative = share.cumsum(1)
            wanted = params["place"] * cumulative[:, -1:]
            place = torch.searchsorted(cumulative, wanted, right=True).clamp(max=rows * columns - 1)
            turn = _attempts(params["gap"], share.mean(1, keepdim=True))
        row, column = place // columns, place % columns
        target = row * width + column
        source = self._source(row, params["row"], height) * width
        source = source + self._source(column, params["column"], width)
        made = self._made(turn, self._turn(c))
        source = torch.where(made, source, target)  # a move onto itself changes nothing
        channel = torch.arange(c, device=x.device)[:, None] if self.together else None
        if channel is None:
            offset = (turn % c) * (height * width)
            return _apply(x, target + offset, source + offset)
        wide = target[:, None], source[:, None]
        target, source = ((v + channel * (height * width)).flatten(1) for v in wide)
        return _apply(x, target, source)

    def _keep(self, x: Tensor) -> Tensor | None:
        """The chance that an attempt at each place is accepted: 1 − map, (B, 1, H, W) float64."""
        given = self.activation_map
        if self.map_name is not None and self.map_of is None:
            raise ConfigError(
                f"activation_map={self.map_name!r} needs a classifier; put the defense into a "
                "Pipeline, or call bind(model)"
            )
        if self.map_of is not None:
            with torch.no_grad():
                given = self.map_of(x.detach())
        if given is None:
            return None
        if (
            given.ndim != 4
            or given.shape[0] not in (1, len(x))
            or given.shape[1:]
            != (
                1,
                *x.shape[-2:],
            )
        ):
            raise ShapeError(
                f"activation_map has shape {tuple(given.shape)}; "
                f"expected ({len(x)} or 1, 1, {x.shape[-2]}, {x.shape[-1]})"
            )
        low, high = (float(v) for v in torch.aminmax(given.detach()))
        if not (low >= 0 and high <= 1):
            raise RangeError(
                f"activation_map has values in [{low:.6g}, {high:.6g}]; expected [0, 1]; "
                "divide it by its maximum"
            )
        return 1 - given.detach().to(x.device, torch.float64).expand(len(x), -1, -1, -1)

    def _made(self, turn: Tensor, per_turn: int) -> Tensor:
        """Which of the accepted attempts happen before the loop ends; bool, like `turn`."""
        if self.count == "move":
            kth = turn[:, self.deflections - 1, None]
            return (turn // per_turn <= kth // per_turn) & (turn < _NEVER)
        return turn < self.deflections * (per_turn if self.count == "triple" else 1)

    def _source(self, place: Tensor, u: Tensor, n: int) -> Tensor:
        """A uniform valid source coordinate for each place on an axis of n pixels."""
        low = (place - self.window).clamp(min=0 if self.edges == "square" else 1)
        reach = self.window - (self.edges == "randint")
        high = (place + reach).clamp(max=n - 1)
        return low + (u * (high - low + 1)).long()

    @backward_rule("identity")
    def identity(self, x: Tensor, params: Params) -> Tensor:
        """The image itself (Athalye and Carlini's BPDA)."""
        return x


def _attempts(u: Tensor, accept: Tensor) -> Tensor:
    """Number of the attempt that makes each move, from 0, if one is accepted with chance `accept`.

    The gaps between accepted attempts are geometric; an impossible one is put beyond any count.
    """
    gap = torch.log1p(-u) / torch.log1p(-accept)
    gap = torch.where(accept > 0, gap, math.inf).floor().clamp(max=_NEVER).long()
    return (gap + 1).cumsum(1) - 1


def resolve_moves(target: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """What sequential moves `v[target[m]] = v[source[m]]`, m = 0 … M−1, amount to at the end.

    Each move reads the original vector or what the last earlier move onto its source wrote. These
    links form chains, followed in at most ⌈log₂ M⌉ rounds of pointer doubling.

    Args:
        target: int64, (B, M).
        source: int64, (B, M).

    Returns:
        `origin` (B, M), index into the original vector of the value that finally stands at
        `target[m]` (the same for all moves onto one target), and `last` (B, M), bool: no later
        move has the same target.

    Example:
        >>> resolve_moves(torch.tensor([[1, 2, 1]]), torch.tensor([[0, 1, 3]]))
        (tensor([[3, 0, 3]]), tensor([[False,  True,  True]]))
    """
    batch, moves = target.shape
    number = torch.arange(moves, device=target.device)
    bits = (moves - 1).bit_length()
    mask = (1 << bits) - 1
    # Reads and writes of all moves in one number each: place, time, and 1 for a write. In order,
    # a read comes before the write of its own move.
    reads, writes = (((v << bits) | number) << 1 for v in (source, target))
    events = _sorted(torch.cat([reads, writes + 1], 1))
    written = (events & 1).bool()
    latest = _running_maximum(torch.where(written, events, -1))[~written].view(batch, moves)
    events_read = events[~written].view(batch, moves)
    time = (events_read >> 1) & mask
    linked = latest >> (bits + 1) == events_read >> (bits + 1)
    pointer = torch.empty_like(target).scatter_(
        1, time, torch.where(linked, (latest >> 1) & mask, time)
    )
    for _ in range(bits):
        further = pointer.gather(1, pointer)
        if target.device.type == "cpu" and torch.equal(further, pointer):
            break  # chains are short; elsewhere to ask costs more than to go on
        pointer = further
    origin = source.gather(1, pointer)
    order = events[written].view(batch, moves) >> 1
    place, time = order >> bits, order & mask
    final = torch.ones_like(place, dtype=torch.bool)  # the last one onto its place
    final[:, :-1] = place[:, 1:] != place[:, :-1]
    # Each one's final move is the nearest final one from it on.
    nearest = -_running_maximum(torch.where(final, -number, -moves).flip(1)).flip(1)
    winner = torch.empty_like(target).scatter_(1, time, time.gather(1, nearest))
    return origin.gather(1, winner), winner == number


def _sorted(v: Tensor) -> Tensor:
    """Rows in order; numpy's sort of integers is some ten times as fast as torch's."""
    if v.device.type == "cpu":
        return torch.from_numpy(np.sort(v.numpy(), axis=1))
    return v.sort(1).values


def _running_maximum(v: Tensor) -> Tensor:
    if v.device.type == "cpu":
        return torch.from_numpy(np.maximum.accumulate(v.numpy(), axis=1))
    return v.cummax(1).values


def _apply(x: Tensor, target: Tensor, source: Tensor) -> Tensor:
    """The moves on flattened images; the gradient passes through the last move onto each target."""
    origin, last = resolve_moves(target, source)
    flat = x.flatten(1)
    value = flat.gather(1, origin)
    if value.requires_grad:
        value = torch.where(last, value, value.detach())
        return flat.scatter(1, target, value).view_as(x)
    return fresh_like(flat).copy_(flat).scatter_(1, target, value).view_as(x)
