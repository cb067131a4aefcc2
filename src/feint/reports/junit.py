"""A run as JUnit XML, which every build server shows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from feint.evaluation import Finding
from feint.evaluation.scenarios import get_scenario
from feint.reports.data import ReportData
from feint.reports.gate import Gate, gate, judged_end, sentence
from feint.reports.words import attack_words, deployment_words, percent
from feint.store.files import write_atomic

__all__ = ["junit", "write"]

_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, however it is escaped."""


def junit(data: ReportData, found: Gate | None = None) -> Element:
    """A run as test suites: a case per check and subject, per cell, per pipeline, and the grade.

    A check that failed is a failure; one that warned passes and says so in `system-out`, since the
    verdict stands. Cells and pipelines are measured against `fail_under`, where one was given.

    Args:
        data: The run.
        found: Conditions; by default none but that the verdict must not be withheld.
    """
    conditions = found or gate(data)
    root = Element("testsuites", name="feint")
    checks = SubElement(root, "testsuite", name="checks")
    for finding in data.findings:
        _check(checks, finding)
    _accuracy(SubElement(root, "testsuite", name="accuracy"), data, conditions)
    grade = SubElement(root, "testsuite", name="verdict")
    wrong = "" if conditions.graded else conditions.reasons[0]
    said = f"grade {conditions.grade}\n{data.verdict.text}"
    _case(grade, "feint.verdict", "grade", wrong, said, "grade")
    for suite in root:
        _count(suite, list(suite))
    _count(root, list(root.iter("testcase")))
    return root


def _count(element: Element, cases: Sequence[Element]) -> None:
    failures = sum(case.find("failure") is not None for case in cases)
    for name, value in (
        ("tests", len(cases)),
        ("failures", failures),
        ("errors", 0),
        ("skipped", 0),
    ):
        element.set(name, str(value))


def _check(suite: Element, finding: Finding) -> None:
    wrong = finding.evidence if finding.status == "fail" else ""
    warned = f"warning: {finding.evidence}" if finding.status == "warn" else ""
    _case(suite, f"feint.checks.{finding.check}", finding.subject, wrong, warned, finding.check)


def _accuracy(suite: Element, data: ReportData, conditions: Gate) -> None:
    for pipeline in conditions.pipelines:
        text = sentence(conditions, pipeline)
        name = f"worst case, {pipeline.threat}"
        wrong = "" if pipeline.passed else text
        _case(suite, f"feint.accuracy.{pipeline.name}", name, wrong, text, "fail-under")
    names = {p.name for p in conditions.pipelines}
    least = conditions.fail_under
    for result in data.results:
        cell = result.cell
        name = deployment_words((cell.model, cell.defense, cell.votes, cell.combine))
        if name not in names or get_scenario(cell.scenario).judged != "pipeline":
            continue
        words = "clean" if cell.attack == "none" else f"{cell.scenario}: {attack_words(cell)}"
        text = f"accuracy {result.accuracy}"
        wrong = ""
        if least is not None and judged_end(result.accuracy, conditions.end) < least:
            wrong = f"{text} is under {percent(least)} %"
        _case(suite, f"feint.accuracy.{name}", words, wrong, text, "fail-under")


def _case(suite: Element, of: str, name: str, wrong: str, said: str, kind: str) -> None:
    case = SubElement(suite, "testcase", classname=_legal(of), name=_legal(name), time="0")
    if wrong:
        failure = SubElement(case, "failure", message=_legal(wrong), type=_legal(kind))
        failure.text = _legal(wrong)
    elif said:
        SubElement(case, "system-out").text = _legal(said)


def _legal(text: str) -> str:
    return _ILLEGAL.sub("\N{REPLACEMENT CHARACTER}", text)


def write(data: ReportData, path: str | Path, found: Gate | None = None) -> Path:
    """Write `junit(…)` to a file, all of it or nothing.

    Raises:
        DataError: It cannot be written.
    """
    root = junit(data, found)
    indent(root)
    path = Path(path)
    write_atomic(path, tostring(root, encoding="utf-8", xml_declaration=True) + b"\n")
    return path
