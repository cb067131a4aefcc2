"""Gradient maps. Oracles: linear models, whose gradients are their weights; scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skimage.metrics import structural_similarity
from torch import nn

from feint.core.errors import GradientError, ModelError, RangeError, ShapeError, UnknownNameError
from feint.core.gradients import eot
from feint.diagnostics import (
    gradient_magnitude,
    gradient_ssim,
    heatmap,
    input_gradients,
    layer_heatmaps,
    other_labels,
    pixel_robustness,
    reconstruction_gradients,
)
from tests.tiny import Counting, Detach, LinearModel, StochasticSlope, TinyConv, behind, images


def rival(model: LinearModel, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The likeliest class other than y."""
    return model(x).scatter(1, y[:, None], -torch.inf).argmax(1)


def test_margin_gradient_of_a_linear_model_is_a_difference_of_weights(
    linear: LinearModel,
) -> None:
    x = images(6, dtype=linear.weight.dtype)
    y = torch.arange(6) % 5
    weight = linear.weight.detach()
    expected = weight[rival(linear, x, y)] - weight[y]
    found = input_gradients(linear, x, y, loss="margin", batch_size=4)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(heatmap(found), expected.double().abs().sum((0, 1)))
    r = pixel_robustness(linear, x, y, loss="margin")
    torch.testing.assert_close(r, expected.double().abs().mean((0, 1)))


def test_cross_entropy_gradient_in_closed_form() -> None:
    # Oracle: ∂CE/∂x = Σ_k (p_k − 1[k = y]) w_k.
    model = LinearModel(dtype=torch.float64)
    x, y = images(4, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    p = model(x).softmax(1) - nn.functional.one_hot(y, 5)
    expected = torch.einsum("bk,kchw->bchw", p, model.weight).detach()
    torch.testing.assert_close(input_gradients(model, x, y), expected)


@given(st.integers(1, 7))
def test_batch_size_changes_nothing(batch_size: int) -> None:
    model, x = TinyConv(), images(5, (3, 6, 6), dtype=torch.float64)
    y = torch.arange(5) % 5
    whole = input_gradients(model, x, y)
    torch.testing.assert_close(input_gradients(model, x, y, batch_size=batch_size), whole)
    layers = layer_heatmaps(model, x, y, batch_size=batch_size)
    for name, heat in layer_heatmaps(model, x, y).items():
        torch.testing.assert_close(layers[name], heat)


def test_random_models_are_averaged_over_draws() -> None:
    # Oracle: the mean slope is w, so the mean margin gradient points along ±w.
    model = StochasticSlope()
    x = images(2, dtype=torch.float64)
    y = torch.zeros(2, dtype=torch.int64)
    found = input_gradients(model, x, y, loss="margin", gradient=eot(400))
    assert float((found - model.weight).abs().max()) < 0.15 * float(model.weight.abs().max())


def test_one_pass_per_image() -> None:
    counted = Counting(TinyConv())
    input_gradients(counted, images(5, (3, 6, 6), dtype=torch.float64), torch.arange(5) % 5)
    assert (counted.forwards, counted.backwards) == (5, 5)


def test_layer_gradients_of_a_linear_network_are_pulled_back_weights() -> None:
    # Oracle: for the loss −z_y, ∂/∂features is −w_y, and conv1's is its transposed convolution.
    conv1 = nn.Conv2d(2, 3, 3, stride=2, bias=False).double()
    conv2 = nn.Conv2d(3, 4, 2, bias=False).double()
    head = nn.Linear(4 * 2 * 2, 3).double()
    model = nn.Sequential(conv1, conv2, nn.Flatten(), head)
    x, y = images(3, (2, 7, 7), dtype=torch.float64), torch.tensor([0, 1, 1])

    def loss(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return -logits.gather(-1, label[..., None])[..., 0]

    at2 = -head.weight[y].view(3, 4, 2, 2)
    at1 = nn.functional.conv_transpose2d(at2, conv2.weight)
    at0 = nn.functional.conv_transpose2d(at1, conv1.weight, stride=2)
    found = layer_heatmaps(model, x, y, loss=loss)
    assert list(found) == ["input", "0", "1"]
    for name, expected in zip(found, (at0, at1, at2), strict=True):
        torch.testing.assert_close(found[name], expected.detach().abs().sum((0, 1)))


def test_layers_survive_writing_in_place() -> None:
    def net(inplace: bool) -> nn.Module:
        made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace), nn.Flatten(), nn.Linear(64, 3))
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        return made

    x, y = images(2, (3, 6, 6)), torch.tensor([0, 2])
    for name, heat in layer_heatmaps(net(False), x, y).items():
        torch.testing.assert_close(layer_heatmaps(net(True), x, y)[name], heat)


def test_layers_by_name_and_bad_names() -> None:
    model, x, y = TinyConv(), images(2, (3, 6, 6), dtype=torch.float64), torch.tensor([0, 1])
    assert list(layer_heatmaps(model, x, y, layers=["conv2"])) == ["input", "conv2"]
    assert not model.conv2._forward_hooks
    with pytest.raises(UnknownNameError, match="conv2"):
        layer_heatmaps(model, x, y, layers=["conv3"])
    with pytest.raises(ModelError, match="'linear'"):
        layer_heatmaps(model, x, y, layers=["linear"])


def test_lost_gradients_are_errors() -> None:
    broken = behind(Detach(), LinearModel())
    x, y = images(2), torch.tensor([0, 1])
    with pytest.raises(GradientError, match="front"):
        input_gradients(broken, x, y)
    with pytest.raises(GradientError):
        layer_heatmaps(broken, x, y)
    with pytest.raises(RangeError, match="at least one"):
        input_gradients(LinearModel(), x[:0], y[:0])
    with pytest.raises(RangeError, match="reduce"):
        heatmap(x, reduce="max")  # type: ignore[arg-type]


def test_gradient_ssim_is_scikit_images() -> None:
    gradients = torch.randn(3, 2, 3, 12, 11, generator=torch.Generator().manual_seed(0)).double()
    found = gradient_ssim(gradients)
    sizes = gradients.abs() / gradients.abs().amax((2, 3, 4), keepdim=True)
    for i in range(3):
        for j in range(3):
            for b in range(2):
                first, second = (sizes[k, b].numpy() for k in (i, j))
                expected = structural_similarity(first, second, data_range=1.0, channel_axis=0)
                assert abs(float(found[i, j, b]) - expected) < 1e-9
    np.testing.assert_allclose(found.diagonal().numpy(), 1)


@given(st.integers(0, 20), st.floats(1e-6, 1e6))
def test_gradient_ssim_ignores_scale_and_sign(seed: int, scale: float) -> None:
    g = images(2, (1, 8, 8), seed, low=-1.0, dtype=torch.float64)
    both = torch.stack([g, -scale * g])
    torch.testing.assert_close(gradient_ssim(both), torch.ones(2, 2, 2).double())


def test_magnitudes() -> None:
    g = torch.tensor([[[[1.0, -2.0]], [[4.0, 0.0]]], [[[0.0, 0.0]], [[0.0, 0.0]]]])
    kept = gradient_magnitude(g)
    assert torch.equal(kept[0], torch.tensor([[[0.25, 0.5]], [[1.0, 0.0]]]))
    assert not kept[1].any()
    assert torch.equal(gradient_magnitude(g, reduce="max")[0], torch.tensor([[[1.0, 0.5]]]))
    with pytest.raises(RangeError, match="channels"):
        gradient_magnitude(g, reduce="sum")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="expected"):
        gradient_ssim(g)


@given(st.integers(2, 12), st.integers(0, 30))
def test_other_labels_are_others_and_even(classes: int, seed: int) -> None:
    y = torch.arange(600) % classes
    found = other_labels(y, classes, seed=seed)
    assert bool((found != y).all())
    assert 0 <= int(found.min()) <= int(found.max()) < classes
    if classes > 2:
        step = (found - y) % classes
        counts = torch.bincount(step, minlength=classes)[1:].double()
        assert float((counts - 600 / (classes - 1)).abs().max()) < 6 * (600 / (classes - 1)) ** 0.5


def test_reconstruction_gradient_of_a_linear_autoencoder() -> None:
    # Oracle: for A(x) = M x, the gradient of ‖M x − x‖² with a held target is 2 Mᵀ (M x − x).
    m = torch.randn(12, 12, generator=torch.Generator().manual_seed(1)).double()
    x = images(3, (3, 2, 2), dtype=torch.float64)
    flat = x.flatten(1)
    expected = (2 * (flat @ m.T - flat) @ m).view_as(x)
    found = reconstruction_gradients(lambda z: (z.flatten(1) @ m.T).view_as(z), x, batch_size=2)
    torch.testing.assert_close(found, expected)
    with pytest.raises(GradientError):
        reconstruction_gradients(lambda z: z.detach(), x)
    with pytest.raises(ShapeError):
        reconstruction_gradients(lambda z: z[:, :1], x)
