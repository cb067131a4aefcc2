"""The one JSON object of `feint evaluate --json` and `feint report --json`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from feint.evaluation import Evaluation
from feint.reports.gate import Gate
from feint.reports.schema import ID

__all__ = ["output"]


def output(
    evaluation: Evaluation,
    *,
    run: str,
    html: str,
    command: str,
    gate: Gate | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Plain data in the published form (`feint.reports.schema`).

    Args:
        evaluation: Cells, findings and verdict.
        run: The run's directory.
        html: The page.
        command: What makes the run again.
        gate: Conditions, if some were given.
        seconds: What the command took; by default what the evaluation did.
    """
    plain = evaluation.as_dict()
    return {
        "schema": ID,
        "verdict": plain["verdict"],
        "grade": plain["grade"],
        "withheld": evaluation.verdict.withheld,
        "bounds": [asdict(bound) for bound in evaluation.verdict.bounds],
        "cells": plain["cells"],
        "findings": plain["findings"],
        "gate": None if gate is None else gate.as_dict(),
        "run": run,
        "html": html,
        "command": command,
        "seconds": plain["seconds"] if seconds is None else round(seconds, 2),
    }
