"""Contract of attacks: what goes in and out, and that nothing else matters or is touched."""

from __future__ import annotations

import random as python_random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from feint.core import random
from feint.core.norms import distance
from tests.contracts.attack_harness import EPS, AttackHarness, needs
from tests.tiny import (
    LinearModel,
    StochasticLinear,
    TinyConv,
    images,
    predicted,
)


class BatchContract(AttackHarness):
    """Box, budget, types; no trace left; independence of the batch; seeds."""

    # --- range, budget, types ---------------------------------------------------------------------

    @given(
        channels=st.sampled_from([1, 3]),
        height=st.integers(1, 5),
        width=st.integers(1, 5),
        batch=st.integers(0, 4),
        share=st.floats(0, 1),
        seed=st.integers(-(2**40), 2**70),
        double=st.booleans(),
        kind=st.sampled_from(["any", "inner", "binary"]),
        never=st.booleans(),
    )
    def test_stays_in_the_box_and_the_ball(
        self,
        norm: str,
        channels: int,
        height: int,
        width: int,
        batch: int,
        share: float,
        seed: int,
        double: bool,
        kind: str,
        never: bool,
    ) -> None:
        # Oracle: property. Any shape, budget, batch size; measured in float64, without tolerance.
        shape, dtype = (channels, height, width), (torch.float32, torch.float64)[double]
        x = images(batch, shape, seed).to(dtype)
        x = {"any": x, "inner": 0.25 + x / 2, "binary": x.round()}[kind]
        before = x.clone()
        most = {"linf": 1.0, "l2": x[:1].numel() ** 0.5, "l1": float(x[:1].numel())}
        eps = share**3 * most.get(norm, 1.0)
        y = random.integers(random.keys(seed, batch), 0, 5)
        model = LinearModel(shape=shape, dtype=dtype)
        budget = self.knobs(eps=eps)
        stop = self.knobs(stop="never" if never else None)
        x_adv = self.run(model, x, y, norm, seed=seed, **budget, **stop)
        assert x_adv.shape == x.shape
        assert x_adv.dtype == x.dtype
        assert x_adv.device == x.device
        assert not x_adv.requires_grad
        assert bool(((x_adv >= 0) & (x_adv <= 1)).all())
        if budget:
            assert bool((distance(x_adv, x, norm) <= eps).all())
        assert torch.equal(x, before)

    @needs("eps")
    def test_eps_zero_returns_x(self, norm: str, dtype: torch.dtype) -> None:
        # Oracle: closed form.
        x = images(4).to(dtype)
        model = LinearModel(dtype=dtype)
        assert torch.equal(self.run(model, x, predicted(model, x), norm, eps=0.0), x)

    def test_an_empty_batch_gives_an_empty_batch(self, norm: str, linear: LinearModel) -> None:
        x = images(0).to(linear.weight.dtype)
        x_adv = self.run(linear, x, torch.empty(0, dtype=torch.int64), norm)
        assert x_adv.shape == x.shape
        assert x_adv.dtype == x.dtype
        assert x_adv.data_ptr() == 0 or x_adv is not x

    @pytest.mark.gpu
    def test_stays_on_the_device(self, norm: str) -> None:
        # Oracle: the same run on the CPU.
        x, model = images(4).double(), LinearModel(dtype=torch.float64)
        y = predicted(model, x)
        here = self.run(model, x, y, norm)
        there = self.run(model.cuda(), x.cuda(), y.cuda(), norm)
        assert there.device.type == "cuda"
        torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-9)

    # --- no trace left ----------------------------------------------------------------------------

    def test_leaves_no_trace(self, norm: str) -> None:
        # Oracle: property. Inputs, parameters, buffers, modes and generators are as before.
        model = TinyConv(batch_norm=True)
        model.linear.train()  # a mixture of modes; a linear layer behaves the same in both
        model.conv1.weight.requires_grad_(False)
        model.conv2.weight.grad = torch.ones_like(model.conv2.weight)
        x = images(3).double()
        y = predicted(model, x)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        flags = [(p.requires_grad, p.grad) for p in model.parameters()]
        modes = [m.training for m in model.modules()]
        x_before, y_before, version = x.clone(), y.clone(), x._version
        torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
        python_state, grad_mode = python_random.getstate(), torch.is_grad_enabled()
        self.run(model, x, y, norm)
        assert torch.equal(x, x_before)
        assert torch.equal(y, y_before)
        assert x._version == version
        assert x.grad is None
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        for parameter, (flag, gradient) in zip(model.parameters(), flags, strict=True):
            assert parameter.requires_grad is flag
            assert parameter.grad is gradient
            assert gradient is None or bool((gradient == 1).all())
        assert [m.training for m in model.modules()] == modes
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert all(
            np.array_equal(a, b)
            for a, b in zip(np.random.get_state(), numpy_state, strict=True)  # noqa: NPY002
        )
        assert python_random.getstate() == python_state
        assert torch.is_grad_enabled() is grad_mode

    def test_works_without_grad_mode_and_on_a_leaf(self, linear: LinearModel) -> None:
        # Oracle: the run under ordinary conditions.
        norm = self.info.norms[0]
        x = images(3).to(linear.weight.dtype)
        y = predicted(linear, x)
        usual = self.run(linear, x, y, norm)
        with torch.no_grad():
            assert torch.equal(self.run(linear, x, y, norm), usual)
        leaf = x.clone().requires_grad_()
        x_adv = self.run(linear, leaf, y, norm)
        assert torch.equal(x_adv, usual)
        assert not x_adv.requires_grad
        assert leaf.grad is None

    # --- independence of the batch ----------------------------------------------------------------

    @given(
        batch=st.integers(2, 6),
        cut=st.integers(1, 5),
        seed=st.integers(0, 2**32),
        share=st.floats(0.05, 1.0),
    )
    def test_independent_of_the_batch_on_a_linear_model(
        self, norm: str, batch: int, cut: int, seed: int, share: float
    ) -> None:
        # Oracle: property, bit by bit. Keys name the samples; the batch is merely how they travel.
        model = LinearModel()
        x = images(batch, seed=seed)
        y = predicted(model, x)
        keys = random.keys(seed, torch.arange(batch) + 100)
        budget = self.knobs(eps=EPS[norm] * share)

        def attacked(rows: Tensor) -> Tensor:
            return self.run(model, x[rows], y[rows], norm, seed=keys[rows], **budget)

        rows = torch.arange(batch)
        whole = attacked(rows)
        assert torch.equal(torch.cat([attacked(rows[i : i + 1]) for i in range(batch)]), whole)
        assert torch.equal(torch.cat([attacked(rows[:cut]), attacked(rows[cut:])]), whole)
        order = random.permutation(random.keys(seed, 1), batch)[0]
        assert torch.equal(attacked(order), whole[order])
        repeated = torch.cat([rows, rows])
        assert torch.equal(attacked(repeated), torch.cat([whole, whole]))

    @pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "batch norm"])
    def test_independent_of_the_batch_on_a_network(self, norm: str, batch_norm: bool) -> None:
        # Oracle: property, to the rounding of a convolution in float64.
        model = TinyConv(batch_norm)
        x = images(5, (3, 6, 6)).double()
        y, keys = predicted(model, x), random.keys(3, [8, 6, 7, 5, 3])
        whole = self.run(model, x, y, norm, seed=keys)
        order = torch.tensor([3, 0, 4, 2, 1])
        shuffled = self.run(model, x[order], y[order], norm, seed=keys[order])
        torch.testing.assert_close(shuffled, whole[order], rtol=0, atol=1e-9)
        single = [
            self.run(model, x[i : i + 1], y[i : i + 1], norm, seed=keys[i : i + 1])
            for i in range(5)
        ]
        torch.testing.assert_close(torch.cat(single), whole, rtol=0, atol=1e-9)

    def test_independent_of_the_batch_on_a_stochastic_model(self, norm: str) -> None:
        # Oracle: property, bit by bit: draws follow the samples, too.
        model = StochasticLinear()
        x, keys = images(4), random.keys(11, 4)
        y = predicted(LinearModel(), x)
        whole = self.run(model, x, y, norm, seed=keys)
        order = torch.tensor([2, 3, 0, 1])
        shuffled = self.run(model, x[order], y[order], norm, seed=keys[order])
        assert torch.equal(shuffled, whole[order])
        assert torch.equal(self.run(model, x[1:2], y[1:2], norm, seed=keys[1:2]), whole[1:2])

    @needs("stop")
    def test_calls_do_not_grow_with_the_batch(self, norm: str) -> None:
        # Oracle: closed form: samples share the passes of a batch.
        calls = []
        for batch in (1, 7):
            seen: list[int] = []
            model = LinearModel()
            x = images(batch)
            y = predicted(model, x)
            model.register_forward_hook(lambda *_, seen=seen: seen.append(1))
            self.run(model, x, y, norm, stop="never")
            calls.append(len(seen))
        assert calls[0] == calls[1]

    # --- seeds ------------------------------------------------------------------------------------

    def test_same_seed_same_result(self, norm: str, linear: LinearModel) -> None:
        x = images(4).to(linear.weight.dtype)
        y = predicted(linear, x)
        once = self.run(linear, x, y, norm, seed=5)
        assert torch.equal(self.run(linear, x, y, norm, seed=5), once)
        assert torch.equal(self.run(linear, x, y, norm, seed=random.keys(5, 4)), once)

    def test_another_seed_differs_if_the_attack_is_random(self, norm: str) -> None:
        model = TinyConv()
        x = images(4, (3, 6, 6)).double()
        y = predicted(model, x)
        same = torch.equal(self.run(model, x, y, norm, seed=1), self.run(model, x, y, norm, seed=2))
        assert same is not self.random
