"""The contract of attacks that run others: where it must be put in other words."""

from __future__ import annotations

import torch
from torch import Tensor

from feint.attacks._stages import ASKED_TWICE
from feint.core.norms import distance
from tests.contracts.attack import AttackContract
from tests.tiny import Counting, LinearModel, TinyConv, images, predicted


class EnsembleContract(AttackContract):
    """Parts may evaluate points beyond the budget; stochastic models take a path of their own."""

    def test_returns_the_best_evaluated_point(self, norm: str) -> None:
        # Oracle: the trace. Most adversarial first, then the largest margin, within the budget.
        model = TinyConv()
        x = images(6, (3, 6, 6)).double()
        y = predicted(model, x)
        for eps in (0.005, 0.1):
            found: dict[int, list[tuple[bool, float, Tensor]]] = {i: [] for i in range(6)}

            def trace(
                _: int,
                points: Tensor,
                logits: Tensor,
                loss: Tensor,
                active: Tensor,
                found: dict[int, list[tuple[bool, float, Tensor]]] = found,
                eps: float = eps,
            ) -> None:
                hit = logits[:, 0].argmax(1) != y[active]
                near = distance(points, x[active], norm) <= eps
                for i, h, value, point, ok in zip(
                    active.tolist(), hit, loss, points, near, strict=True
                ):
                    if ok:
                        found[i].append((bool(h), float(value), point))

            x_adv = self.run(model, x, y, norm, eps=eps, stop="never", trace=trace)
            for i, points in found.items():
                best = max(reversed(points), key=lambda p: p[:2])
                assert torch.equal(x_adv[i], best[2])

    def test_trace_sees_every_evaluated_point(self, norm: str) -> None:
        # Oracle: a count of the samples that go forward; a sample that has fallen is left alone.
        # Only the question whether the model is random without saying so is not traced.
        inner = TinyConv()
        x = images(6, (3, 6, 6)).double()
        y = predicted(inner, x)
        for stop in ("success", "never"):
            model = Counting(inner)
            rows = 0
            steps: list[int] = []
            fallen: set[int] = set()

            def trace(
                step: int,
                points: Tensor,
                logits: Tensor,
                loss: Tensor,
                active: Tensor,
                stop: str = stop,
                steps: list[int] = steps,
                fallen: set[int] = fallen,
            ) -> None:
                nonlocal rows
                rows += len(points)
                steps.append(step)
                assert len(points) == len(logits) == len(loss) == len(active)
                torch.testing.assert_close(logits[:, 0], inner(points), rtol=0, atol=1e-9)
                if stop == "success":
                    assert not fallen & set(active.tolist())
                hit = logits[:, 0].argmax(1) != y[active]
                near = distance(points, x[active], norm) <= 0.1
                fallen.update(active[hit & near].tolist())

            self.run(model, x, y, norm, eps=0.1, trace=trace, stop=stop)
            assert rows == model.forwards - 2 * min(ASKED_TWICE, len(x))
            assert steps == list(range(len(steps)))

    def test_stop_success_saves_passes_and_loses_nothing(self, norm: str) -> None:
        # Oracle: counts.
        inner = LinearModel()
        x = images(8)
        y = predicted(inner, x)
        half = torch.cat([(y[:4] + 1) % 5, y[4:]])
        counts, fooled = {}, {}
        for stop in ("success", "never", None):
            model = Counting(inner)
            fooled[stop] = predicted(inner, self.run(model, x, half, norm, stop=stop)) != half
            counts[stop] = model.forwards
        assert counts["success"] == counts[None] < counts["never"]
        assert torch.equal(fooled["success"], fooled["never"])
        assert bool(fooled["success"][:4].all())
