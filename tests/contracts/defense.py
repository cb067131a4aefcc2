"""The contract of every defense: what a class declares is measured here.

    class TestJPEG(DefenseContract):
        cls = JPEG
        configs = ({}, {"quality": 50})

Oracles: finite differences in float64 for gradients, autograd of the stand-in for backward rules,
bit equality for everything that must not change, hypothesis for shapes and batch sizes. Override
the class attributes below where a defense needs other images; never a test.
"""

from __future__ import annotations

import copy
import math
import pickle
import random as python_random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import feint.defenses as defenses
from feint.core import random
from feint.core.errors import DtypeError, FeintError, RangeError, ShapeError, UnknownNameError
from feint.core.registry import DEFENSES
from feint.defenses.base import Defense, Params
from tests.contracts.defense_gradients import GradientContract, images, pairwise

__all__ = ["DefenseContract", "images", "pairwise"]

EXAMPLES = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
)


class DefenseContract(GradientContract):
    """Inherit, set `cls` and `configs`, and every test below runs for every configuration."""

    def parse(self, text: str) -> Defense:
        """The defense of an expression, as `build` would make it."""
        return defenses.parse(text)

    # --- what is declared ------------------------------------------------------------------

    def test_class_facts_hold_for_the_default_configuration(self) -> None:
        for fact in ("differentiable", "stochastic", "bounded"):
            assert isinstance(getattr(self.cls, fact), bool)
        if any(self.cls is DEFENSES[name].component for name in DEFENSES):
            assert self.cls().stochastic == self.cls.stochastic
            assert self.cls().differentiable == self.cls.differentiable

    def test_is_documented(self) -> None:
        text = self.cls.__doc__ or ""
        for part in ("Args:", "Cost:", "Example:", "References:", "Claim", "Known break"):
            assert part in text, f"{self.cls.__name__} lacks {part!r} in its docstring"

    def test_representation_shows_the_configuration(self, config: dict[str, Any]) -> None:
        defense = self.build(config)
        for key in config:
            assert key == "preset" or f"{key}=" in repr(defense)
        assert defense.spec == str(defense)

    def test_spec_gives_the_same_defense_back(self, config: dict[str, Any]) -> None:
        defense = self.build(config)
        if "<" in defense.spec or defense.name not in DEFENSES:
            return  # holds a tensor, which cannot be typed
        again = self.parse(defense.spec)
        assert type(again) is type(defense)
        assert again.spec == defense.spec
        again.load_state_dict(defense.state_dict())
        x, keys = self.batch()
        assert torch.equal(again(x, keys), defense(x, keys))

    def test_unknown_keyword_is_refused(self) -> None:
        if self.cls not in [DEFENSES[name].component for name in DEFENSES]:
            return
        name = next(n for n in DEFENSES if DEFENSES[n].component is self.cls)
        with pytest.raises(UnknownNameError, match="keyword of"):
            defenses.parse(f"{name}(no_such_keyword=1)")

    # --- images in, images out -------------------------------------------------------------

    @EXAMPLES
    @given(data=st.data())
    def test_any_shape(self, config: dict[str, Any], data: st.DataObject) -> None:
        b = data.draw(st.integers(0, 3), "batch")
        c = data.draw(st.sampled_from(self.channels), "channels")
        sides = st.integers(self.min_side, self.max_side)
        h, w = data.draw(sides, "height"), data.draw(sides, "width")
        x = images(data.draw(st.integers(0, 99), "seed"), b, c, h, w)
        defense = self.build(config)
        y = defense(x, random.keys(1, b))
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        assert bool(y.isfinite().all())
        if defense.bounded:
            assert bool(((y >= 0) & (y <= 1)).all())

    def test_too_small_is_refused(self, config: dict[str, Any]) -> None:
        side = self.min_side - 1
        if side < 1:
            return
        with pytest.raises(ShapeError):
            self.build(config)(images(0, 1, self.channels[-1], side, side + 5))

    def test_empty_batch(self, config: dict[str, Any]) -> None:
        x = torch.zeros(0, self.channels[-1], self.side, self.side)
        defense = self.build(config)
        assert defense(x).shape == x.shape
        assert defense(x, random.keys(0, 0)).shape == x.shape
        for rule in defense.backward_rules():
            leaf = x.clone().requires_grad_()
            y = defense.view(rule)(leaf, random.keys(0, 0))
            assert torch.autograd.grad(y.sum(), leaf)[0].shape == x.shape

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_dtype_is_kept(self, config: dict[str, Any], dtype: torch.dtype) -> None:
        x, keys = self.batch()
        defense = self.build(config).to(dtype)
        assert defense(x.to(dtype), keys).dtype == dtype

    def test_constant_images_at_the_ends_of_the_range(self, config: dict[str, Any]) -> None:
        defense = self.build(config)
        x = images(5, 2, self.channels[-1], self.side, self.side).round()  # zeros and ones mixed
        x = torch.cat([x, torch.zeros_like(x[:1]), torch.ones_like(x[:1])])
        keys = random.keys(0, len(x))
        y = defense(x, keys)
        if defense.bounded:
            assert bool(((y >= 0) & (y <= 1)).all())
        for rule in (None, *defense.backward_rules()):
            leaf = x.clone().requires_grad_()
            (g,) = torch.autograd.grad(defense.view(rule)(leaf, keys).sum(), leaf)
            assert bool(g.isfinite().all()), rule
            if rule is None:  # the rule that an attacker gets unless he asks for another one
                assert bool(g.flatten(1).any(1).all()), "zero gradient at pixels of 0 and 1"

    def test_input_is_unwritten_and_layout_does_not_matter(self, config: dict[str, Any]) -> None:
        x, keys = self.batch()
        before, version = x.clone(), x._version
        defense = self.build(config)
        y = defense(x, keys)
        assert torch.equal(x, before)
        assert x._version == version
        assert y.data_ptr() != x.data_ptr() or torch.equal(y, x)
        last = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(defense(last, keys), y, rtol=0, atol=self.batch_atol)

    @pytest.mark.gpu
    def test_device_is_kept(self, config: dict[str, Any]) -> None:
        x, keys = self.batch()
        defense = self.build(config)
        y = copy.deepcopy(defense).cuda()(x.cuda(), keys.cuda())
        assert y.is_cuda
        for rule in defense.backward_rules():
            leaf = x.cuda().requires_grad_()
            out = copy.deepcopy(defense).cuda().view(rule)(leaf, keys.cuda())
            assert torch.autograd.grad(out.sum(), leaf)[0].is_cuda

    # --- randomness --------------------------------------------------------------------------

    def test_draws(self, config: dict[str, Any]) -> None:
        defense = self.build(config)
        x, keys = self.batch(16)
        same = defense(x, keys)
        assert torch.equal(same, defense(x, keys))
        params = defense.sample(x, keys)
        assert torch.equal(same, defense.replay(x, params))
        assert all(len(value) == len(x) for value in params.values())
        if defense.stochastic:
            assert not torch.equal(same, defense(x, random.keys(1, 16)))
            assert not torch.equal(defense(x), defense(x)), "no entropy without keys"
        else:
            assert params == {}
            assert torch.equal(same, defense(x, random.keys(1, 16)))
            assert torch.equal(same, defense(x))

    def test_samples_of_one_batch_draw_apart(self, config: dict[str, Any]) -> None:
        defense = self.build(config)
        if not defense.stochastic:
            return
        x, keys = self.batch(1)
        wide = x.repeat(16, 1, 1, 1)
        y = defense(wide, random.fold(keys, "apart", 0, torch.arange(16)).flatten())
        assert any(not torch.equal(y[0], other) for other in y[1:])

    @EXAMPLES
    @given(order=st.permutations(range(5)), size=st.integers(1, 5))
    def test_batch_mates_do_not_matter(
        self, config: dict[str, Any], order: list[int], size: int
    ) -> None:
        defense = self.build(config)
        x, keys = self.batch(5)
        whole = defense(x, keys)
        chosen = torch.tensor(order[:size])
        part = defense(x[chosen], keys[chosen])
        torch.testing.assert_close(part, whole[chosen], rtol=0, atol=self.batch_atol)

    def test_support_is_what_is_drawn_and_evenly(self, config: dict[str, Any]) -> None:
        """Oracle: counting; each count within five standard deviations of its expectation."""
        defense = self.build(config)
        n = 2000
        shape = torch.Size((n, self.channels[-1], self.side, self.side))
        support = defense.support(shape)
        if not defense.stochastic:
            assert support == ({},)
            return
        if support is None:
            return
        drawn = defense.draw(random.keys(3, n), shape)
        matches = torch.stack([_same_draw(drawn, option) for option in support])
        assert bool((matches.sum(0) == 1).all()), "a draw outside the support, or in it twice"
        share = 1 / len(support)
        deviation = math.sqrt(n * share * (1 - share))
        assert bool(((matches.sum(1) - n * share).abs() <= 5 * deviation).all())

    def test_global_randomness_is_untouched(self, config: dict[str, Any]) -> None:
        defense = self.build(config)
        x, keys = self.batch()
        before = (torch.get_rng_state(), python_random.getstate(), np.random.get_state()[1].copy())  # noqa: NPY002
        defense(x, keys)
        defense(x)
        for rule in defense.backward_rules():
            leaf = x.clone().requires_grad_()
            torch.autograd.grad(defense.view(rule)(leaf, keys).sum(), leaf)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert python_random.getstate() == before[1]
        assert np.array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002

    # --- modules -----------------------------------------------------------------------------

    def test_state_copies_and_modes(self, config: dict[str, Any]) -> None:
        defense = self.build(config)
        x, keys = self.batch()
        y = defense(x, keys)
        fresh = self.build(config)
        fresh.load_state_dict(defense.state_dict(), strict=True)
        others = [fresh, copy.deepcopy(defense), pickle.loads(pickle.dumps(defense))]
        others += [copy.deepcopy(defense).train(), copy.deepcopy(defense).eval()]
        for other in others:
            assert torch.equal(other(x, keys), y)
            assert other.spec == defense.spec

    def test_autocast_changes_nothing_for_images(self, config: dict[str, Any]) -> None:
        defense = self.build(config)
        x, keys = self.batch()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = defense(x, keys)
            for rule in defense.backward_rules():
                leaf = x.clone().requires_grad_()
                out = defense.view(rule)(leaf, keys)
                assert torch.equal(out, y)
                (g,) = torch.autograd.grad(out.float().sum(), leaf)
                assert g.dtype == x.dtype
                assert bool(g.isfinite().all())
        if defense.bounded:
            assert torch.equal(y, defense(x, keys))

    # --- bad input -----------------------------------------------------------------------------

    def test_bad_images_are_refused(self, config: dict[str, Any]) -> None:
        defense = self.build(config)
        x, keys = self.batch()
        cases: list[tuple[type[FeintError], Callable[[], Tensor]]] = [
            (ShapeError, lambda: defense(x[0], keys[:1])),
            (DtypeError, lambda: defense((x * 255).to(torch.uint8), keys)),
            (DtypeError, lambda: defense(x.numpy(), keys)),  # type: ignore[arg-type]
        ]
        if defense.bounded:
            cases += [
                (RangeError, lambda: defense(x * 255, keys)),
                (RangeError, lambda: defense(x - 0.5, keys)),
                (RangeError, lambda: defense(torch.full_like(x, float("nan")), keys)),
            ]
        if defense.stochastic:
            cases += [
                (ShapeError, lambda: defense(x, keys[:2])),
                (ShapeError, lambda: defense(x, keys.int())),
            ]
        for error, act in cases:
            with pytest.raises(error):
                act()


def _same_draw(drawn: Params, option: Params) -> Tensor:
    """Which samples of `drawn` equal `option`."""
    assert drawn.keys() == option.keys()
    n = len(next(iter(drawn.values())))
    parts = [(drawn[k] == option[k]).reshape(n, -1).all(1) for k in drawn]
    return torch.stack(parts).all(0)
