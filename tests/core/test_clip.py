"""Clipping. Oracles: torch.clamp for values, the closed form of the slope."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from feint.core.clip import clip


@given(st.lists(st.floats(-3, 3, width=32) | st.sampled_from([0.0, 1.0]), min_size=1))
def test_values_are_clamps_and_slopes_include_the_ends(values: list[float]) -> None:
    x = torch.tensor(values, requires_grad=True)
    y = clip(x)
    assert torch.equal(y, x.clamp(0, 1))
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert slope.tolist() == [float(0 <= v <= 1) for v in values]


def test_dtype_is_kept() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert clip(torch.tensor([0.25, 2.0], dtype=dtype)).dtype == dtype
