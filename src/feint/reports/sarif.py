"""A run as SARIF 2.1.0, for code-scanning dashboards.

References:
    Static Analysis Results Interchange Format (SARIF) Version 2.1.0, OASIS Standard, 2020.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import feint
from feint.evaluation import Finding
from feint.evaluation.checklist import CHECKS, SOURCES
from feint.reports.data import ReportData
from feint.reports.gate import Gate, sentence
from feint.store.files import write_atomic

__all__ = ["sarif", "write"]

_SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
_LEVELS = {"warn": "warning", "fail": "error"}
_OWN = {
    "fail-under": (
        "the worst-case accuracy reaches the least that was asked for",
        "error if the judged end of its 95 % interval is under --fail-under, or there is no bound",
    ),
    "grade": (
        "the evaluation itself can be trusted as far as was asked for",
        "error if the verdict is withheld, or the grade is worse than --min-grade",
    ),
}
"""Rules beside the checks: what is looked at, and when it fires."""


def sarif(data: ReportData, gate: Gate | None = None, *, failed: bool = False) -> dict[str, Any]:
    """A run's findings as one SARIF run: a rule per check, a result per finding that is no pass.

    Args:
        data: The run.
        gate: Conditions; each that does not hold is a result, too.
        failed: Whether the command ends with exit code 1.
    """
    names = list(dict.fromkeys((*CHECKS, *(f.check for f in data.findings), *_OWN)))
    place = {name: number for number, name in enumerate(names)}
    results = [
        _result(data, place, f.check, _LEVELS[f.status], f.evidence, f.subject)
        for f in data.findings
        if f.status != "pass"
    ]
    if gate is not None and not gate.graded:
        results.append(_result(data, place, "grade", "error", gate.reasons[0], "evaluation"))
    elif gate is None and data.verdict.withheld:
        why = f"grade {data.verdict.grade}: the verdict is withheld"
        results.append(_result(data, place, "grade", "error", why, "evaluation"))
    if gate is not None:
        results += [
            _result(data, place, "fail-under", "error", sentence(gate, p), p.name)
            for p in gate.pipelines
            if not p.passed
        ]
    invocation: dict[str, Any] = {"executionSuccessful": True, "exitCode": int(failed)}
    if data.command:
        invocation["commandLine"] = data.command
    return {
        "$schema": _SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "feint",
                        "semanticVersion": feint.__version__,
                        "rules": [_rule(name, data.findings) for name in names],
                    }
                },
                "invocations": [invocation],
                "columnKind": "unicodeCodePoints",
                "results": results,
                "properties": {
                    "grade": data.verdict.grade,
                    "withheld": data.verdict.withheld,
                    "verdict": data.verdict.text,
                },
            }
        ],
    }


def _rule(name: str, findings: Any) -> dict[str, Any]:
    if name in CHECKS:
        asks, threshold, letters = CHECKS[name].asks, CHECKS[name].threshold, CHECKS[name].source
    elif name in _OWN:
        asks, threshold = _OWN[name]
        letters = "F"
    else:  # of another version, or of a plug-in: what the finding itself says
        found: Finding = next(f for f in findings if f.check == name)
        asks, threshold, letters = name, found.threshold, found.source
    known = [SOURCES[k.strip()] for k in letters.split(",") if k.strip() in SOURCES]
    said = [f"Looks at: {asks}.", *([f"Fires: {threshold}."] if threshold else [])]
    said += [f"From: {'; '.join(known)}."] if known else []
    return {
        "id": name,
        "shortDescription": {"text": asks},
        "fullDescription": {"text": f"{asks}: {threshold}" if threshold else asks},
        "help": {"text": " ".join(said)},
        "defaultConfiguration": {"level": "error" if name in _OWN else "warning"},
        "properties": {"tags": ["adversarial-robustness"]},
    }


def _result(
    data: ReportData, place: dict[str, int], rule: str, level: str, text: str, subject: str
) -> dict[str, Any]:
    location: dict[str, Any] = {"logicalLocations": [{"fullyQualifiedName": subject}]}
    if data.run:
        location["physicalLocation"] = {"artifactLocation": {"uri": _uri(data.run)}}
    identity = hashlib.sha256(f"{rule}\0{subject}".encode(errors="backslashreplace")).hexdigest()[
        :32
    ]
    return {
        "ruleId": rule,
        "ruleIndex": place[rule],
        "level": level,
        "message": {"text": f"{subject}: {text}"},
        "locations": [location],
        "partialFingerprints": {"ruleAndSubject/v1": identity},
    }


def _uri(run: str) -> str:
    path = Path(run) / "run.json"
    return path.as_uri() if path.is_absolute() else quote(path.as_posix())


def write(
    data: ReportData, path: str | Path, gate: Gate | None = None, *, failed: bool = False
) -> Path:
    """Write `sarif(…)` to a file, all of it or nothing.

    Raises:
        DataError: It cannot be written.
    """
    path = Path(path)
    text = json.dumps(sarif(data, gate, failed=failed), indent=1, allow_nan=False)
    write_atomic(path, (text + "\n").encode())
    return path
