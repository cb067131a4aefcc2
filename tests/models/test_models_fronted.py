"""A defense as part of a model. Oracle: front and model one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from feint.core import random
from feint.core.errors import ConfigError, UnknownNameError
from feint.core.gradients import backprop
from feint.core.losses import cross_entropy
from feint.defenses import parse
from feint.models import Fronted, load, resolve

ACE = "ace(depth=2, form='unet', lam=0.9, weights='untrained', width=3)"
PLAIN = "bundled:cifar10-resnet20"


def images(seed: int, *shape: int) -> torch.Tensor:
    return random.uniform(random.keys(seed, [0])[0], shape)


def test_a_spec_puts_the_front_into_the_model() -> None:
    found = resolve(f"{ACE} | {PLAIN}")
    front, plain, x = parse(ACE), load(PLAIN), images(0, 2, 3, 32, 32)
    torch.testing.assert_close(found.model(x), plain(front(x)))
    assert f"{ACE} is part of the model" in found.notes
    assert found.card["name"] == "cifar10-resnet20"
    assert not any(m.training for m in found.model.modules())
    assert found.fingerprint != resolve(PLAIN).fingerprint
    # The front sees images at the classifier's size; other sizes are resized before both.
    big = images(1, 2, 3, 40, 40)
    small = nn.functional.interpolate(big, (32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(found.model(big), plain(front(small)))


def test_a_random_front_draws_by_keys() -> None:
    model = load(f"noise(scale=0.2) | {PLAIN}")
    x, keys = images(0, 3, 3, 32, 32), random.keys(1, 3)
    assert model.stochastic
    assert torch.equal(model(x, keys=keys), model(x, keys=keys))
    assert not torch.equal(model(x, keys=keys), model(x, keys=random.keys(2, 3)))
    parts = torch.cat([model(x[i : i + 1], keys=keys[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(parts, model(x, keys=keys), rtol=1e-4, atol=1e-4)


def test_gradients_pass_the_front() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    model = Fronted(parse(ACE), net)
    x, y = images(0, 2, 3, 8, 8), torch.tensor([0, 1])
    got = backprop(model, x, y, cross_entropy, random.keys(0, 2)).gradient
    leaf = x.clone().requires_grad_()
    loss = nn.functional.cross_entropy(net(parse(ACE)(leaf)), y, reduction="sum")
    torch.testing.assert_close(got, torch.autograd.grad(loss, leaf)[0])


def test_bad_fronts() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'ace'"):
        load(f"ice | {PLAIN}")
    with pytest.raises(ConfigError, match="the expression is empty"):
        load(f" | {PLAIN}")
