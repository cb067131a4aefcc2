"""Contract of attacks: every step counts, and no gradient is lost in silence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from feint.core.errors import (
    GradientError,
)
from feint.core.norms import distance
from tests.contracts.attack_harness import EPS, AttackHarness, HostSyncs, needs
from tests.tiny import (
    SHAPE,
    Counting,
    Detach,
    LinearModel,
    Round,
    Sawtooth,
    Scaled,
    Shifted,
    TinyConv,
    behind,
    images,
    predicted,
)


class StepsContract(AttackHarness):
    """Best point, trace, stop; invariances; zero gradients."""

    # --- every step counts ------------------------------------------------------------------------

    @needs("eps", goal="budget", knowledge="gradient")
    @pytest.mark.parametrize("stop", ["success", "never"])
    def test_a_single_step_moves_and_is_evaluated(self, norm: str, stop: str) -> None:
        # Oracle: closed form. One step of enough length crosses the boundary of two classes
        # (l1 gives up to 17 % away by stepping on two values instead of the best one).
        model = LinearModel(classes=2, dtype=torch.float64)
        x = images(6, low=0.4, high=0.6).double()
        y = predicted(model, x)
        for i in range(len(x)):
            eps = 1.3 * float(model.distance(x, y, norm)[i])
            over = self.knobs(steps=1, random_start=False, step_size=eps, stop=stop)
            x_adv = self.run(model, x[i : i + 1], y[i : i + 1], norm, eps=eps, **over)
            assert int(predicted(model, x_adv)) != int(y[i])

    @needs("steps", "step_size", "stop", "trace", goal="budget")
    def test_an_early_success_is_not_lost(self, norm: str) -> None:
        # Oracle: closed form. u goes 0.4, 0.85, 1.3: only the middle point is adversarial.
        n, step = 48, 0.05
        reach = {"linf": n * step, "l2": n**0.5 * step, "l1": step}[norm]
        model = Sawtooth(slope=0.45 / reach)
        x, y = torch.full((2, *SHAPE), 0.5, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
        seen: list[Tensor] = []
        over = self.knobs(random_start=False, restarts=1)
        x_adv = self.run(
            model,
            x,
            y,
            norm,
            steps=2,
            step_size=step,
            stop="never",
            trace=lambda _, points, *rest: seen.append(predicted(model, points)),
            **over,
        )
        assert [v.tolist() for v in seen] == [[0, 0], [1, 1], [0, 0]]  # the trap works
        assert predicted(model, x_adv).tolist() == [1, 1]

    @needs("trace", "stop", "eps", goal="budget")
    def test_returns_the_best_evaluated_point(self, norm: str) -> None:
        # Oracle: the trace. Most adversarial first, then the highest loss.
        model = TinyConv()
        x = images(6, (3, 6, 6)).double()
        y = predicted(model, x)
        found: dict[int, list[tuple[bool, float, Tensor]]] = {i: [] for i in range(6)}

        def trace(_: int, points: Tensor, logits: Tensor, loss: Tensor, active: Tensor) -> None:
            hit = logits[:, 0].argmax(1) != y[active]
            for i, h, value, point in zip(active.tolist(), hit, loss, points, strict=True):
                found[i].append((bool(h), float(value), point))

        # A small budget, the usual one, and steps so long that later points are worse ones.
        for share, wide in ((0.05, {}), (1.0, {}), (1.0, self.knobs(step_size=2 * EPS[norm] / 3))):
            for points in found.values():
                points.clear()
            eps = EPS[norm] * share
            x_adv = self.run(model, x, y, norm, eps=eps, stop="never", trace=trace, **wide)
            for i, points in found.items():
                best = max(reversed(points), key=lambda p: p[:2])
                assert torch.equal(x_adv[i], best[2])

    @needs("trace")
    @pytest.mark.parametrize("stop", ["success", "never"])
    def test_trace_sees_every_evaluated_point(self, norm: str, stop: str) -> None:
        # Oracle: a count of the samples that go forward, and the points' own distances.
        inner = TinyConv()
        model = Counting(inner)
        x = images(6, (3, 6, 6)).double()
        y = predicted(inner, x)
        rows = 0
        steps: list[int] = []
        seen: dict[int, list[Tensor]] = {i: [] for i in range(6)}
        fallen: set[int] = set()

        def trace(step: int, points: Tensor, logits: Tensor, loss: Tensor, active: Tensor) -> None:
            nonlocal rows
            rows += len(points)
            steps.append(step)
            assert len(points) == len(logits) == len(loss) == len(active)
            torch.testing.assert_close(logits[:, 0], inner(points), rtol=0, atol=1e-9)
            if "eps" in self.info.parameters:
                assert bool((distance(points, x[active], norm) <= EPS[norm]).all())
            if stop == "success" and self.info.goal == "budget":
                assert not fallen & set(active.tolist())
            fallen.update(active[logits[:, 0].argmax(1) != y[active]].tolist())
            for i, point in zip(active.tolist(), points, strict=True):
                seen[i].append(point)

        x_adv = self.run(model, x, y, norm, trace=trace, **self.knobs(stop=stop))
        assert rows == model.forwards
        assert steps == list(range(len(steps)))
        for i, points in seen.items():
            assert any(torch.equal(x_adv[i], p) for p in points)

    @needs("stop", goal="budget")
    def test_stop_success_saves_passes_and_loses_nothing(self, norm: str) -> None:
        # Oracle: counts. Samples that start adversarial cost one forward pass each and stay as
        # they are (or, from a random start, inside the ball); with "never" all go on.
        inner = LinearModel()
        x = images(8)
        y = predicted(inner, x)
        half = torch.cat([(y[:4] + 1) % 5, y[4:]])
        counts, results = {}, {}
        for stop in ("success", "never"):
            model = Counting(inner)
            results[stop] = self.run(model, x, half, norm, stop=stop)
            counts[stop] = model.forwards
        assert counts["success"] < counts["never"]
        fooled = {k: predicted(inner, v) != half for k, v in results.items()}
        assert bool((fooled["success"] == fooled["never"]).all())
        assert bool(fooled["success"][:4].all())
        model = Counting(inner)
        self.run(model, x, half, norm)
        assert model.forwards == counts["success"]  # the default for a deterministic model
        model.stochastic = True
        model.forwards = 0
        self.run(model, x, half, norm)
        assert model.forwards == counts["never"]  # and for a stochastic one

    @needs("steps", "stop", goal="budget")
    def test_no_host_synchronisation_within_a_step(self, norm: str) -> None:
        # Oracle: count of waiting operations, with few and with many steps.
        model = LinearModel()
        x = images(4)
        y = predicted(model, x)

        def waits(steps: int, stop: str) -> int:
            with HostSyncs() as syncs:
                self.run(model, x, y, norm, steps=steps, stop=stop, **self.knobs(eps=1e-4))
            return syncs.count

        assert waits(12, "never") == waits(2, "never") > 0
        assert waits(12, "success") - waits(2, "success") == 10  # one nonzero a step

    # --- what must not matter ---------------------------------------------------------------------

    @pytest.mark.parametrize("shift", [50.0, -50.0])
    @pytest.mark.parametrize("per_sample", [False, True])
    def test_a_shift_of_the_logits_changes_nothing(
        self, norm: str, shift: float, per_sample: bool
    ) -> None:
        # Oracle: property, to rounding in float64.
        model = TinyConv()
        x = images(5, (3, 6, 6)).double()
        y = predicted(model, x)
        plain = self.run(model, x, y, norm)
        shifted = self.run(Shifted(model, shift, per_sample), x, y, norm)
        torch.testing.assert_close(shifted, plain, rtol=0, atol=1e-8)
        assert torch.equal(predicted(model, shifted), predicted(model, plain))

    def test_pixels_at_the_ends_move_inwards(self, norm: str) -> None:
        # Oracle: closed form. A binary image in the corner of its class: every way out leads
        # inwards. Reparametrisations by arctanh are stuck here.
        model = LinearModel(classes=2)
        y = torch.tensor([0, 1])
        away = (model.weight.detach()[1 - y] - model.weight.detach()[y]).sign()
        x = (away < 0).float()
        assert torch.equal(predicted(model, x), y)
        share = self.knobs(eps={"linf": 0.6, "l2": 5.0, "l1": 30.0, "l0": 16.0}[norm])
        x_adv = self.run(model, x, y, norm, **share)
        moved = x_adv - x
        assert bool((moved.abs().flatten(1).amax(1) > 1e-3).all())
        assert bool((moved * away >= 0).all())
        if norm == "linf":  # the middle of the box, 0.5 away, lies on the boundary
            assert bool((predicted(model, x_adv) != y).all())

    # --- zero gradients ---------------------------------------------------------------------------

    @needs(knowledge="gradient")
    @pytest.mark.parametrize("front", [Round(), Detach()], ids=["round", "detach"])
    def test_a_structural_zero_gradient_is_an_error(self, norm: str, front: nn.Module) -> None:
        # Oracle: the module that we put there. Silence would look like a perfect defense.
        model = behind(front, LinearModel())
        with pytest.raises(GradientError, match="module 'front'") as error:
            self.run(model, images(3), torch.tensor([0, 1, 2]), norm)
        assert error.value.module == "front"

    def test_a_saturated_loss_is_no_error(self, norm: str, dtype: torch.dtype) -> None:
        # Oracle: property. exp(−1000·margin) is 0 in any float; the graph is whole.
        inner = LinearModel(dtype=dtype)
        model = Scaled(inner, 1000.0)
        x = images(4).to(dtype)
        y = predicted(inner, x)
        x_adv = self.run(model, x, y, norm)
        assert bool(x_adv.isfinite().all())
        assert bool(((x_adv >= 0) & (x_adv <= 1)).all())

    @needs(knowledge="gradient")
    def test_a_gradient_that_is_no_number_is_an_error(self, norm: str) -> None:
        # Oracle: d√u/du is infinite at 0, and times zero it is NaN.
        class Root(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                dead = (0.0 * x).flatten(1).sum(1, keepdim=True).sqrt()
                return torch.cat([dead + 5, dead], 1)

        with pytest.raises(GradientError, match="NaN or infinite"):
            self.run(Root(), images(3), torch.zeros(3, dtype=torch.int64), norm)
