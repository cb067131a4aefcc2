"""S1's Table I. Oracles: the paper's figures, and `properties` row by row."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from feint.core.errors import ConfigError
from feint.defenses import parse
from feint.evaluation import properties
from feint.recipes.s1_table1 import CONTROLS, PRESETS, ROWS, table
from tests.contracts.defense import images


def test_rows_are_the_papers() -> None:
    # Oracle: the sums of Table I's three columns, added up from the paper.
    assert [row.name for row in ROWS][:2] == ["FD + RDG", "FD + Rand"]
    assert len(ROWS) == 9
    assert sum(row.rms for row in ROWS) == pytest.approx(1.1468)
    assert sum(row.ssim for row in ROWS) == pytest.approx(5.1290)
    assert sum(row.accuracy for row in ROWS) == pytest.approx(8.56)
    for preset in PRESETS:
        specs = [str(parse(row.expression(preset))) for row in ROWS]
        assert len(set(specs)) == 9
    for row in ROWS:
        assert str(parse(row.repo)) != str(parse(row.paper))
    for text in CONTROLS:
        assert str(parse(text)) == text
    with pytest.raises(ConfigError, match="preset"):
        ROWS[0].expression("code")  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_table_measures_every_row(preset: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 4)).eval()
    x = images(0, 2, 3, 12, 12)
    y = torch.zeros(2, dtype=torch.int64)
    found = table(model, x, y, preset=preset, draws=2)  # type: ignore[arg-type]
    assert list(found) == [row.name for row in ROWS]
    for row in ROWS:
        expected = properties(
            parse(row.expression(preset)),  # type: ignore[arg-type]
            model,
            x,
            y,
            draws=2,
        )
        assert found[row.name].as_dict() == expected.as_dict()
        assert found[row.name].rms.value > 0
