"""The published form of `feint evaluate --json` and `feint report RUN --json`.

`evaluate.schema.json` beside this file is JSON Schema 2020-12, made from the classes below by
`python -m feint.reports.schema`. Within one major version keys are only added: a reader must allow
for keys that it does not know, and will find those that are required here.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import GenerateJsonSchema

__all__ = ["ID", "EvaluateOutput", "dumped", "generate", "text"]

ID = "urn:feint:schema:evaluate:1"
"""Name of the form; its last part is the major version."""

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Size = Annotated[float, Field(ge=0)]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Rate(_Form):
    """A rate with its 95 % interval over `n` samples."""

    value: Share
    low: Share
    high: Share
    n: Annotated[int, Field(ge=1)]


class Distance(_Form):
    """Means over the samples; null where none is defined."""

    rms: Size | None
    abs_l2: Size | None
    relative_l2: Annotated[Size | None, Field(description="Black images are left out.")]
    linf: Size | None


class Cell(_Form):
    """One number of the table: a scenario, an attack, a pipeline."""

    scenario: str
    model: str
    defense: str
    attack: str
    source: Annotated[str, Field(description="Model that `transfer` attacks; else empty.")]
    backward: Annotated[str, Field(description="Backward rule of the defense.")]
    norm: Literal["linf", "l2", "l1", "l0"]
    eps: Annotated[Size, Field(description="Budget of the threat model, in image units.")]
    targeted: bool
    votes: Annotated[int, Field(ge=1, description="Draws per deployed prediction.")]
    combine: str
    judge_draws: Annotated[int, Field(ge=1, description="As asked for.")]
    seed: int
    n: Annotated[int, Field(ge=1)]
    draws: Annotated[int, Field(ge=1, description="That the judge took per sample.")]
    accuracy: Annotated[Rate, Field(description="Expected accuracy over held-out draws.")]
    accuracy_8bit: Annotated[Rate, Field(description="On images rounded to 8 bits.")]
    majority: Annotated[Rate, Field(description="Of the majority vote over the judge's draws.")]
    accuracy_png: Annotated[Rate | None, Field(description="On images read back from PNG files.")]
    tries: Annotated[
        dict[str, Rate], Field(description="Accuracy if the attacker may try so often.")
    ]
    majority_of: Annotated[
        dict[str, Rate],
        Field(description="Accuracy of majority votes of so many of the judge's draws."),
    ]
    first_hits: Annotated[
        Rate | None, Field(description="Samples on which the attacker saw a success of his own.")
    ]
    luck: Annotated[float | None, Field(description="First hits less the success on fresh draws.")]
    target_hits: Share
    distance: Distance
    key: Annotated[str, Field(description="Content address of the cell.")]
    examples: Annotated[str, Field(description="Content address of its adversarial examples.")]


class Finding(_Form):
    """What one automatic check saw."""

    check: str
    status: Literal["pass", "warn", "fail"]
    subject: str
    evidence: str
    threshold: Annotated[str, Field(description="When the check warns and fails.")]
    source: Annotated[str, Field(description="Whose check it is, by letters.")]


class Bound(_Form):
    """A deployed pipeline within one threat model."""

    model: str
    defense: str
    votes: Annotated[int, Field(ge=1)]
    combine: str
    norm: Literal["linf", "l2", "l1", "l0"]
    eps: Size
    targeted: bool
    clean: Rate | None
    worst: Annotated[
        Rate | None,
        Field(description="Upper bound on robust accuracy; null if no informed attacker was run."),
    ]
    gray: Annotated[Rate | None, Field(description="Against attackers who do not know.")]
    attacks: Annotated[Count, Field(description="Attacks behind the worst case.")]


class Gated(_Form):
    """One pipeline against the threshold."""

    name: str
    threat: str
    judged: Annotated[Share | None, Field(description="The judged end of the interval.")]
    worst: Rate | None
    passed: bool


class Gate(_Form):
    """The conditions of `--fail-under` and `--min-grade`."""

    fail_under: Annotated[Share | None, Field(description="As a share, not a percentage.")]
    end: Literal["low", "value", "high"]
    min_grade: Literal["A", "B", "C"] | None
    grade: Literal["A", "B", "C", "F"]
    withheld: bool
    passed: bool
    pipelines: list[Gated]


class EvaluateOutput(_Form):
    """What `feint evaluate --json` prints: one object, on standard output, nothing else."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"$id": ID}, title="feint evaluate --json"
    )

    form: Annotated[Literal["urn:feint:schema:evaluate:1"], Field(alias="schema")]
    verdict: Annotated[str, Field(description="In words, a line per pipeline and threat model.")]
    grade: Annotated[
        Literal["A", "B", "C", "F"],
        Field(description="Of the evaluation, not of the defense; F: the verdict is withheld."),
    ]
    withheld: bool
    bounds: list[Bound]
    cells: list[Cell]
    findings: list[Finding]
    gate: Annotated[Gate | None, Field(description="Null if no condition was given.")]
    run: Annotated[str, Field(description="The run's directory.")]
    html: Annotated[str, Field(description="The page.")]
    command: Annotated[str, Field(description="Shell-quoted; makes the run again.")]
    seconds: Annotated[float, Field(ge=0)]


class _Draft(GenerateJsonSchema):
    """Named as what it is: pydantic writes this draft."""

    schema_dialect = "https://json-schema.org/draft/2020-12/schema"

    def generate(self, schema: Any, mode: Any = "validation") -> dict[str, Any]:
        return {"$schema": self.schema_dialect, **super().generate(schema, mode=mode)}


def generate() -> dict[str, Any]:
    """The schema, made from the classes."""
    made = EvaluateOutput.model_json_schema(schema_generator=_Draft)
    return _open(made)


def _open(value: Any) -> Any:
    """Without `additionalProperties: false`: keys may be added, and readers must bear them."""
    if isinstance(value, dict):
        return {k: _open(v) for k, v in value.items() if (k, v) != ("additionalProperties", False)}
    return [_open(v) for v in value] if isinstance(value, list) else value


def text() -> str:
    """The published schema, as it is in the package."""
    folder = resources.files("feint.reports.schema")
    return (folder / "evaluate.schema.json").read_text(encoding="utf-8")


def dumped() -> str:
    """What the file has to hold."""
    return json.dumps(generate(), indent=2, ensure_ascii=False) + "\n"
