"""Conditions, SARIF and JUnit. Oracles: intervals by hand, the standards' own required properties,
and the standard library's XML parser."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from feint.core.errors import ConfigError, RangeError
from feint.evaluation import Cell, Finding
from feint.evaluation.checklist import CHECKS
from feint.evaluation.metrics import wilson
from feint.evaluation.verdict import conclude
from feint.reports.data import ReportData
from feint.reports.gate import gate
from feint.reports.junit import junit
from feint.reports.junit import write as write_junit
from feint.reports.sarif import sarif
from feint.reports.sarif import write as write_sarif
from tests.reports.fakes import cell_result, small_data, story_data

NASTY = "<&\"'>]]> {{ x }} \x00\x1b[31m \ud800 \uffff é"


def run(left: float = 0.5, n: int = 200, findings: list[Finding] | None = None) -> ReportData:
    found = findings or []
    cells = [
        cell_result(Cell("none", "m"), 0.9, n=n),
        cell_result(Cell("white-box", "m", attack="pgd"), 0.0, n=n, size=0.01),
        cell_result(Cell("none", "m", "d"), 0.85, n=n),
        cell_result(Cell("gray-box", "m", "d", "pgd"), 0.8, n=n, size=0.01),
        cell_result(Cell("white-box", "m", "d", "pgd"), left, n=n, size=0.01),
    ]
    return ReportData(cells, found, conclude(cells, found))


def test_the_lower_end_is_judged() -> None:
    # Oracle: Wilson's interval of 100 of 200.
    low, high = wilson(100, 200)
    for least, end, passes in (
        (low - 0.001, "low", True),
        (low + 0.001, "low", False),
        (0.5, "value", True),
        (0.501, "value", False),
        (high - 0.001, "high", True),
        (high + 0.001, "high", False),
    ):
        found = gate(run(), fail_under=least, end=end)  # type: ignore[arg-type]
        assert found.passed == passes, (least, end)
        (one,) = found.pipelines  # the bare model is a control
        assert one.name == "m + d"
    assert not gate(run(n=20), fail_under=0.4).passed  # fewer images make it stricter
    assert gate(run(), fail_under=0.4).passed


def test_bare_models_are_judged_where_nothing_defends() -> None:
    cells = run().results[:2]
    alone = ReportData(cells, [], conclude(cells, []))
    found = gate(alone, fail_under=0.1)
    assert [p.name for p in found.pipelines] == ["m"]
    assert not found.passed


def test_what_cannot_be_trusted_does_not_pass() -> None:
    bad = [Finding("zero-gradient", "fail", "m + d", "all are zero")]
    found = gate(run(0.9, findings=bad), fail_under=0.1)
    assert (found.passed, found.withheld) == (False, True)
    assert found.reasons == ["grade F: the verdict is withheld"]
    unbound = [
        r for r in run().results if r.cell.scenario != "white-box" or r.cell.defense == "none"
    ]
    found = gate(ReportData(unbound, [], conclude(unbound, [])), fail_under=0.0)
    assert not found.passed
    assert any("no attacker who knows the defense was tried" in r for r in found.reasons)
    warned = [Finding("loss-has-settled", "warn", "m", "54 %")]
    assert gate(run(findings=warned), min_grade="B").passed
    assert not gate(run(findings=warned), min_grade="A").passed


def test_conditions_that_mean_nothing_are_refused() -> None:
    with pytest.raises(RangeError, match=r"expected a share in \[0, 1\]"):
        gate(run(), fail_under=40)
    with pytest.raises(ConfigError, match="low, value, high"):
        gate(run(), end="middle")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="A, B or C"):
        gate(run(), min_grade="F")  # type: ignore[arg-type]


# --- SARIF ----------------------------------------------------------------------------------------
# Required by the standard, SARIF 2.1.0 (OASIS, 2020-03-27): sarifLog §3.13 version, runs;
# run §3.14 tool; tool §3.18 driver; toolComponent §3.19 name; reportingDescriptor §3.49 id;
# multiformatMessageString §3.12 text; result §3.27 message; message §3.11 text or id; invocation
# §3.20 executionSuccessful; result.level §3.27.10; ruleIndex §3.27.6 fits ruleId.


def check_sarif(log: dict[str, Any]) -> None:
    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("sarif-schema-2.1.0.json")
    (one,) = log["runs"]
    driver = one["tool"]["driver"]
    assert driver["name"] == "feint"
    rules = driver["rules"]
    ids = [rule["id"] for rule in rules]
    assert len(set(ids)) == len(ids)
    for rule in rules:
        assert rule["id"]
        for key in ("shortDescription", "fullDescription", "help"):
            assert rule[key]["text"]
        assert rule["defaultConfiguration"]["level"] in ("none", "note", "warning", "error")
    for invocation in one["invocations"]:
        assert isinstance(invocation["executionSuccessful"], bool)
    assert one["columnKind"] in ("utf16CodeUnits", "unicodeCodePoints")
    for result in one["results"]:
        assert result["message"]["text"]
        assert result["level"] in ("none", "note", "warning", "error")
        assert ids[result["ruleIndex"]] == result["ruleId"]
        for location in result["locations"]:
            for logical in location["logicalLocations"]:
                assert logical["fullyQualifiedName"]
            if "physicalLocation" in location:
                uri = location["physicalLocation"]["artifactLocation"]["uri"]
                assert re.fullmatch(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]+", uri)  # RFC 3986
        assert all(isinstance(v, str) for v in result["partialFingerprints"].values())


def test_sarif_has_a_rule_for_every_check_and_a_result_for_every_finding() -> None:
    data = story_data()
    log = sarif(data)
    check_sarif(log)
    (one,) = log["runs"]
    assert set(CHECKS) <= {rule["id"] for rule in one["tool"]["driver"]["rules"]}
    rule = next(r for r in one["tool"]["driver"]["rules"] if r["id"] == "zero-gradient")
    assert CHECKS["zero-gradient"].threshold in rule["help"]["text"]
    raised = [f for f in data.findings if f.status != "pass"]
    assert [(r["ruleId"], r["level"]) for r in one["results"]] == [
        (f.check, "warning") for f in raised
    ]
    assert one["invocations"][0]["commandLine"] == data.command


def test_sarif_tells_of_the_gate() -> None:
    data = story_data()
    found = gate(data, fail_under=0.4)
    log = sarif(data, found, failed=True)
    check_sarif(log)
    (one,) = log["runs"]
    gated = [r for r in one["results"] if r["ruleId"] == "fail-under"]
    assert len(gated) == sum(not p.passed for p in found.pipelines) == 2
    assert all(r["level"] == "error" for r in gated)
    assert one["invocations"][0]["exitCode"] == 1
    bad = [Finding("zero-gradient", "fail", "p", "all are zero")]
    withheld = sarif(run(findings=bad))
    assert [r["ruleId"] for r in withheld["runs"][0]["results"]] == ["zero-gradient", "grade"]


def test_a_finding_keeps_its_fingerprint() -> None:
    one = sarif(story_data())["runs"][0]["results"]
    two = sarif(story_data(run="elsewhere"))["runs"][0]["results"]
    prints = [r["partialFingerprints"] for r in one]
    assert prints == [r["partialFingerprints"] for r in two]
    assert len({json.dumps(p) for p in prints}) == len(prints)


def test_sarif_of_hostile_names(tmp_path: Path) -> None:
    found = [Finding(NASTY, "warn", NASTY, NASTY)]
    data = replace(run(findings=found), run="a b/ü%20", command=NASTY)
    log = json.loads(write_sarif(data, tmp_path / "a.sarif").read_bytes())
    check_sarif(log)
    (result,) = log["runs"][0]["results"]
    assert result["message"]["text"] == f"{NASTY}: {NASTY}"
    uri = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert uri == "a%20b/%C3%BC%2520/run.json"
    whole = sarif(replace(data, run=str(tmp_path)))["runs"][0]["results"][0]
    assert whole["locations"][0]["physicalLocation"]["artifactLocation"]["uri"].startswith(
        "file:///"
    )


# --- JUnit ----------------------------------------------------------------------------------------


def counts(element: ElementTree.Element) -> tuple[int, int, int, int]:
    return tuple(int(element.attrib[k]) for k in ("tests", "failures", "errors", "skipped"))  # type: ignore[return-value]


def check_junit(root: ElementTree.Element) -> None:
    """Counts are those of the elements, and every case has a class and a name."""
    for element in (root, *root.findall("testsuite")):
        cases = list(element.iter("testcase"))
        failures = [case for case in cases if case.find("failure") is not None]
        assert counts(element) == (len(cases), len(failures), 0, 0)
    for case in root.iter("testcase"):
        assert case.attrib["name"]
        assert case.attrib["classname"]


def test_junit_has_a_case_for_every_check_cell_and_pipeline(tmp_path: Path) -> None:
    data = story_data()
    path = write_junit(data, tmp_path / "a.xml", gate(data, fail_under=0.4))
    root = ElementTree.parse(path).getroot()
    check_junit(root)
    suites = {suite.attrib["name"]: suite for suite in root}
    assert list(suites) == ["checks", "accuracy", "verdict"]
    assert counts(suites["checks"]) == (len(data.findings), 0, 0, 0)  # warnings pass
    assert len(suites["checks"].findall("testcase/system-out")) == 2
    # Two defended pipelines with their worst cases; 5 cells of the fixed shift, 4 of the random.
    defended = [r for r in data.results if r.cell.defense != "none"]
    least = 0.4
    low = [r.accuracy.low < least for r in defended]
    assert counts(suites["accuracy"])[:2] == (2 + len(defended), 2 + sum(low))
    assert counts(suites["verdict"]) == (1, 0, 0, 0)


def test_junit_of_a_withheld_verdict() -> None:
    bad = [Finding("zero-gradient", "fail", "p", "all are zero")]
    root = junit(run(findings=bad))
    check_junit(root)
    failed = [c.attrib["classname"] for c in root.iter("testcase") if c.find("failure") is not None]
    assert failed == ["feint.checks.zero-gradient", "feint.verdict"]


def test_junit_of_hostile_names(tmp_path: Path) -> None:
    found = [Finding(NASTY, "fail", NASTY, NASTY)]
    cells = [
        cell_result(Cell("none", NASTY), 0.9),
        cell_result(Cell("white-box", NASTY, attack="pgd"), 0.1, size=0.01),
    ]
    data = small_data(cells, findings=found, verdict=conclude(cells, found))
    root = ElementTree.parse(write_junit(data, tmp_path / "a.xml")).getroot()
    check_junit(root)
    case = next(root.iter("testcase"))
    # What XML cannot hold is replaced, the rest comes back as it was.
    assert case.attrib["name"] == "<&\"'>]]> {{ x }} \ufffd\ufffd[31m \ufffd \ufffd é"
