"""AutoAttack and its parts beside the authors' code, on real images.

Oracle: `pyautoattack` 0.2.0 (the code of fra31/auto-attack), same model, images and budget. Robust
accuracy may differ by one image in a hundred, mean distances by 1 %.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import feint.data
import feint.models
from feint.attacks import apgd, autoattack, fab, square
from feint.core.norms import distance

pytestmark = [
    pytest.mark.reference,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]

ZOO = Path(__file__).resolve().parents[3] / "shared" / "models" / "zoo.py"
EPS = {"Linf": 8 / 255, "L2": 0.5, "L1": 12.0}
Subject = tuple[nn.Module, Tensor, Tensor]


def subject(spec: str, count: int) -> Subject:
    """A model and the first images that it classifies correctly."""
    model = feint.models.load(spec).eval()
    batch = next(iter(feint.data.load("bundled:cifar10").batches(300)))
    with torch.no_grad():
        right = model(batch.x).argmax(1) == batch.y
    return model, batch.x[right][:count], batch.y[right][:count]


@pytest.fixture(scope="module", params=["plain", "trained"])
def model(request: pytest.FixtureRequest) -> Subject:
    if request.param == "plain":
        return subject(f"{ZOO}:cifar_resnet20", 100)
    return subject("bundled:cifar10-resnet20-at", 100)


def theirs(subject: Subject, norm: str, eps: float, attacks: list[str] | None = None) -> Tensor:
    from pyautoattack import AutoAttack

    net, x, y = subject
    version = "custom" if attacks else "standard"
    suite = AutoAttack(net, norm=norm, eps=eps, seed=0, attacks=attacks, version=version)
    suite.apgd.n_restarts = 1
    found: Tensor = suite.run_standard_evaluation(x, y, batch_size=len(x))[0]
    return found


def standing(model: nn.Module, x: Tensor, y: Tensor) -> int:
    with torch.no_grad():
        return int((model(x).argmax(1) == y).sum())


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_standard_leaves_as_many_standing(model: Subject, norm: str) -> None:
    net, x, y = model
    mine = autoattack(net, x, y, norm=norm.lower(), eps=EPS[norm])
    assert bool((distance(mine, x, norm.lower()) <= EPS[norm]).all())
    other = theirs(model, norm, EPS[norm])
    assert abs(standing(net, mine, y) - standing(net, other, y)) <= 1


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("part", ["ce", "dlr", "targets"])
def test_apgd_is_as_strong(model: Subject, norm: str, part: str) -> None:
    net, x, y = (model[0], model[1][:24], model[2][:24])
    kwargs = {
        "ce": {},
        "dlr": {"loss": "dlr"},
        "targets": {"loss": "dlr", "targets": 9},
    }[part]
    eps = EPS[norm] / (4 if part == "targets" else 2)
    mine = apgd(net, x, y, norm=norm.lower(), eps=eps, **kwargs)
    name = {"ce": "apgd-ce", "dlr": "apgd-dlr", "targets": "apgd-t"}[part]
    other = theirs((net, x, y), norm, eps, [name])
    assert standing(net, mine, y) <= standing(net, other, y) + 1


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("targets", [None, 9])
def test_fab_comes_as_near(model: Subject, norm: str, targets: int | None) -> None:
    from pyautoattack.fab_pt import FABAttack_PT

    # Enough images that one walk into another local minimum, theirs or ours, does not decide.
    net, x, y = (model[0], model[1][:24], model[2][:24])
    mine = fab(net, x, y, norm=norm.lower(), targets=targets)
    near = distance(mine, x, norm.lower())
    best = torch.full_like(near, torch.inf)
    other = FABAttack_PT(
        net, norm=norm, n_restarts=1, n_iter=100, eps=EPS[norm], seed=0, verbose=False,
        device="cpu",
    )  # fmt: skip
    for target in range(2, 11) if targets else (None,):
        other.target_class = target
        found = other.attack_single_run(x, y, is_targeted=target is not None)
        with torch.no_grad():
            fell = net(found).argmax(1) != y
        size = distance(found, x, norm.lower())
        best = torch.minimum(best, torch.where(fell, size, torch.inf))
    assert standing(net, mine, y) == 0
    both = best.isfinite()
    assert float(near[both].mean()) <= 1.01 * float(best[both].mean())


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_square_is_as_strong(model: Subject, norm: str) -> None:
    from pyautoattack.square import SquareAttack

    net, x, y = (model[0], model[1][:50], model[2][:50])
    eps = EPS[norm] / 2
    mine = square(net, x, y, norm=norm.lower(), eps=eps, queries=300, schedule=10_000)
    other = SquareAttack(
        net, p_init=0.8, n_queries=300, eps=eps, norm=norm, n_restarts=1, seed=0, verbose=False,
        device="cpu", resc_schedule=False,
    ).perturb(x, y)  # fmt: skip
    # Two independent random searches: the number that falls differs by chance.
    assert standing(net, mine, y) <= standing(net, other, y) + 5
