"""A whole diagnosis. Oracles: the measures called one by one; Wilson's interval by scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from feint.core.errors import ConfigError, UnknownNameError
from feint.defenses import ACE, parse
from feint.diagnostics import (
    MEASURES,
    Options,
    Subject,
    checkerboard_share,
    connected_pixels,
    diagnose,
    input_gradients,
    label_map,
    masked_directions,
)
from feint.diagnostics.numbers import mean, rate
from feint.evaluation.pipeline import Pipeline
from tests.tiny import TinyConv, behind, images, predicted

# The tiny networks' tanh saturates under constant weights.
OPTIONS = Options(points=5, pixel_images=2, overlap="paper")


def subjects(defense: str | None = None) -> list[Subject]:
    plain = TinyConv(dtype=torch.float32)
    ace = behind(ACE(lam=50.0), TinyConv(dtype=torch.float32)).eval()
    with torch.no_grad():
        for i, parameter in enumerate(ace.front.parameters()):
            parameter.copy_(torch.linspace(-0.4, 0.5, parameter.numel()).view_as(parameter) + i / 9)
    found = [Subject("plain", plain, plain, plain), Subject("ace", ace, ace, ace)]
    if defense:
        pipeline = Pipeline(ace, parse(defense))
        found.append(Subject(f"ace + {defense}", ace, pipeline, pipeline.view()))
    return found


def data(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    x = images(count, (3, 8, 8), low=0.2, high=0.8)
    return x, predicted(subjects()[0].model, x)


def test_every_measure_of_every_subject() -> None:
    x, y = data()
    seen: list[tuple[str, str]] = []
    found = diagnose(
        subjects("rand"),
        x,
        y,
        options=OPTIONS,
        on_measure=lambda *where: seen.append(where),
    )
    names = ("plain", "ace", "ace + rand")
    assert found.subjects == names
    assert list(found.results) == list(MEASURES)
    assert seen == [(m, n) for m in MEASURES for n in names]
    for by in found.results.values():
        for measured in by.values():
            assert measured.arrays
            for number in measured.numbers.values():
                if number.low is not None and number.high is not None:
                    assert number.value is not None
                    assert number.low <= number.value <= number.high
    # ACE draws the gradient to its quarter of the pixels, S0 Fig. 3; the plain net does not.
    shares = [found.results["gradients"][n].numbers["share_on_connected"].value for n in names]
    assert shares[0] is not None
    assert shares[1] is not None
    assert shares[0] < 0.5 < 0.8 < shares[1]


def test_measures_agree_with_their_functions() -> None:
    x, y = data()
    subject = subjects()[1]
    found = diagnose([subject], x, y, measures=["labels", "gradients"], options=OPTIONS)
    g, c = input_gradients(subject.view, x, y), connected_pixels(subject.bare, 8, 8)
    share = checkerboard_share(g.double().abs().sum(1), c)
    arrays = found.results["gradients"]["ace"].arrays
    np.testing.assert_allclose(arrays["share_on_connected"], share.numpy(), rtol=1e-5)
    held = found.results["labels"]["ace"].arrays
    row = int(held["row"][0])
    off, on = masked_directions(g[row : row + 1], c)
    reach = 0.058 * (3 * 8 * 8) ** 0.5
    alone = label_map(subject.model, x[row : row + 1], off, on, reach=reach, points=5)
    np.testing.assert_array_equal(held["mask"], alone.labels.numpy())


def test_same_seed_same_result_and_index_names_the_draws() -> None:
    x, y = data()
    index = torch.tensor([7, 8, 9, 10])

    def run(rows: list[int]) -> np.ndarray:
        made = diagnose(
            subjects("rand")[2:], x[rows], y[rows], measures=["gradients"], index=index[rows]
        )
        (name,) = made.subjects
        return made.results["gradients"][name].arrays["share_on_connected"]

    whole = run([0, 1, 2, 3])
    np.testing.assert_array_equal(whole, run([0, 1, 2, 3]))
    np.testing.assert_allclose(run([2, 1]), whole[[2, 1]], rtol=1e-4)


def test_a_small_image_and_bad_requests() -> None:
    x, y = data()
    pair = subjects()
    with pytest.raises(UnknownNameError, match="overlap"):
        diagnose(pair, x, y, measures=["overlab"])
    with pytest.raises(ConfigError, match="another name"):
        diagnose([pair[0], pair[0]], x, y)
    with pytest.raises(ConfigError, match="at least one"):
        diagnose([], x, y)
    with pytest.raises(ConfigError, match="ssim"):
        diagnose(pair, x[..., :6, :6], y)
    small = diagnose(pair, x[..., :6, :6], y, measures=["rank", "overlap"], options=OPTIONS)
    assert list(small.results) == ["overlap", "rank"]


def test_a_model_is_left_as_it_is() -> None:
    x, y = data()
    subject = subjects()[0]
    state = {k: v.clone() for k, v in subject.model.state_dict().items()}
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    diagnose([subject], x, y, options=OPTIONS)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(state[k], v) for k, v in subject.model.state_dict().items())
    assert all(p.grad is None for p in subject.model.parameters())
    assert not any(m._forward_hooks for m in subject.model.modules())
    assert isinstance(subject.model, nn.Module)


@given(st.integers(0, 12), st.integers(1, 12))
def test_rates_have_wilsons_interval(hits: int, n: int) -> None:
    hits = min(hits, n)
    found = rate(torch.arange(n) < hits)
    expected = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert found.value == hits / n
    assert found.low == pytest.approx(expected.low, abs=1e-9)
    assert found.high == pytest.approx(expected.high, abs=1e-9)


def test_means_have_students_interval_within_bounds() -> None:
    values = torch.tensor([0.1, 0.2, 0.4, float("nan"), float("inf")])
    found = mean(values)
    expected = stats.ttest_1samp(values[:3].double().numpy(), 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.n == 3
    assert mean(values, (0.0, 1.0)).low == 0.0
    assert mean(values[3:]).value is None
    assert mean(values[:1]).low is None
