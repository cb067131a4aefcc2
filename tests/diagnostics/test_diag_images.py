"""Measures on images. Oracles: linear models, whose predictions on any variant are known; numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from feint.attacks import fgsm
from feint.core.errors import RangeError, ShapeError
from feint.core.norms import norm_of
from feint.diagnostics import (
    LabelMap,
    blend_curve,
    class_rank,
    class_ranks,
    connected_pixels,
    flip_distance,
    label_map,
    masked_attack,
    masked_directions,
    perturbation_directions,
    perturbation_map,
    pixel_attack_rate,
    random_direction,
    rank_shares,
    shifted_direction,
)
from tests.tiny import Counting, LinearModel, StochasticLinear, images, predicted


@given(st.integers(0, 40), st.floats(0, 1), st.integers(1, 9))
def test_pixel_attack_on_a_linear_model(seed: int, value: float, batch_size: int) -> None:
    # Oracle: setting pixel (i, j) to v adds W[:, :, i, j]·(v − x[:, i, j]) to the logits.
    model = LinearModel(dtype=torch.float64, scale=3.0)
    x = images(5, seed=seed, dtype=torch.float64)
    y = torch.arange(5)
    weight = model.weight.detach()
    moved = torch.einsum("kchw,bchw->bhwk", weight, value - x)
    logits = model(x).detach()[:, None, None] + moved
    right = model(x).argmax(1) == y
    broken = (logits.argmax(-1) != y[:, None, None]) & right[:, None, None]
    found = pixel_attack_rate(model, x, y, value=value, batch_size=batch_size)
    assert torch.equal(found.broken, broken)
    assert torch.equal(found.counted, right)
    if right.any():
        torch.testing.assert_close(found.rate, broken.double().sum(0) / right.sum())
    else:
        assert found.rate.isnan().all()
    changed = pixel_attack_rate(model, x, y, value=value, criterion="changed").broken
    assert torch.equal(changed, logits.argmax(-1) != model(x).argmax(1)[:, None, None])


def test_pixel_attack_in_a_window_is_a_part_of_the_whole() -> None:
    model = LinearModel(shape=(3, 9, 8), scale=2.0)
    x = images(4, (3, 9, 8))
    y = predicted(model, x)
    whole, part = pixel_attack_rate(model, x, y), pixel_attack_rate(model, x, y, window=4)
    inside = ~part.rate.isnan()
    rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
    assert int(inside.sum()) == 16
    assert int(rows[0]) % 2 == int(columns[0]) % 2 == 0
    assert torch.equal(part.rate[inside], whole.rate[inside])


def test_pixel_attack_costs_a_forward_pass_per_pixel() -> None:
    counted = Counting(LinearModel())
    x = images(3)
    pixel_attack_rate(counted, x, predicted(counted.model, x))
    assert (counted.forwards, counted.backwards) == (3 * (1 + 16), 0)


def test_variants_of_an_image_meet_one_draw() -> None:
    # Setting a pixel to what it already is changes nothing, so nothing may be broken, however
    # large the noise of the model.
    model, x = StochasticLinear(sigma=2.0), torch.ones(4, 3, 4, 4)
    assert not pixel_attack_rate(model, x, torch.zeros(4).long(), criterion="changed").broken.any()


@given(st.integers(0, 40))
def test_label_map_of_a_linear_model(seed: int) -> None:
    # Oracle: the logits on the plane are z + i·W·a + j·W·b.
    model = LinearModel(dtype=torch.float64)
    x = images(3, seed=seed, dtype=torch.float64)
    a = random_direction(x, seed=seed)
    b = random_direction(x, seed=seed + 1, off=a)
    torch.testing.assert_close(norm_of(a, "l2"), torch.ones(3).double())
    torch.testing.assert_close(
        (a * b).flatten(1).sum(1), torch.zeros(3).double(), atol=1e-12, rtol=0
    )
    found = label_map(model, x, a, b, reach=2.0, points=7, batch_size=20)
    torch.testing.assert_close(found.axis, torch.linspace(-2, 2, 7).double())
    along, up = (torch.einsum("kchw,bchw->bk", model.weight.detach(), d) for d in (a, b))
    i, j = found.axis[None, None, :, None], found.axis[None, :, None, None]
    logits = model(x).detach()[:, None, None] + i * along[:, None, None] + j * up[:, None, None]
    assert torch.equal(found.labels, logits.argmax(-1))
    assert torch.equal(found.labels[:, 3, 3], predicted(model, x))
    turned = label_map(model, x, b, a, reach=2.0, points=7)
    assert torch.equal(turned.labels, found.labels.transpose(1, 2))


def test_clipped_label_map_stays_among_images() -> None:
    model, x = LinearModel(dtype=torch.float64), torch.ones(1, 3, 4, 4).double()
    up = torch.ones_like(x)
    found = label_map(model, x, up, up, reach=9.0, points=5, clip=True)
    black, white = predicted(model, torch.cat([0 * x, x]))
    i, j = found.axis[None, :], found.axis[:, None]
    assert bool((found.labels[0][i + j >= 0] == white).all())
    assert bool((found.labels[0][i + j <= -1] == black).all())


def test_flip_distance_reads_the_axes() -> None:
    labels = torch.zeros(2, 5, 5).long()
    labels[0, 2, 4] = 1
    labels[0, 1, 2] = 1
    labels[1, 0, 0] = 1  # off the axes
    along, up = flip_distance(LabelMap(labels, torch.tensor([-2.0, -1, 0, 1, 2])))
    assert along.tolist() == [2, torch.inf]
    assert up.tolist() == [1, torch.inf]


@given(st.integers(0, 30))
def test_masked_directions_split_the_gradient(seed: int) -> None:
    g = images(3, (2, 5, 6), seed, low=-1.0, dtype=torch.float64)
    c = connected_pixels(None, 5, 6)
    off, on = masked_directions(g, c)
    assert not off[..., c].any()
    assert not on[..., ~c].any()
    sizes = [norm_of(g * m, "l2").view(-1, 1, 1, 1) for m in (~c, c)]
    torch.testing.assert_close(off * sizes[0] + on * sizes[1], g)


@given(st.integers(-2, 2), st.integers(-2, 2))
def test_shifted_direction_moves_with_zeros(dx: int, dy: int) -> None:
    # Oracle: index arithmetic on a padded array.
    delta = images(2, (3, 5, 6))
    padded = torch.nn.functional.pad(delta, (3, 3, 3, 3))
    expected = padded[..., 3 - dy : 8 - dy, 3 - dx : 9 - dx]
    assert torch.equal(shifted_direction(delta, dx, dy), expected)


def test_perturbation_directions_have_norm_one() -> None:
    x = images(2)
    for direction in perturbation_directions(x, 1 - x):
        torch.testing.assert_close(norm_of(direction, "l2"), torch.ones(2))
    assert not perturbation_directions(x, x)[0].any()


def test_perturbation_maps_are_means() -> None:
    # Oracle: numpy, image by image.
    x, x_adv = images(4, seed=1), images(4, seed=2)
    x_adv[3] = x[3]
    size = np.abs(x_adv.double().numpy() - x.double().numpy()).mean(1)
    np.testing.assert_allclose(perturbation_map(x, x_adv).numpy(), size.mean(0))
    place = np.stack([s / s.sum() if s.sum() else s for s in size]).mean(0)
    found = perturbation_map(x, x_adv, weigh="place")
    np.testing.assert_allclose(found.numpy(), place)
    assert abs(float(found.sum()) - 0.75) < 1e-12


def test_blend_of_a_linear_model_in_closed_form() -> None:
    # Oracle: W·(x + m⊙δ), mask by mask; pixels ranked by numpy.
    model = LinearModel(dtype=torch.float64)
    x = images(6, dtype=torch.float64)
    y, score, x_adv = predicted(model, x), images(1, (4, 4))[0], 1 - x
    found = blend_curve(model, x, y, x_adv, score, shares=[0.0, 0.25, 0.6, 1.0], batch_size=5)
    order = np.argsort(score.numpy().ravel())
    for k, share in enumerate(found.shares.tolist()):
        count = int(share * 16 + 1e-9)
        for chosen, right in ((order[16 - count :], found.top), (order[:count], found.bottom)):
            mask = torch.zeros(16, dtype=torch.bool)
            mask[torch.from_numpy(chosen.copy())] = True
            mixed = x + (x_adv - x) * mask.view(4, 4)
            assert torch.equal(right[k], predicted(model, mixed) == y)
    assert bool(found.top[0].all())
    assert bool(found.bottom[0].all())
    assert torch.equal(found.top[-1], found.bottom[-1])


def test_masked_attack_of_a_linear_model_in_closed_form() -> None:
    # Oracle: of two classes, eps·Σ_mask |w_1 − w_0| is all that an linf attack can move the margin.
    model = LinearModel(classes=2, dtype=torch.float64)
    x = images(12, low=0.3, high=0.7, dtype=torch.float64)
    y, score, eps = predicted(model, x), images(1, (4, 4), 5)[0], 0.12
    gap = model(x).detach()
    gap = (gap.gather(1, y[:, None]) - gap.gather(1, 1 - y[:, None]))[:, 0]
    slope = (model.weight[1] - model.weight[0]).detach().abs().sum(0)

    def attack(*args: object, **kwargs: object) -> torch.Tensor:
        return fgsm(*args, eps=eps, **kwargs)  # type: ignore[arg-type]

    found = masked_attack(model, x, y, score, shares=[0.25, 0.5], attack=attack, batch_size=5)
    for k, count in enumerate((4, 8)):
        order = score.flatten().argsort()
        for rows, right in ((order[16 - count :], found.top), (order[:count], found.bottom)):
            reach = eps * slope.flatten()[rows].sum()
            assert torch.equal(right[k], gap > reach)
    alone = masked_attack(model, x, y, score, shares=[0.5], attack=attack, order=["top"])
    assert torch.equal(alone.top[0], found.top[1])
    assert bool(alone.bottom.all())


@given(st.integers(0, 40), st.integers(2, 9))
def test_class_rank_is_a_stable_sort(seed: int, classes: int) -> None:
    # Oracle: numpy's stable sort; ties on purpose.
    logits = (images(6, (classes,), seed) * 4).floor()
    label = torch.arange(6) % classes
    order = np.argsort(-logits.numpy(), axis=1, kind="stable")
    expected = [list(row).index(k) + 1 for row, k in zip(order, label.tolist(), strict=True)]
    assert class_rank(logits, label).tolist() == expected
    assert bool((class_rank(logits, logits.argmax(1)) == 1).all())


def test_class_ranks_of_an_attack() -> None:
    model = LinearModel(dtype=torch.float64)
    x, x_adv = images(8, dtype=torch.float64), images(8, seed=3, dtype=torch.float64)
    found = class_ranks(model, x, x_adv, batch_size=3)
    clean, hit = model(x), model(x_adv)
    assert torch.equal(found.adversarial, class_rank(clean, hit.argmax(1)))
    assert torch.equal(found.original, class_rank(hit, clean.argmax(1)))
    assert torch.equal(found.moved, clean.argmax(1) != hit.argmax(1))
    assert torch.equal(found.moved, found.adversarial > 1)
    shares = rank_shares(found.adversarial, found.moved, top=3)
    assert abs(float(shares.sum()) - 1) < 1e-12
    assert float(shares[0]) == 0
    assert rank_shares(found.adversarial, torch.zeros(8, dtype=torch.bool)).isnan().all()


def test_bad_input_is_refused() -> None:
    model, x, y = LinearModel(), images(2), torch.tensor([0, 1])
    with pytest.raises(RangeError, match="white"):
        pixel_attack_rate(model, x, y, value=255)
    with pytest.raises(RangeError, match="short side"):
        pixel_attack_rate(model, x, y, window=5)
    with pytest.raises(RangeError, match="wrong"):
        pixel_attack_rate(model, x, y, criterion="flipped")  # type: ignore[arg-type]
    with pytest.raises(RangeError, match="odd"):
        label_map(model, x, x, x, reach=1.0, points=4)
    with pytest.raises(ShapeError, match="second"):
        label_map(model, x, x, x[:, :1], reach=1.0, points=3)
    with pytest.raises(RangeError, match="shorter"):
        shifted_direction(x, dx=4)
    with pytest.raises(ShapeError, match="one shape"):
        perturbation_map(x, x[:1])
    with pytest.raises(RangeError, match="place"):
        perturbation_map(x, x, weigh="mass")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="score"):
        blend_curve(model, x, y, x, torch.rand(3, 3))
    with pytest.raises(RangeError, match="shares"):
        masked_attack(model, x, y, torch.rand(4, 4), shares=[2.0])
    with pytest.raises(RangeError, match="both"):
        masked_attack(model, x, y, torch.rand(4, 4), order=["left"])  # type: ignore[list-item]
    with pytest.raises(ShapeError, match="B×K"):
        class_rank(torch.rand(2, 3), torch.tensor([0]))
    with pytest.raises(RangeError, match="top"):
        rank_shares(y + 1, top=0)
