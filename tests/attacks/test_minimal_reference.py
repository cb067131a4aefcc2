"""Minimal-norm attacks beside other libraries on real images.

Oracle: foolbox 3.3.4, torchattacks 3.5.1, scipy's L-BFGS-B, and adv-lib 0.2.8 (with a stub for
visdom, which it imports and does not use); same images, model and steps. Whom they fool, we fool,
and the mean distance may be 1 % above theirs at most. A peer that leaves the box is no oracle.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import fmin_l_bfgs_b
from scipy.stats import binomtest
from torch import Tensor, nn

import feint.data
import feint.models
from feint.attacks import carlini_wagner, ddn, deepfool, ead, fmn, jsma, lbfgs, one_pixel
from feint.core.norms import distance

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

ZOO = Path(__file__).resolve().parents[3] / "shared" / "models" / "zoo.py"
INF = float("inf")


@pytest.fixture(scope="module")
def subject() -> tuple[nn.Module, Tensor, Tensor]:
    """The CIFAR-10 ResNet-20 and 48 bundled images that it classifies correctly."""
    model = feint.models.load(f"{ZOO}:cifar_resnet20").eval()
    batch = next(iter(feint.data.load("bundled:cifar10").batches(64)))
    with torch.no_grad():
        right = model(batch.x).argmax(1) == batch.y
    return model, batch.x[right][:48], batch.y[right][:48]


def compare(
    subject: tuple[nn.Module, Tensor, Tensor],
    norm: str,
    ours: Callable[[nn.Module, Tensor, Tensor], Tensor],
    theirs: Callable[[nn.Module, Tensor, Tensor], Tensor],
    count: int = 48,
) -> None:
    model, x, y = subject[0], subject[1][:count], subject[2][:count]
    mine, other = ours(model, x, y), theirs(model, x, y).detach()
    assert bool(((other >= 0) & (other <= 1)).all())
    with torch.no_grad():
        fell, fell_there = model(mine).argmax(1) != y, model(other).argmax(1) != y
    assert bool((fell | ~fell_there).all())  # whom they fool, we fool
    both = fell & fell_there
    near, far = (distance(v, x, norm)[both].mean() for v in (mine, other))
    assert float(near) <= 1.01 * float(far), (float(near), float(far))


def adv_lib(name: str, **kwargs: object) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    visdom = types.ModuleType("visdom")
    visdom.Visdom = object
    sys.modules.setdefault("visdom", visdom)
    import adv_lib.attacks

    return lambda model, x, y: getattr(adv_lib.attacks, name)(model, x, y, **kwargs)


def foolbox(name: str, **kwargs: object) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    import foolbox as fb

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        wrapped = fb.PyTorchModel(model, bounds=(0, 1), device="cpu")
        attack = getattr(fb.attacks, name)(**kwargs)
        return attack(wrapped, x, fb.criteria.Misclassification(y), epsilons=None)[1]

    return run


@pytest.mark.parametrize(("norm", "order"), [("l2", 2), ("linf", INF)])
def test_deepfool(subject: tuple, norm: str, order: float) -> None:
    peer = adv_lib("df", steps=50, norm=order)
    compare(subject, norm, lambda *a: deepfool(*a, norm=norm), peer)


def test_ddn(subject: tuple) -> None:
    ours = lambda *a: ddn(*a, steps=100)  # noqa: E731
    compare(subject, "l2", ours, adv_lib("ddn", steps=100, levels=None))
    compare(subject, "l2", ours, foolbox("DDNAttack", steps=100))


@pytest.mark.parametrize(("norm", "order"), [("l2", 2), ("linf", INF), ("l1", 1)])
def test_fmn(subject: tuple, norm: str, order: float) -> None:
    peer = adv_lib("fmn", steps=100, norm=order)
    compare(subject, norm, lambda *a: fmn(*a, norm=norm, steps=100), peer)


def test_carlini_wagner(subject: tuple) -> None:
    peer = foolbox(
        "L2CarliniWagnerAttack", binary_search_steps=5, steps=200, stepsize=0.01, initial_const=1e-3
    )
    ours = lambda *a: carlini_wagner(*a, search_steps=5, steps=200)  # noqa: E731
    compare(subject, "l2", ours, peer, count=12)


def test_ead(subject: tuple) -> None:
    peer = foolbox(
        "EADAttack", binary_search_steps=4, steps=100, initial_const=1e-2, regularization=0.01,
        decision_rule="L1",
    )  # fmt: skip
    ours = lambda *a: ead(*a, search_steps=4, steps=100, initial_const=1e-2)  # noqa: E731
    compare(subject, "l1", ours, peer, count=12)


def by_scipy(model: nn.Module, x: Tensor, y: Tensor, rounds: int, first: float) -> Tensor:
    """Szegedy et al.'s attack, image by image: scipy's L-BFGS-B, and the search for c."""
    found = x.clone()
    for i, label in enumerate(y):
        clean, c, low, high, least = x[i : i + 1], first, 0.0, INF, INF
        for _ in range(rounds):

            def fun(
                flat: np.ndarray, clean: Tensor = clean, c: float = c, label: Tensor = label
            ) -> tuple[float, np.ndarray]:
                point = torch.from_numpy(flat).float().view_as(clean).requires_grad_()
                logits = model(point)
                own = logits[0, label]
                rest = logits.index_fill(1, label, -INF).logsumexp(1)[0]
                value = (point - clean).square().sum() + c * nn.functional.softplus(own - rest)
                (gradient,) = torch.autograd.grad(value, point)
                return value.item(), gradient.double().numpy().ravel()

            flat = fmin_l_bfgs_b(
                fun, clean.double().numpy().ravel(), bounds=[(0.0, 1.0)] * clean.numel(), maxfun=300
            )[0]
            point = torch.from_numpy(flat).float().view_as(clean)
            with torch.no_grad():
                fell = bool(model(point).argmax(1) != label)
            size = float((point - clean).norm())
            if fell and size < least:
                found[i : i + 1], least = point, size
            low, high = (low, min(high, c)) if fell else (max(low, c), high)
            c = (low + high) / 2 if high < INF else 10 * c
    return found


def test_lbfgs(subject: tuple) -> None:
    ours = lambda *a: lbfgs(*a, search_steps=5, steps=300, initial_const=1e-2)  # noqa: E731
    compare(subject, "l2", ours, lambda *a: by_scipy(*a, rounds=5, first=1e-2), count=4)


def test_jsma(subject: tuple) -> None:
    # torchattacks leads every image to the next class, and takes seconds for each.
    import torchattacks

    model, x, y = subject[0], subject[1][:3], subject[2][:3]
    target = (y + 1) % 10
    mine = jsma(model, x, target, targeted=True, theta=1.0, gamma=0.1)
    other = torchattacks.JSMA(model, theta=1.0, gamma=0.1)(x, y)
    with torch.no_grad():
        fell, fell_there = model(mine).argmax(1) == target, model(other).argmax(1) == target
    assert bool(fell_there.any())
    assert bool((fell | ~fell_there).all())
    near, far = (distance(v, x, "l0")[fell_there].mean() for v in (mine, other))
    assert float(near) <= float(far)


@pytest.mark.filterwarnings("ignore")
def test_one_pixel(subject: tuple) -> None:
    # Both draw at random, so that the rates of success have intervals.
    import torchattacks

    model, x, y = subject
    np.random.seed(0)  # noqa: NPY002  what torchattacks draws from
    mine = one_pixel(
        model, x, y, strategy="best1bin", scale=(0.5, 1.0), start="uniform", levels=None,
        popsize=40, generations=10,
    )  # fmt: skip
    other = torchattacks.OnePixel(model, pixels=1, steps=10, popsize=40)(x, y)
    with torch.no_grad():
        fell, fell_there = (int((model(v).argmax(1) != y).sum()) for v in (mine, other))
    assert bool((distance(mine, x, "l0") <= 1).all())
    interval = binomtest(fell_there, len(x)).proportion_ci()
    assert fell / len(x) >= interval.low
