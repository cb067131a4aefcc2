"""Transfer and black-box attacks beside other libraries, on real images.

Oracle: torchattacks 3.5.1 (SPSA and the momentum family, whose steps are those of the papers) and
foolbox 3.3.4 (HopSkipJump), same images, model, budget, steps and starts. Success may be lower by
what chance allows (two standard deviations), mean distances larger by 1 % and the same chance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import feint.data
import feint.models
from feint.attacks import hopskipjump, mi_fgsm, spsa, transfer
from feint.core.norms import distance

pytestmark = [
    pytest.mark.reference,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]

ZOO = Path(__file__).resolve().parents[3] / "shared" / "models" / "zoo.py"
EPS = 8 / 255
Subject = tuple[nn.Module, Tensor, Tensor]


@pytest.fixture(scope="module")
def subject() -> Subject:
    """The CIFAR-10 ResNet-20 and 96 bundled images that it and the ResNet-32 classify correctly."""
    model, other = (feint.models.load(f"{ZOO}:cifar_resnet{n}").eval() for n in (20, 32))
    batch = next(iter(feint.data.load("bundled:cifar10").batches(200)))
    with torch.no_grad():
        right = (model(batch.x).argmax(1) == batch.y) & (other(batch.x).argmax(1) == batch.y)
    return model, batch.x[right][:96], batch.y[right][:96]


def fooled(model: nn.Module, x: Tensor, y: Tensor) -> int:
    with torch.no_grad():
        return int((model(x).argmax(1) != y).sum())


def not_fewer(mine: int, theirs: int, count: int) -> None:
    share = max(theirs / count, 1 / count)
    assert mine >= theirs - 2 * (2 * count * share * max(1 - share, 1 / count)) ** 0.5


@pytest.mark.parametrize(
    ("preset", "name", "kwargs"),
    [
        ("mi", "MIFGSM", {}),
        ("di", "DIFGSM", {"decay": 1.0}),
        ("ti", "TIFGSM", {"decay": 1.0, "diversity_prob": 0.0}),
        ("si", "SINIFGSM", {}),
    ],
)
def test_transfers_as_well(subject: Subject, preset: str, name: str, kwargs: Any) -> None:
    import torchattacks

    model, x, y = subject
    other = feint.models.load(f"{ZOO}:cifar_resnet32").eval()
    settings = {"eps": EPS, "steps": 10}
    mine = transfer(model, x, y, preset=preset, step_size=EPS / 8, stop="never", **settings)
    peer = getattr(torchattacks, name)(model, alpha=EPS / 8, **settings, **kwargs)
    theirs = peer(x, y)
    assert bool((distance(mine, x, "linf") <= EPS).all())
    not_fewer(fooled(model, mine, y), fooled(model, theirs, y), len(x))
    not_fewer(fooled(other, mine, y), fooled(other, theirs, y), len(x))


def test_momentum_takes_the_same_steps(subject: Subject) -> None:
    # Value by value where both took the last point: the last one is the best for nearly all.
    import torchattacks

    model, x, y = (subject[0], subject[1][:32], subject[2][:32])
    last: list[Tensor] = []
    mi_fgsm(
        model, x, y, eps=EPS, step_size=EPS / 8, steps=10, stop="never",
        trace=lambda step, points, *rest: last.append(points),
    )  # fmt: skip
    theirs = torchattacks.MIFGSM(model, eps=EPS, alpha=EPS / 8, steps=10, decay=1.0)(x, y)
    same = ((last[-1] - theirs).abs() <= 1e-6).double().flatten(1).mean(1)
    # A sign flips where a gradient is within a rounding of zero.
    assert float(same.mean()) >= 0.98


def test_spsa_is_as_strong(subject: Subject) -> None:
    import torchattacks

    model, x, y = (subject[0], subject[1][:24], subject[2][:24])
    mine = spsa(model, x, y, eps=EPS / 4, steps=10, samples=64, stop="never")
    theirs = torchattacks.SPSA(
        model, eps=EPS / 4, delta=0.01, lr=0.01, nb_iter=10, nb_sample=64, max_batch_size=64
    )(x, y)
    not_fewer(fooled(model, mine, y), fooled(model, theirs, y), len(x))


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_hopskipjump_comes_as_near(subject: Subject, norm: str) -> None:
    import foolbox as fb

    model, x, y = (subject[0], subject[1][:12], subject[2][:12])
    start = torch.stack([subject[1][subject[2] != label][0] for label in y])
    mine = hopskipjump(model, x, y, norm=norm, steps=10, start=start, tries=1)
    wrapped = fb.PyTorchModel(model, bounds=(0, 1), device="cpu")
    attack = fb.attacks.HopSkipJumpAttack(steps=10, constraint=norm)
    theirs = attack.run(wrapped, x, fb.criteria.Misclassification(y), starting_points=start)
    assert fooled(model, mine, y) == len(x)
    near, far = distance(mine, x, norm), distance(theirs, x, norm)
    ratio = (near / far).log()
    chance = float(ratio.std()) / len(x) ** 0.5
    assert float(ratio.mean()) <= 0.01 + 2 * chance
