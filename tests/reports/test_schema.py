"""The published schema. Oracles: a validator written from the specification, pydantic, and hand."""

from __future__ import annotations

import copy
import json
from importlib import util
from typing import Any

import pytest
from pydantic import ValidationError

from feint.evaluation import Evaluation
from feint.reports.gate import gate
from feint.reports.output import output
from feint.reports.schema import ID, EvaluateOutput, dumped, generate, text
from tests.reports.fakes import small_data, story_data
from tests.reports.validator import errors


def told(**changes: Any) -> dict[str, Any]:
    data = story_data(**changes)
    evaluation = Evaluation([*data.results, *data.curve], list(data.findings), data.verdict, 1.5)
    conditions = gate(data, fail_under=0.4, min_grade="B")
    made = output(evaluation, run="r", html="h", command="feint evaluate", gate=conditions)
    return json.loads(json.dumps(made, allow_nan=False))  # type: ignore[no-any-return]


def test_the_file_is_what_the_code_makes() -> None:
    assert text() == dumped(), "run: python -m feint.reports.schema"
    assert json.loads(text())["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert json.loads(text())["$id"] == ID


def test_what_is_printed_fits() -> None:
    value = told()
    assert errors(value, generate(), generate()) == []
    assert EvaluateOutput.model_validate_json(json.dumps(value)).grade == value["grade"]
    # Pydantic's strict reading also refuses keys that nobody documented.
    with pytest.raises(ValidationError, match="Extra inputs"):
        EvaluateOutput.model_validate_json(json.dumps({**value, "surprise": 1}))
    # The schema itself bears them: a later version may add some.
    assert errors({**value, "surprise": 1}, generate(), generate()) == []


def broken(value: dict[str, Any], *path: Any, to: Any = None) -> list[str]:
    wrong = copy.deepcopy(value)
    inner: Any = wrong
    for step in path[:-1]:
        inner = inner[step]
    if to is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = to
    return errors(wrong, generate(), generate())


def test_what_is_wrong_does_not_fit() -> None:
    value = told()
    assert broken(value, "grade", to="E")
    assert broken(value, "grade")
    assert broken(value, "cells", 0, "accuracy", "value", to=1.5)
    assert broken(value, "cells", 0, "accuracy", to="90 %")
    assert broken(value, "cells", 0, "votes", to={"3": 1})
    assert broken(value, "findings", 0, "status", to="ok")
    assert broken(value, "withheld", to=1)
    assert broken(value, "bounds", 0, "worst", to=0.5)
    assert broken(value, "schema", to="urn:feint:schema:evaluate:2")


def test_the_documented_keys_are_required() -> None:
    # By hand, from the design of the command line.
    made = generate()
    assert {"verdict", "grade", "run", "html", "cells", "findings", "seconds"} <= set(
        made["required"]
    )
    assert {
        *("model", "defense", "scenario", "attack", "norm", "eps", "n", "accuracy"),
    } <= set(made["$defs"]["Cell"]["required"])
    assert {"check", "status", "evidence"} <= set(made["$defs"]["Finding"]["required"])


def test_an_empty_run_fits_too() -> None:
    data = small_data()
    evaluation = Evaluation(list(data.results), [], data.verdict, 0.0)
    made = output(evaluation, run="", html="", command="")
    assert errors(json.loads(json.dumps(made)), generate(), generate()) == []


@pytest.mark.reference
def test_an_independent_validator_agrees() -> None:
    assert util.find_spec("jsonschema"), "pip install jsonschema"
    import jsonschema

    schema = json.loads(text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(told())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate({**told(), "grade": "E"})
