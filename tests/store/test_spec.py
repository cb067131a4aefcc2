"""Specs: what is given is kept, what is wrong is named. Oracle: the rules themselves."""

from __future__ import annotations

from typing import Any

import pytest

from feint.core.errors import ConfigError, UnknownNameError
from feint.evaluation import Cell
from feint.store import RunSpec
from feint.store.spec import first_difference

CELL = {"scenario": "none", "model": "bundled:x"}


def test_given_is_what_was_typed_and_full_has_the_defaults() -> None:
    spec = RunSpec(cells=[CELL], data={"samples": 7}, published={0: {"label": "a", "value": 0.5}})
    assert spec.given == {
        "cells": [CELL],
        "data": {"samples": 7},
        "published": {"0": {"label": "a", "value": 0.5}},
    }
    assert spec.full["cells"] == [Cell(**CELL).spec()]
    assert (spec.full["shard_size"], spec.full["data"]["split"]) == (100, "test")


def test_full_makes_the_same_spec_again() -> None:
    spec = RunSpec(cells=[Cell(**CELL)], published={0: {"label": "a", "value": 0.5}})
    assert RunSpec(**spec.full) == spec == RunSpec.model_validate_json(spec.model_dump_json())


def test_eps_may_be_a_fraction() -> None:
    assert RunSpec(cells=[{**CELL, "eps": "8/255"}]).cells[0].eps == 8 / 255


def test_options_of_the_execution_are_no_content() -> None:
    plain = RunSpec(cells=[CELL])
    other = RunSpec(cells=[CELL], batch_size=3, device="cuda", threads=2, workers=2, title="t")
    assert plain.content == other.content
    assert plain.content != RunSpec(cells=[CELL], shard_size=3).content


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "cells: Field required"),
        ({"cells": []}, "cells: there are none"),
        ({"cells": [CELL, CELL]}, "cell 1 is cell 0 again"),
        ({"cells": [{**CELL, "epz": 1}]}, "cells.0: unknown field of a cell 'epz'.*'eps'"),
        ({"cells": [{**CELL, "eps": "x"}]}, "cells.0: 'x' is no number"),
        ({"cells": [{**CELL, "eps": -1}]}, "cells.0: eps is -1"),
        ({"cells": [{**CELL, "seed": 0.5}]}, "cells.0.seed: .*integer"),
        ({"cells": [{**CELL, "attack": "pgd"}]}, "cells.0: scenario 'none' with attack 'pgd'"),
        ({"cells": [CELL], "shard_size": 0, "bogus": 1}, "shard_size.*bogus"),
        ({"cells": [CELL], "data": {"samples": 0}}, "data.samples"),
        ({"cells": [CELL], "arch": "resnet20"}, "arch is 'resnet20'.*leave arch out"),
        ({"cells": [CELL], "published": {4: {"label": "a", "value": 1}}}, "published names cell 4"),
        ({"cells": [CELL], "published": {0: {"label": "a", "value": 58}}}, "published.0.value"),
        ({"cells": [CELL], "schema_version": 2}, "schema_version"),
    ],
)
def test_what_is_wrong_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunSpec(**given)


def test_an_unknown_scenario_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'none'"):
        RunSpec(cells=[{**CELL, "scenario": "nonee"}])


def test_first_difference_names_the_place() -> None:
    old = {"a": [{"b": 1}, {"b": 2}], "c": 3}
    assert first_difference(old, old) is None
    assert first_difference(old, {**old, "c": 4}) == "c: 3 there, 4 given"
    assert first_difference(old, {"a": [{"b": 1}, {"b": 5}]}) == "a.1.b: 2 there, 5 given"
    assert first_difference(old, {"a": [{"b": 1}], "c": 3}) == "a: 2 there, 1 given"
