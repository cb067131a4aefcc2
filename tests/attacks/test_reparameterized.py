from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from feint.attacks import pgd, reparameterized
from feint.core import random
from feint.core.errors import ConfigError, GradientError, RangeError, ShapeError
from feint.core.norms import distance
from tests.contracts.attack import AttackContract
from tests.tiny import Counting, LinearModel, Round, TinyConv, behind, images, predicted


def mirror(z: Tensor) -> Tensor:
    """A decoder that keeps lengths and is its own inverse."""
    return z.flip(2, 3)


class TestReparameterized(AttackContract):
    attack = staticmethod(reparameterized)
    kwargs: ClassVar = {"steps": 5, "decoder": mirror, "encoder": mirror}

    def test_bad_input_names_the_fix(self, bad: str) -> None:
        if bad != "step_size in 0…255":  # latents need not be in [0, 1]: no step is too long
            super().test_bad_input_names_the_fix(bad)


def test_steps_are_in_the_units_of_the_latent() -> None:
    # Oracle: a decoder of a hundred times the scale, and steps as much longer, bit by bit but for
    # the rounding of its factor.
    model = TinyConv()
    x = images(3, (3, 6, 6), low=0.2, high=0.8).double()
    y = predicted(model, x)
    kwargs: dict[str, Any] = {"eps": 0.05, "steps": 4, "stop": "never"}
    expected = reparameterized(
        model, x, y, decoder=mirror, encoder=mirror, step_size=0.05, **kwargs
    )
    found = reparameterized(
        model, x, y, decoder=lambda z: mirror(z) / 100, encoder=lambda x: 100 * mirror(x),
        step_size=5.0, **kwargs,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("stop", ["success", "never"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_isometry_is_pgd(norm: str, stop: str) -> None:
    # Oracle: the other attack. Steps in z are steps in x as long as the ball does not bind.
    model = TinyConv()
    x = images(6, (3, 6, 6), low=0.2, high=0.8).double()
    y = predicted(model, x)
    eps = {"linf": 0.05, "l2": 0.4}[norm]
    kwargs = {"eps": eps, "norm": norm, "steps": 5, "step_size": eps / 5, "stop": stop}
    found = reparameterized(model, x, y, decoder=mirror, encoder=mirror, **kwargs)
    expected = pgd(model, x, y, random_start=False, **kwargs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_succeeds_if_and_only_if_eps_exceeds_the_distance(norm: str) -> None:
    # Oracle: closed form, |z_y − z_j| / ‖w_y − w_j‖_q, q dual to the norm, with steps beyond it.
    model = LinearModel(classes=2, dtype=torch.float64)
    x = images(5, low=0.4, high=0.6).double()
    y = predicted(model, x)
    for i, least in enumerate(model.distance(x, y, norm).tolist()):
        one = slice(i, i + 1)
        for factor in (0.98, 1.02):
            x_adv = reparameterized(
                model, x[one], y[one], decoder=mirror, encoder=mirror, eps=factor * least, norm=norm
            )
            assert bool(predicted(model, x_adv) != y[one]) is (factor > 1)


class Bottleneck(nn.Module):
    """x = ½ + A·z for z of few numbers: images of a plane, and its exact inverse on it."""

    def __init__(self, size: int = 6, shape: tuple[int, ...] = (3, 4, 4)) -> None:
        super().__init__()
        drawn = random.normal(random.keys(7, 48), (size,), torch.float64)
        self.basis = torch.linalg.qr(drawn).Q  # (48, size), orthonormal columns
        self.shape = shape

    def forward(self, z: Tensor) -> Tensor:
        return 0.5 + (z @ self.basis.T).view(-1, *self.shape)

    def encode(self, x: Tensor) -> Tensor:
        return (x - 0.5).flatten(1) @ self.basis


def test_stays_on_the_decoders_images() -> None:
    # Oracle: closed form: on a plane the nearest boundary point is at the margin divided by the
    # length of the projected slope; the result has no part outside of the plane.
    plane = Bottleneck()
    model = LinearModel(classes=2, dtype=torch.float64)
    z = 0.3 * random.normal(random.keys(1, 5), (6,), torch.float64)
    x = plane(z)
    y = predicted(model, x)
    slope = (model.weight[1] - model.weight[0]).detach().flatten() @ plane.basis
    gap = model(x).detach().diff(dim=1)[:, 0].abs()
    for i, least in enumerate((gap / slope.norm()).tolist()):
        one = slice(i, i + 1)
        for factor in (0.98, 1.02):
            x_adv = reparameterized(
                model, x[one], y[one], decoder=plane, encoder=plane.encode, norm="l2",
                eps=factor * least,
            )  # fmt: skip
            assert bool(predicted(model, x_adv) != y[one]) is (factor > 1)
            torch.testing.assert_close(plane(plane.encode(x_adv)), x_adv, rtol=0, atol=1e-6)


def test_gets_through_a_projection_that_shatters_gradients() -> None:
    # Oracle: the plane behind a rounding of its coordinates is a defense with no gradient, which
    # pgd cannot pass; the decoder's images fall through it.
    plane = Bottleneck()

    class Project(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return plane((plane.encode(x) * 256).round() / 256)

    inner = LinearModel(classes=2, dtype=torch.float64)
    defended = behind(Project(), inner)
    x = plane(0.2 * random.normal(random.keys(1, 5), (6,), torch.float64))
    y = predicted(defended, x)
    with pytest.raises(GradientError, match="front"):
        pgd(defended, x, y, eps=1.0, norm="l2")
    x_adv = reparameterized(
        inner, x, y, decoder=plane, encoder=plane.encode, norm="l2", eps=1.0, loss="margin",
        stop="never",
    )  # fmt: skip
    assert bool((predicted(defended, x_adv) != y).all())


def test_without_an_encoder_the_start_is_sought() -> None:
    # Oracle: closed form: the plane's images have an exact latent, so that the first point is x.
    plane = Bottleneck()
    model = LinearModel(dtype=torch.float64)
    x = plane(0.3 * random.normal(random.keys(1, 4), (6,), torch.float64))
    y = predicted(model, x)
    seen: list[Tensor] = []
    kwargs: dict[str, Any] = {"decoder": plane, "latent": (6,), "norm": "l2", "eps": 0.5}
    x_adv = reparameterized(
        model, x, y, invert_steps=400, stop="never",
        trace=lambda step, points, *rest: seen.append(points), **kwargs,
    )  # fmt: skip
    assert float(distance(seen[0], x, "l2").max()) < 1e-2
    assert bool((distance(x_adv, x, "l2") <= 0.5).all())
    # Each sample's start is its own: alone, it is the same.
    keys = random.keys(0, 4)
    whole = reparameterized(model, x, y, seed=keys, **kwargs)
    alone = reparameterized(model, x[2:3], y[2:3], seed=keys[2:3], **kwargs)
    torch.testing.assert_close(alone, whole[2:3], rtol=0, atol=1e-9)


def test_passes_are_those_documented() -> None:
    # Oracle: counts.
    inner = TinyConv()
    model, decoder = Counting(inner), Counting(nn.Identity())
    x = images(3, (3, 6, 6)).double()
    y = predicted(inner, x)
    reparameterized(
        model, x, y, decoder=decoder, encoder=lambda x: x.clone(), steps=4, stop="never"
    )
    assert (model.forwards, model.backwards) == (3 * 5, 3 * 4)
    assert (decoder.forwards, decoder.backwards) == (3 * 5, 3 * 4)


def test_bad_maps() -> None:
    model, x, y = LinearModel(), images(2), torch.tensor([0, 1])
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({}, ConfigError, "decoder is missing"),
        ({"decoder": mirror}, ConfigError, "neither encoder nor latent"),
        ({"decoder": lambda z: z[:, :1], "encoder": mirror}, ShapeError, "images like x"),
        ({"decoder": mirror, "encoder": lambda x: x[:1]}, ShapeError, "one per image"),
        ({"decoder": lambda z: z.detach(), "encoder": mirror}, GradientError, "graph is cut"),
        ({"decoder": mirror, "latent": (3, 4, 4), "invert_steps": 0}, RangeError, "invert_steps"),
    ]
    for kwargs, error, message in cases:
        with pytest.raises(error, match=message):
            reparameterized(model, x, y, **kwargs)


def test_a_latent_that_gets_no_number_is_an_error() -> None:
    # Oracle: d√z/dz is infinite at 0.
    def root(z: Tensor) -> Tensor:
        return 0.5 + 0 * z + (0 * z).sqrt()

    model, x = LinearModel(), images(2)
    with pytest.raises(GradientError, match="NaN or infinite"):
        reparameterized(
            model, x, predicted(model, x), decoder=root, encoder=lambda x: x.clone(), eps=1e-6
        )


def test_rounding_in_the_model_is_still_found() -> None:
    with pytest.raises(GradientError, match="module 'front'"):
        reparameterized(
            behind(Round(), LinearModel()), images(2), torch.tensor([0, 1]), decoder=mirror,
            encoder=mirror,
        )  # fmt: skip
