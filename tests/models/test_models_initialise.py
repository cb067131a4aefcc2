"""Initialisation schemes.

Oracle: the formulas of He et al. 2015 and Glorot & Bengio 2010, and torch's documented bound for
transposed convolutions, on a model with ACE in front.
"""

from __future__ import annotations

import pytest
import torch

from feint.core.errors import ConfigError
from feint.models import build, initialise


def test_xavier_is_that_of_the_original_code() -> None:
    model = build("resnet20", ace=10.0)
    initialise(model, 3, "xavier")
    weights = dict(model.named_parameters())
    conv = weights["net.network.stages.2.1.conv1.weight"]  # 64 → 64, 3×3
    assert conv.std().item() == pytest.approx((2 / (2 * 64 * 9)) ** 0.5, rel=0.02)
    linear = weights["net.network.linear.weight"]
    assert linear.std().item() == pytest.approx((2 / (64 + 10)) ** 0.5, rel=0.1)
    for name in ("net.ace.decode.weight", "net.ace.decode.bias"):
        values = weights[name].detach()
        assert values.abs().max() <= 27**-0.5
        assert values.abs().max() > 0.3 * 27**-0.5
    assert not weights["net.ace.encode.bias"].any()
    assert bool((weights["net.network.bn1.weight"] == 1).all())


def test_he_differs_and_repeats() -> None:
    first, second = build("resnet20"), build("resnet20")
    initialise(first, 3)
    initialise(second, 3, "he")
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    conv = dict(first.named_parameters())["net.stages.2.1.conv1.weight"]
    assert conv.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


def test_unknown_scheme() -> None:
    with pytest.raises(ConfigError, match="'he' or 'xavier'"):
        initialise(build("toy"), 0, "kaiming")  # type: ignore[arg-type]
