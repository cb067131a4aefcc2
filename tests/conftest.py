"""Settings shared by every test: one thread, derandomised property tests, tiny models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.tiny import LinearModel, TinyConv

pytest.register_assert_rewrite("tests.contracts")
torch.set_num_threads(1)

settings.register_profile(
    "feint",
    max_examples=12,
    deadline=None,
    derandomize=True,
    # A contract's property is one method that every subclass runs.
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
)
settings.load_profile("feint")


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Both floating-point types that every component supports."""
    return request.param


@pytest.fixture
def linear(dtype: torch.dtype) -> LinearModel:
    """A linear classifier of 5 classes on 3×4×4 images."""
    return LinearModel(dtype=dtype)


@pytest.fixture
def conv() -> TinyConv:
    """A convolutional network without batch normalisation, float64."""
    return TinyConv()


@pytest.fixture
def conv_bn() -> TinyConv:
    """A convolutional network with batch normalisation in eval mode, float64."""
    return TinyConv(batch_norm=True)
