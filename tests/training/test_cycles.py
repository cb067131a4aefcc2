"""Further cycles of the learning rate. Oracle: the definition, counted by hand."""

from __future__ import annotations

import pytest

from feint.training.fit import one_cycle
from feint.training.recipe import TrainingRecipe


def test_cycles_follow_each_other() -> None:
    recipe = TrainingRecipe(
        name="r",
        architecture="toy",
        epochs=4,
        peak_lr=0.2,
        again=[{"epochs": 2, "peak_lr": 0.05}, {"epochs": 1, "peak_lr": 0.01}],  # type: ignore[arg-type]
    )
    assert recipe.total_epochs == 7
    places = {0: (0.0, 0.2), 3: (0.75, 0.2), 4: (0.0, 0.05), 5: (0.5, 0.05), 6: (0.0, 0.01)}
    for epoch, place in places.items():
        assert recipe.cycle(epoch) == pytest.approx(place)
    assert recipe.cycle(5.5) == pytest.approx((0.75, 0.05))
    # Each cycle rises to its own peak and ends near zero.
    assert one_cycle(recipe.rise, 0.05, recipe.rise) == pytest.approx(0.05, rel=1e-3)
    assert one_cycle(1.0, 0.05, recipe.rise) == pytest.approx(0.0, abs=1e-6)
