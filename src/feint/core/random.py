"""Keyed randomness: every random number is a pure function of a key and a position.

A *key* is one 64-bit integer per sample. It depends on the experiment's seed and on the sample's
index in the data set, never on its place in a batch, so no draw changes with batch size, order,
compaction, number of workers or a restart. `fold` derives keys for a purpose, a step, a draw;
`uniform`, `normal`, `integers` and `permutation` turn keys into numbers.

The generator is Philox-4x32-10 in integer tensor arithmetic, so its words are bit-identical on
every device.

References:
    Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from feint.core.errors import DtypeError, RangeError, ShapeError

__all__ = ["entropy_keys", "fold", "integers", "keys", "normal", "permutation", "uniform", "words"]

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # round multipliers
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # Weyl key increments
_ROUNDS = 10
_LANES, _LANES_ELSEWHERE = 1 << 16, 1 << 22
"""Counters that are run at a time: on a CPU, what fits its caches."""
_FEW = 8
"""Counters up to which plain integers are faster."""


def _philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> list[Tensor]:
    """Philox-4x32-10 on broadcastable int64 tensors that hold 32-bit words.

    The two halves of a round run as one tensor: `a` holds (c0, c2) and `b` (c3, c1) before even
    rounds, the other way round before odd ones. Fewer and larger operations cost half as much.
    """
    shape = torch.broadcast_shapes(c0.shape, c1.shape, c2.shape, c3.shape, k0.shape)
    if c0.device.type == "cpu" and 0 < shape.numel() <= _FEW:
        return _philox_few([t.expand(shape) for t in (c0, c1, c2, c3, k0, k1)])
    a = torch.stack([c0.expand(shape), c2.expand(shape)])
    b = torch.stack([c3.expand(shape), c1.expand(shape)])
    factors, weyl = _constants(a.device, a.ndim)
    k0, k1 = (k.reshape(*[1] * (len(shape) - k.ndim), *k.shape) for k in (k0, k1))
    even, odd = torch.stack([k1, k0]) + weyl[0], torch.stack([k0, k1]) + weyl[1]
    for r in range(_ROUNDS):
        # The 64-bit products wrap, which leaves their bits right; what lies above 32 bits in the
        # keys and in `b` is cut off at last.
        p = a * factors[r % 2]
        a = p >> 32
        a ^= b
        a ^= (odd if r % 2 else even)[r // 2]
        a &= _MASK
        b = p.flip(0)
    b &= _MASK
    return [a[0], b[1], a[1], b[0]]


def _philox_few(words: list[Tensor]) -> list[Tensor]:
    """The same for a few counters: sixty tensor operations cost more than the numbers."""
    columns = []
    for c0, c1, c2, c3, k0, k1 in zip(*(t.flatten().tolist() for t in words), strict=True):
        for _ in range(_ROUNDS):
            p0, p1 = c0 * _M0, c2 * _M1
            c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
            k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
        columns.append((c0, c1, c2, c3))
    return list(torch.tensor(columns).T.reshape(4, *words[0].shape).unbind())


@lru_cache(maxsize=32)
def _constants(
    device: torch.device, ndim: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Factors of even and odd rounds, (2, 1, …); Weyl steps of both, (5, 2, 1, …)."""
    ones = [1] * (ndim - 1)
    with torch.inference_mode(False):
        factors = torch.tensor([_M0, _M1], device=device).view(2, *ones)
        rounds = torch.arange(_ROUNDS, device=device).view(-1, 1, *ones)
        steps = torch.tensor([_W1, _W0], device=device).view(2, *ones)
        weyl = rounds * steps
    return (factors, factors.flip(0)), (weyl[0::2], weyl[1::2].flip(1))


def _split(keys: Tensor) -> tuple[Tensor, Tensor]:
    if keys.dtype != torch.int64:
        raise DtypeError(f"keys have dtype {keys.dtype}; expected int64, as made by random.keys()")
    return keys & _MASK, (keys >> 32) & _MASK


def _join(low: Tensor, high: Tensor) -> Tensor:
    return (high << 32) | low  # the sign bit is just the 64th bit


def _purpose(purpose: str | int) -> int:
    """A stable 32-bit number for a purpose; strings are hashed, so no table has to be kept."""
    if isinstance(purpose, int):
        return purpose & _MASK
    return int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "little")


def keys(seed: int, index: Tensor | Sequence[int] | int) -> Tensor:
    """One key per sample, from the experiment's seed and the samples' indices.

    Args:
        seed: Any integer; its lowest 64 bits count.
        index: Indices of the samples in their data set, (B,), or B for `range(B)`.

    Returns:
        Keys, int64, (B,), on the device of `index`.

    Example:
        >>> keys(0, [0, 1]).shape
        torch.Size([2])
        >>> bool((keys(0, [7]) == keys(0, [3, 7])[1]).all())
        True
    """
    if isinstance(index, int):
        index = torch.arange(index)
    index = torch.as_tensor(index, dtype=torch.int64)
    root = torch.full_like(index, _signed(seed))
    return _derive(root, index & _MASK, (index >> 32) & _MASK, 0, 1)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def entropy_keys(count: int, device: torch.device | str | None = None) -> Tensor:
    """Keys from the operating system's entropy, for a defense deployed without keys: (count,)."""
    raw = (
        torch.frombuffer(bytearray(secrets.token_bytes(8 * count)), dtype=torch.int64)
        if count
        else torch.empty(0, dtype=torch.int64)
    )
    return raw.to(device) if device is not None else raw


def _derive(keys: Tensor, a: Tensor | int, b: Tensor | int, c: int, domain: int) -> Tensor:
    k0, k1 = _split(keys)
    c0, c1, c2, c3 = (
        v if isinstance(v, Tensor) else torch.full_like(keys, v & _MASK) for v in (a, b, c, domain)
    )
    w = _philox(c0, c1, c2, c3, k0, k1)
    return _join(w[0], w[1])


def fold(keys: Tensor, purpose: str | int, step: int = 0, draw: int | Tensor = 0) -> Tensor:
    """Keys for one purpose, step and draw, independent of those for any other.

    Args:
        keys: (B,) int64.
        purpose: What the numbers are for, such as `"start"` or `"judge"`.
        step: Iteration number.
        draw: Draw number, or a tensor (D,) of draw numbers.

    Returns:
        (B,) int64, or (B, D) when `draw` is a tensor.
    """
    base = _derive(keys, _purpose(purpose), step, 0, 2)
    if not isinstance(draw, Tensor):
        return _derive(base, draw, 0, 0, 3)
    draw = draw.to(keys.device, torch.int64)
    wide = base[:, None].expand(-1, len(draw)).contiguous()
    return _derive(wide, draw[None].expand_as(wide) & _MASK, 0, 0, 3)


def words(keys: Tensor, count: int) -> Tensor:
    """`count` random 32-bit words per key, as int64 in [0, 2^32).

    Args:
        keys: Any shape.
        count: How many words for each key.

    Returns:
        int64, (*keys.shape, count).
    """
    parts = [torch.stack(four, -1).flatten(-2) for four in _fours(keys, count)]
    return _first(parts, count)


def _fours(keys: Tensor, count: int) -> Iterator[list[Tensor]]:
    """`count` words or a few more, four by four: (*keys.shape, blocks) each.

    They come piece by piece, so that what one round writes the next one finds in the cache.
    """
    k0, k1 = _split(keys[..., None])
    lanes = _LANES if keys.device.type == "cpu" else _LANES_ELSEWHERE
    step = max(1, lanes // max(1, keys.numel()))
    for position in torch.arange(-(-count // 4), device=keys.device).split(step):
        zero = torch.zeros_like(position)
        yield _philox(position, zero, zero, zero + 4, k0, k1)


def _first(parts: list[Tensor], count: int) -> Tensor:
    """The first `count` of what lies in pieces along the last dimension."""
    return (parts[0] if len(parts) == 1 else torch.cat(parts, -1))[..., :count]


def _shaped(keys: Tensor, shape: Sequence[int], per_number: int = 1) -> Tensor:
    n = math.prod(shape)
    return words(keys, n * per_number)


def uniform(
    keys: Tensor,
    shape: Sequence[int] = (),
    low: float = 0.0,
    high: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform numbers in [low, high).

    Args:
        keys: (B,) int64 (or any shape).
        shape: Shape of one key's draw.
        low: Lower end, included.
        high: Upper end, excluded up to rounding.
        dtype: float32 (24 random bits) or float64 (53).

    Returns:
        (*keys.shape, *shape).

    Example:
        >>> u = uniform(keys(0, 4), (3,))
        >>> u.shape, bool(((u >= 0) & (u < 1)).all())
        (torch.Size([4, 3]), True)
    """
    if dtype == torch.float64:
        w = _shaped(keys, shape, 2).unflatten(-1, (-1, 2))
        u = ((w[..., 0] >> 5) * (1 << 26) + (w[..., 1] >> 6)).double() * 2.0**-53
    else:
        u = (_shaped(keys, shape) >> 8).to(dtype) * 2.0**-24
    u = u.reshape(*keys.shape, *shape)
    return u if (low, high) == (0.0, 1.0) else low + (high - low) * u


def normal(keys: Tensor, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers (Box–Muller in float64, then rounded): (*keys.shape, *shape)."""
    n = math.prod(shape)
    parts = []
    for w in _fours(keys, n):
        level, turn = (torch.stack(pair, -1).double() for pair in (w[0::2], w[1::2]))
        radius = level.add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
        angle = turn.mul_(2.0 * math.pi * 2.0**-32)
        pair = torch.stack([angle.cos().mul_(radius), angle.sin().mul_(radius)], -1)
        parts.append(pair.flatten(-3).to(dtype))
    return _first(parts, n).reshape(*keys.shape, *shape).contiguous()


def integers(keys: Tensor, low: int, high: int, shape: Sequence[int] = ()) -> Tensor:
    """Integers in [low, high), int64; the bias is below (high − low) / 2^32.

    Args:
        keys: (B,) int64 (or any shape).
        low: Lower end, included.
        high: Upper end, excluded.
        shape: Shape of one key's draw.

    Raises:
        RangeError: If the interval is empty or wider than 2^31.
    """
    if not 0 < high - low <= 1 << 31:
        raise RangeError(f"integers in [{low}, {high}): expected 1 to 2^31 values")
    drawn = (_shaped(keys, shape) * (high - low)) >> 32
    return low + drawn.reshape(*keys.shape, *shape)


def permutation(keys: Tensor, n: int) -> Tensor:
    """A random permutation of 0 … n−1 per key: int64, (*keys.shape, n)."""
    if n < 0:
        raise ShapeError(f"permutation of {n} elements; expected n ≥ 0")
    w = words(keys, 2 * n).unflatten(-1, (n, 2))
    rank = (w[..., 0] << 31) | (w[..., 1] >> 1)  # 63 random bits: ties do not happen
    return rank.argsort(dim=-1, stable=True)
