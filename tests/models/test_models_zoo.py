"""Real classifiers outside the repository. Oracles: their own code, and their known accuracy.

The folder `shared` beside the repository holds them; the default suite does without.
"""

from pathlib import Path

import pytest
import torch

from feint.data import load as load_data
from feint.models import build, check_model, resolve

SHARED = Path(__file__).resolve().parents[3] / "shared"
pytestmark = pytest.mark.reference


def accuracy(model, data, size=50):
    with torch.no_grad():
        hits = sum(int((model(b.x).argmax(1) == b.y).sum()) for b in data.batches(size))
    return hits / len(data)


def test_cifar_resnet20_on_the_bundled_images():
    # 91.7 % on all 10 000; the standard error over 500 images is 1.2 points.
    found = resolve(f"{SHARED}/models/zoo.py:cifar_resnet20")
    data = load_data("bundled:cifar10")
    check_model(found.model, next(data.batches(4)).x)
    assert accuracy(found.model, data, 250) == pytest.approx(0.917, abs=0.015)


def test_our_resnet20_with_those_weights_gives_those_logits():
    theirs = resolve(f"{SHARED}/models/zoo.py:cifar_resnet20").model
    ours = build("resnet20").eval()
    names = {
        name: name.replace("layer1", "stages.0")
        .replace("layer2", "stages.1")
        .replace("layer3", "stages.2")
        for name in theirs.net.state_dict()
    }
    state = {f"net.{names[k]}": v for k, v in theirs.net.state_dict().items()}
    ours.load_state_dict(state)
    x = next(load_data("bundled:cifar10", samples=64).batches(64)).x
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-4)
        assert torch.equal(ours(x).argmax(1), theirs(x).argmax(1))


@pytest.mark.parametrize("side", [None, 224])
def test_resnet50_on_the_shared_images(side):
    # A ResNet-50 v1 is right on about three quarters of ImageNet; these images are typical ones.
    found = resolve(f"{SHARED}/models/zoo.py:resnet50", input_size=side)
    assert len(found.notes) == (0 if side is None else 1)
    data = load_data(f"{SHARED}/data/nips2017/images.csv", samples=50)
    data.check_classes(1000)
    assert data.targets is not None
    assert accuracy(found.model, data, 10) > 0.75
