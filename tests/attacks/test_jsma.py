from __future__ import annotations

import subprocess
import sys
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from feint.attacks import jsma
from feint.attacks._pairs import best_pair, best_single
from feint.core import random
from feint.core.errors import RangeError
from feint.core.norms import distance
from tests.contracts.attack import AttackContract
from tests.contracts.attack_harness import HostSyncs
from tests.tiny import Counting, LinearModel, TinyConv, images, predicted


class TestJSMA(AttackContract):
    attack = staticmethod(jsma)
    kwargs: ClassVar = {"gamma": 1.0, "both": True}

    # It is greedy towards one class, so that it does not claim the least distance; see below.
    test_finds_the_least_distance_on_a_linear_model = None


# --- the pair search ------------------------------------------------------------------------------


def brute(a: np.ndarray, b: np.ndarray, allowed: np.ndarray) -> float:
    """All n² pairs at once: the largest product of positive sums, −∞ if there is none."""
    x, y = a[:, None] + a[None], b[:, None] + b[None]
    fits = (x > 0) & (y > 0) & allowed[:, None] & allowed[None] & ~np.eye(len(a), dtype=bool)
    return float(np.where(fits, x * y, -np.inf).max())


@given(
    n=st.integers(2, 30),
    rows=st.integers(1, 3),
    kind=st.sampled_from(["normal", "ties", "line", "equal"]),
    closed=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_the_best_pair_is_that_of_all_pairs(
    n: int, rows: int, kind: str, closed: float, seed: int
) -> None:
    # Oracle: brute force in numpy. Ties, and features on a falling line, of which none dominates
    # another, are the hard cases.
    keys = random.keys(seed, rows)
    a = random.normal(random.fold(keys, "a"), (n,), torch.float64)
    b = random.normal(random.fold(keys, "b"), (n,), torch.float64)
    if kind == "ties":
        a, b = a.round(), b.round()
    if kind == "line":
        b = 0.3 - a
    if kind == "equal":
        b = a
    allowed = random.uniform(random.fold(keys, "c"), (n,)) >= closed
    index, found = best_pair(a, b, allowed)
    for i in range(rows):
        expected = brute(a[i].numpy(), b[i].numpy(), allowed[i].numpy())
        assert bool(found[i]) is (expected > -np.inf)
        if bool(found[i]):
            p, q = index[i].tolist()
            assert p != q
            assert bool(allowed[i, p] & allowed[i, q])
            got = float((a[i, p] + a[i, q]) * (b[i, p] + b[i, q]))
            assert got == pytest.approx(expected, rel=1e-12)


def test_the_best_single_feature_is_that_of_all() -> None:
    # Oracle: brute force.
    keys = random.keys(0, 4)
    a, b = (random.normal(random.fold(keys, k), (50,), torch.float64) for k in "ab")
    allowed = random.uniform(random.fold(keys, "c"), (50,)) > 0.3
    index, found = best_single(a, b, allowed)
    for i in range(4):
        valid = (a[i] > 0) & (b[i] > 0) & allowed[i]
        assert int(index[i]) == int((a[i] * b[i]).masked_fill(~valid, -1).argmax())
    assert bool(found.all())
    assert not bool(best_single(-a.abs(), b, allowed)[1].any())


def test_tiny_gradients_do_not_underflow() -> None:
    # Oracle: the search does not hang on the scale: products of 1e-30 are zero in float32.
    keys = random.keys(1, 2)
    a, b = (random.normal(random.fold(keys, k), (40,)) for k in "ab")
    allowed = torch.ones(2, 40, dtype=torch.bool)
    index, found = best_pair(a * 2.0**-100, b * 2.0**-100, allowed)
    assert bool(found.all())
    assert torch.equal(index, best_pair(a, b, allowed)[0])


class Largest(TorchDispatchMode):
    """The most bytes that one operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return out


def test_memory_at_the_size_of_imagenet() -> None:
    # Oracle: count. 224×224×3 features and both signs; a matrix of all pairs would take 181 GB.
    n = 2 * 3 * 224 * 224
    keys = random.keys(0, 1)
    a, b = (random.normal(random.fold(keys, k), (n,)) for k in "ab")
    with Largest() as largest:
        index, found = best_pair(a, b, torch.ones(1, n, dtype=torch.bool))
    assert bool(found)
    assert largest.bytes <= 64 << 20
    # Neither of the two can be bettered alone (oracle: all partners of each).
    p, q = index[0].tolist()
    value = (a[0, p] + a[0, q]) * (b[0, p] + b[0, q])
    for own in (p, q):
        x, y = a[0] + a[0, own], b[0] + b[0, own]
        partner = torch.where((x > 0) & (y > 0), x * y, -torch.inf)
        partner[own] = -torch.inf
        assert float(partner.max()) <= float(value) * (1 + 1e-6)


def test_memory_where_no_feature_dominates_another() -> None:
    # Oracle: closed form. On a + b = 1 the sums of any pair add up to 2: the best product is 1, and
    # its pair is symmetric. The pairs are looked at in blocks.
    n = 4001
    a = torch.linspace(-3, 4, n, dtype=torch.float64)[None]
    with Largest() as largest:
        index, found = best_pair(a, 1 - a, torch.ones(1, n, dtype=torch.bool))
    assert bool(found)
    assert float(a[0, index[0]].sum()) == pytest.approx(1, abs=1e-9)
    assert largest.bytes <= 64 << 20


IMAGENET = """
import resource
import torch
from feint.attacks import jsma

torch.set_num_threads(1)
net = torch.nn.Sequential(
    torch.nn.Conv2d(3, 8, 7, 4), torch.nn.SiLU(), torch.nn.Conv2d(8, 16, 3, 2),
    torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 100),
).eval()
x = torch.linspace(0.3, 0.7, 3 * 224 * 224).view(1, 3, 224, 224)
y = net(x).argmax(1)
kibibytes = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = kibibytes()
jsma(net, x, y, gamma=10 / x.numel(), both=True, stop="never")
print(before, kibibytes())
"""


def test_an_image_of_imagenet_size_fits_in_a_gigabyte() -> None:
    # Oracle: the operating system's count, in a process of its own; it was 98 MB over what torch
    # itself takes (635 MB here).
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMAGENET], capture_output=True, text=True, check=True
    )
    before, after = (int(v) << 10 for v in done.stdout.split())
    assert after - before < 3e8


# --- the attack -----------------------------------------------------------------------------------


def by_hand(
    model: LinearModel, x: np.ndarray, y: int, theta: float, steps: int, features: int
) -> np.ndarray:
    """Papernot et al.'s algorithm for a linear model, one image, with a matrix of all pairs."""
    weight = model.weight.detach().numpy().reshape(len(model.bias), -1)
    bias = model.bias.detach().numpy()
    point = x.ravel().copy()
    target = int(np.where(np.arange(len(bias)) == y, np.inf, weight @ point + bias).argmin())
    a = weight[target]
    b = weight.sum(0) - a
    for _ in range(steps):
        if (weight @ point + bias).argmax() != y:
            break
        open_ = point < 1 if theta > 0 else point > 0
        up, down = (a, -b) if theta > 0 else (-a, b)
        if features == 1:
            worth = np.where((up > 0) & (down > 0) & open_, up * down, -np.inf)
            chosen = [int(worth.argmax())]
            best = worth.max()
        else:
            s, t = up[:, None] + up[None], down[:, None] + down[None]
            fits = (s > 0) & (t > 0) & open_[:, None] & open_[None] & ~np.eye(len(a), dtype=bool)
            worth = np.where(fits, s * t, -np.inf)
            chosen = list(np.unravel_index(worth.argmax(), worth.shape))
            best = worth.max()
        if best == -np.inf:
            break
        point[chosen] = np.clip(point[chosen] + theta, 0, 1)
    return point.reshape(x.shape)


@pytest.mark.parametrize("theta", [1.0, -1.0, 0.3])
@pytest.mark.parametrize("features", [1, 2])
def test_every_step_is_that_of_the_paper(theta: float, features: int) -> None:
    # Oracle: the algorithm by hand in numpy, whose Jacobian is the weights.
    model = LinearModel(dtype=torch.float64)
    x = images(8, seed=3).double()
    y = predicted(model, x)
    x_adv = jsma(model, x, y, theta=theta, gamma=1.0, features=features)
    fell = 0
    for i in range(8):
        expected = by_hand(model, x[i].numpy(), int(y[i]), theta, 48 // features, features)
        now = predicted(model, torch.from_numpy(expected)[None])
        if int(now) == int(y[i]):
            expected = x[i].numpy()  # no success: the clean image comes back
        else:
            fell += 1
        np.testing.assert_allclose(x_adv[i].numpy(), expected, rtol=0, atol=1e-12)
    assert fell >= 3


def test_gamma_bounds_the_changes() -> None:
    # Oracle: closed form: ⌊γ·n/2⌋ pairs; S0's 10 % of 3072 make 153.
    model = LinearModel(shape=(3, 32, 32), seed=4)
    x = images(2, (3, 32, 32))
    steps: list[int] = []
    jsma(
        model, x, predicted(model, x), preset="ace", stop="never",
        trace=lambda step, *rest: steps.append(step),
    )  # fmt: skip
    assert steps == list(range(154))
    seen: list[Tensor] = []
    model = LinearModel(dtype=torch.float64)
    x = images(4).double()
    jsma(
        model, x, predicted(model, x), gamma=0.2, stop="never",
        trace=lambda step, points, *rest: seen.append(points),
    )  # fmt: skip
    changed = [int((p != x).flatten(1).sum(1).amax()) for p in seen]
    assert changed == [0, 2, 4, 6, 8]  # ⌊0.2·48/2⌋ = 4 steps


def test_a_target_is_reached_and_the_fewest_pixels_are_kept() -> None:
    # Oracle: the trace: of the adversarial points the one with fewest pixels changed.
    model = TinyConv()
    x = images(6, (3, 6, 6)).double()
    target = model(x).topk(2, dim=1).indices[:, 1]
    least = torch.full((6,), torch.inf, dtype=torch.float64)

    def trace(_: int, points: Tensor, logits: Tensor, loss: Tensor, rows: Tensor) -> None:
        hit = logits[:, 0].argmax(1) == target[rows]
        size = torch.where(hit, distance(points, x[rows], "l0"), torch.inf)
        least[rows] = torch.minimum(least[rows], size)
        others = logits[:, 0].scatter(1, target[rows][:, None], -torch.inf).amax(1)
        own = logits[:, 0].gather(1, target[rows][:, None])[:, 0]
        torch.testing.assert_close(loss, own - others, rtol=0, atol=1e-12)

    x_adv = jsma(model, x, target, targeted=True, gamma=1.0, both=True, stop="never", trace=trace)
    fell = predicted(model, x_adv) == target
    assert int(fell.sum()) >= 3
    assert torch.equal(distance(x_adv, x, "l0")[fell], least[fell])
    assert bool(least[~fell].isinf().all())


def test_passes_and_waits_are_those_documented() -> None:
    # Oracle: counts: one forward and two backward passes a step, and at most two waits.
    inner = TinyConv()
    model = Counting(inner)
    x = images(3, (3, 6, 6)).double()
    y = predicted(inner, x)
    jsma(model, x, y, gamma=12 / 108, stop="never")
    assert (model.forwards, model.backwards) == (3 * 7, 3 * 2 * 6)

    def waits(steps: int, stop: str) -> int:
        with HostSyncs() as syncs:
            jsma(inner, x, y, gamma=2 * steps / 108, theta=1e-6, stop=stop)
        return syncs.count

    assert waits(12, "never") - waits(2, "never") == 10
    assert waits(12, "success") - waits(2, "success") == 20


@pytest.mark.parametrize(
    ("name", "value"), [("theta", 0.0), ("theta", 2.0), ("gamma", 1.5), ("features", 3)]
)
def test_bad_options(name: str, value: float) -> None:
    with pytest.raises(RangeError, match=name):
        jsma(LinearModel(), images(1), torch.tensor([0]), **{name: value})
