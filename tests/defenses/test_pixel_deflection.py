"""Pixel Deflection. Oracles: plain sequential numpy loops, counting, scipy's χ², FACTS' goldens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from feint.core import random
from feint.core.errors import ConfigError, RangeError, ShapeError
from feint.defenses import Defense, PixelDeflection, parse
from feint.defenses.pixel_deflection import _attempts, resolve_moves
from tests.contracts.defense import DefenseContract, images
from tests.defenses.test_activation import NET


def brightness(x: torch.Tensor) -> torch.Tensor:
    """A map made from the image itself."""
    return x.mean(1, keepdim=True)


class TestPixelDeflection(DefenseContract):
    cls = PixelDeflection
    configs = (
        {},
        {"preset": "paper"},
        {"preset": "ace", "window": 3},
        {"preset": "qiu", "deflections": 20},
        {"deflections": 40, "activation_map": brightness},
        {"deflections": 0},
    )
    min_side = 2
    batch_atol = 0.0


class TestWithAFixedMap(DefenseContract):
    cls = PixelDeflection
    configs = ({"deflections": 50, "activation_map": torch.linspace(0, 1, 144).view(12, 12)},)
    min_side = max_side = 12
    batch_atol = 0.0


class TestPixelDeflectionWithAMap(DefenseContract):
    """The whole contract, with the defense bound to a classifier."""

    cls = PixelDeflection
    configs = ({"activation_map": "rcam"}, {"activation_map": "rcam_repo", "preset": "paper"})
    channels = (3,)
    min_side = 2
    max_side = 17

    def parse(self, text: str) -> Defense:
        return parse(text).bind(NET)

    def build(self, config: dict[str, object]) -> PixelDeflection:
        bound = PixelDeflection(**config).bind(NET)  # type: ignore[arg-type]
        assert isinstance(bound, PixelDeflection)
        return bound


# --- many moves at once equal the moves one by one ----------------------------------------------


@given(data=st.data())
def test_resolved_moves_equal_the_sequential_loop(data: st.DataObject) -> None:
    places = data.draw(st.integers(1, 9))  # few places: long chains and many overwritten ones
    place = st.integers(0, places - 1)
    moves = data.draw(st.lists(st.tuples(place, place), min_size=1, max_size=40))
    target, source = (torch.tensor(v)[None] for v in zip(*moves, strict=True))
    origin, last = resolve_moves(target, source)
    sequential, at_once = np.arange(places), np.arange(places)
    for t, s in moves:
        sequential[t] = sequential[s]
    at_once[target[0]] = origin[0]
    assert at_once.tolist() == sequential.tolist()
    for m, (t, _) in enumerate(moves):
        assert bool(last[0, m]) == (t not in [later for later, _ in moves[m + 1 :]])


def test_a_chain_is_followed_to_its_end() -> None:
    # Closed form: each move reads what the one before has written, so all carry value 0.
    n = 1000
    target, source = torch.arange(1, n + 1)[None], torch.arange(n)[None]
    origin, last = resolve_moves(target, source)
    assert not bool(origin.any())
    assert bool(last.all())


def sequential(image: np.ndarray, u: dict[str, np.ndarray], edges: str, window: int, attempts: int):
    """The original's loop on one image (C, H, W), with given uniform numbers, without a map."""
    out = image.copy()
    channels, height, width = image.shape
    short = edges == "randint"
    for m in range(attempts):
        flat = int(u["place"][m] * ((height - short) * (width - short)))
        r, c = divmod(flat, width - short)
        valid = []
        for centre, n in ((r, height), (c, width)):
            offsets = range(-window, window + 1 - short)
            first = -1 if edges == "square" else 0
            valid.append([centre + a for a in offsets if first < centre + a < n])
        a = valid[0][int(u["row"][m] * len(valid[0]))]
        b = valid[1][int(u["column"][m] * len(valid[1]))]
        out[m % channels, r, c] = out[m % channels, a, b]
    return out


@pytest.mark.parametrize("edges", ["open", "randint", "square"])
@pytest.mark.parametrize(("count", "attempts"), [("move", 42), ("triple", 120), ("attempt", 40)])
def test_output_equals_the_plain_loop(edges: str, count: str, attempts: int) -> None:
    defense = PixelDeflection(deflections=40, window=4, count=count, edges=edges)
    x, keys = images(1, 3, 3, 9, 7), random.keys(2, 3)
    params = defense.draw(keys, x.shape)
    y = defense(x, keys)
    for i in range(3):
        u = {name: value[i].numpy() for name, value in params.items()}
        expected = sequential(x[i].numpy(), u, edges, 4, attempts)
        np.testing.assert_array_equal(y[i].numpy(), expected)


def test_whole_pixels_move_together() -> None:
    # Property: every output pixel is some input pixel with all its channels.
    x = images(3, 1, 3, 10, 10)
    y = PixelDeflection(preset="paper", deflections=300)(x, random.keys(0, 1))
    colors = {tuple(p.tolist()) for p in x[0].flatten(1).T}
    moved = [tuple(p.tolist()) for p in y[0].flatten(1).T]
    assert all(p in colors for p in moved)
    assert len(set(moved)) < 100


# --- what K counts ---------------------------------------------------------------------------


def moves_made(
    defense: PixelDeflection, shape: tuple[int, ...], keys: torch.Tensor
) -> torch.Tensor:
    """Moves per sample, recovered from the attempts; independent of the pixels."""
    x = torch.zeros(len(keys), *shape)
    keep = defense._keep(x)
    gap = defense.draw(keys, x.shape)["gap"]
    turn = (
        torch.arange(gap.shape[1]).expand_as(gap)
        if keep is None
        else _attempts(gap, keep.flatten(1).mean(1, keepdim=True))
    )
    return defense._made(turn, defense._turn(shape[0])).sum(1)


@pytest.mark.parametrize(
    ("preset", "moves"), [("repo", 201), ("paper", 100), ("ace", 102), ("qiu", 1800)]
)
def test_counts_without_a_map(preset: str, moves: int) -> None:
    # Closed form: K is checked between triples, so 200 → 201 and 100 → 102; 600 triples → 1800.
    made = moves_made(PixelDeflection(preset=preset), (3, 20, 20), random.keys(0, 2))
    assert made.tolist() == [moves, moves]


def test_counts_with_a_map_follow_the_loop_with_rejections() -> None:
    """Oracle: the plain loop with an acceptance chance of 0.3, simulated; two-sample χ² test."""
    rng = np.random.default_rng(0)

    def loop(count: str, k: int) -> int:
        made = turns = attempts = 0
        while (made < k) if count == "move" else (turns if count == "triple" else attempts) < k:
            for _ in range(1 if count == "attempt" else 3):
                made += rng.random() < 0.3
                attempts += 1
            turns += 1
        return made

    for count, k in (("move", 5), ("triple", 4), ("attempt", 10)):
        defense = PixelDeflection(
            deflections=k, count=count, activation_map=torch.full((4, 4), 0.7)
        )
        got = moves_made(defense, (3, 4, 4), random.keys(0, 4000)).numpy()
        expected = np.array([loop(count, k) for _ in range(4000)])
        values = np.unique(np.concatenate([got, expected]))
        table = np.array([[np.sum(sample == v) for v in values] for sample in (got, expected)])
        table = table[:, table.min(0) >= 5]
        assert stats.chi2_contingency(table).pvalue > 0.01, count


def test_places_follow_the_map() -> None:
    """Oracle: χ² against 1 − map; where the map is 1 nothing ever moves."""
    saliency = torch.tensor([[0.0, 0.5, 1.0, 0.25], [1.0, 0.9, 0.0, 0.75]])
    defense = PixelDeflection(
        deflections=1, together=True, edges="square", window=4, activation_map=saliency
    )
    x = (torch.arange(8.0) / 8).view(1, 1, 2, 4).repeat(8000, 1, 1, 1)
    moved = (defense(x, random.keys(0, 8000)) != x)[:, 0].sum(0).flatten().numpy()
    share = (1 - saliency).flatten().double().numpy()
    assert (moved[share == 0] == 0).all()
    # a move onto itself is not seen: 7 of 8 sources differ, whatever the place
    expected = share / share.sum() * moved.sum()
    assert stats.chisquare(moved[share > 0], expected[share > 0]).pvalue > 0.01


def test_a_map_of_zeros_is_no_map() -> None:
    # Closed form: with acceptance 1 every attempt is a move, at the same places.
    x, keys = images(0, 3, 3, 12, 11), random.keys(0, 3)
    for preset in ("repo", "paper", "ace", "qiu"):
        free = PixelDeflection(preset=preset)
        mapped = PixelDeflection(preset=preset, activation_map=torch.zeros(12, 11))
        assert torch.equal(free(x, keys), mapped(x, keys))


@pytest.mark.parametrize("count", ["move", "triple", "attempt"])
def test_a_map_of_ones_moves_nothing(count: str) -> None:
    x = images(0, 2, 3, 8, 8)
    assert torch.equal(PixelDeflection(count=count, activation_map=torch.ones(8, 8))(x), x)


# --- where it reads and writes -----------------------------------------------------------------


@pytest.mark.parametrize("edges", ["open", "randint", "square"])
def test_sources_and_targets(edges: str) -> None:
    """Closed form: all valid offsets occur, and none else."""
    n, window = 7, 3
    place = torch.arange(n).repeat_interleave(500)[None]
    u = random.uniform(random.keys(0, 1), (place.shape[1],), dtype=torch.float64)
    source = PixelDeflection(edges=edges, window=window)._source(place, u, n)[0].view(n, 500)
    for r in range(n):
        first = 0 if edges == "square" else 1
        reach = window - (edges == "randint")
        assert source[r].unique().tolist() == list(
            range(max(first, r - window), min(n - 1, r + reach) + 1)
        )


def test_edges_of_each_variant() -> None:
    # Closed form: "open" never reads row or column 0; "randint" never writes the last ones.
    x = torch.zeros(1, 1, 6, 6)
    x[..., 0, :] = x[..., :, 0] = 1.0
    keys = random.keys(0, 1)
    for edges in ("open", "randint"):
        y = PixelDeflection(deflections=2000, edges=edges)(x, keys)
        assert not bool(y[..., 1:, 1:].any()), edges
    assert bool(PixelDeflection(deflections=200, edges="square")(x, keys)[..., 1:, 1:].any())
    distinct = images(1, 1, 1, 6, 6)
    y = PixelDeflection(deflections=2000, edges="randint")(distinct, keys)
    assert torch.equal(y[..., -1, :], distinct[..., -1, :])
    assert torch.equal(y[..., -1], distinct[..., -1])


def test_gradient_is_that_of_the_gather() -> None:
    # Closed form: each output value has slope 1 to the one input value that it carries.
    defense, keys = PixelDeflection(deflections=120), random.keys(0, 1)
    x = images(5, 1, 3, 8, 8).requires_grad_()
    y = defense(x, keys)
    (g,) = torch.autograd.grad(y.sum(), x)
    with torch.no_grad():
        copies = (y.flatten()[None] == x.flatten()[:, None]).sum(1)  # all input values differ
    assert torch.equal(g.flatten(), copies.float())


def test_a_module_can_make_the_map() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 3, padding=1), torch.nn.Sigmoid())
    defense = PixelDeflection(activation_map=net)
    assert "map_of.0.weight" in defense.state_dict()
    x = images(0, 2, 3, 8, 8)
    assert defense(x, random.keys(0, 2)).shape == x.shape
    assert not defense(x, random.keys(0, 2)).requires_grad


def test_bad_configurations_and_maps_are_refused() -> None:
    x = images(0, 2, 3, 8, 8)
    with pytest.raises(RangeError, match="deflections"):
        PixelDeflection(deflections=-1)
    with pytest.raises(RangeError, match="window"):
        PixelDeflection(edges="randint", window=1)
    with pytest.raises(ConfigError, match="count"):
        PixelDeflection(count="pixel")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="edges"):
        PixelDeflection(edges="closed")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="activation_map"):
        PixelDeflection(activation_map=torch.zeros(7, 8))(x)
    with pytest.raises(RangeError, match="activation_map"):
        PixelDeflection(activation_map=torch.full((8, 8), 2.0))(x)


@pytest.mark.reference
@pytest.mark.parametrize(
    ("config", "rms", "ssim"),
    [
        ({"deflections": 100}, 0.0026, 0.9994),
        ({"deflections": 200}, 0.0038, 0.9987),
        ({"deflections": 600}, 0.0066, 0.9963),
        ({"preset": "qiu"}, 0.0116, 0.989),
    ],
)
def test_golden_distances_on_natural_images(config, rms: float, ssim: float, natural) -> None:
    """Frozen values of FACTS §9.2, measured for the original on 25 of the shared images."""
    got_rms, got_ssim = natural.distances(PixelDeflection(**config))
    assert got_rms == pytest.approx(rms, rel=0.1)
    assert 1 - got_ssim == pytest.approx(1 - ssim, rel=0.35)
