"""One HTML file that opens offline: no script, no request, everything inside."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from feint.evaluation import SCENARIOS, CellResult, Rate, paper_metrics
from feint.evaluation.checklist import SOURCES
from feint.evaluation.papers import PAPER_METRICS
from feint.evaluation.verdict import Bound
from feint.reports import svg, words
from feint.reports.card import attackers, card, uncovered
from feint.reports.curves import curves, telling
from feint.reports.data import Deployment, ReportData
from feint.reports.layout import Row, footnotes, groups, note, raised, sentences, summary
from feint.reports.pictures import galleries
from feint.reports.story import KINDS, story
from feint.store.files import write_atomic

__all__ = ["flatten", "headline", "render", "write"]

GRADES = {
    "A": "no warning",
    "B": "one or two warnings",
    "C": "more than two warnings",
    "F": "not trustworthy as it stands",
}
TRIES = 10
"""Attempts of the attacker who may retry."""
_THRESHOLD = re.compile(r"\((?=[^()]*\b(?:warn|fail|threshold|below)\b)[^()]*\)")


def headline(data: ReportData) -> str:
    """The conclusion in one sentence.

    It is about the pipeline that a claim was made for or, without a claim, the defended one that
    lost most to an attacker who knows of the defense.
    """
    if data.verdict.withheld:
        return "No verdict: these numbers cannot be trusted yet"
    told = [b for b in data.verdict.bounds if b.worst is not None]
    if not told:
        return "Nothing was attacked"
    claimed = next(((b, r) for b in told if (r := _claimed(data, b)) is not None), None)
    lead = claimed[0] if claimed else max(told, key=_gap)
    name, left = words.deployment_words(_key(lead)), _percent(lead.worst)
    if claimed:
        claim = data.claim(claimed[1])
        published = f"{words.percent(claim.value if claim else None)} %"
        if claim and claim.of_clean:
            here = words.percent(data.worth(claim, claimed[1]))
            published += f" of clean accuracy ({here} % here)"
        return (
            f"{name}: published {published}, reproduced {_percent(claimed[1].accuracy)}, "
            f"and at most {left} once the attacker knows of it"
        )
    if _gap(lead)[1] > 0.02:
        return (
            f"{name} keeps {_percent(lead.gray)} against attackers who do not know of the "
            f"defense, and at most {left} against those who do"
        )
    return f"{name}: at most {left} robust accuracy"


def _percent(rate: Rate | None) -> str:
    return f"{words.percent(None if rate is None else rate.value)} %"


def _claimed(data: ReportData, bound: Bound) -> CellResult | None:
    """A cell of the bound's pipeline and threat that somebody published a number about."""
    for result in data.pipelines().get(_key(bound), []):
        cell, claim = result.cell, data.claim(result)
        here = (cell.norm, cell.eps, cell.targeted) == (bound.norm, bound.eps, bound.targeted)
        unknowing = cell.scenario != "white-box"
        if here and unknowing and claim is not None and data.worth(claim, result) is not None:
            return result
    return None


def _key(bound: Bound) -> Deployment:
    return bound.model, bound.defense, bound.votes, bound.combine


def _gap(bound: Bound) -> tuple[bool, float]:
    lost = bound.gray.value - bound.worst.value if bound.gray and bound.worst else 0.0
    return bound.defense != "none", lost


def flatten(value: object, name: str = "") -> list[tuple[str, str]]:
    """Nested plain data as (dotted name, text) pairs, in order."""
    if isinstance(value, Mapping) and value:
        return [
            pair
            for key, inner in value.items()
            for pair in flatten(inner, f"{name}.{key}" if name else str(key))
        ]
    if isinstance(value, list | tuple) and any(
        isinstance(v, Mapping | list | tuple) for v in value
    ):
        return [pair for i, v in enumerate(value) for pair in flatten(v, f"{name}[{i}]")]
    if isinstance(value, list | tuple):
        return [(name, ", ".join(map(_text, value)) or "none")]
    return [(name, _text(value))]


def _text(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.10g}"
    return "none" if value in ("", {}) else str(value)


def _kept(text: str) -> str:
    """Text in which no line ends between a number and its per cent sign."""
    return text.replace(" %", "\u00a0%")


def _papers(data: ReportData) -> list[tuple[str, Row, dict[str, Rate]]]:
    """The papers' own quantities of every attacked cell with a defense."""
    return [
        (group.name, row, paper_metrics(row.result, data.results))
        for group in groups(data)
        for row in group.rows
        if row.result.cell.attack != "none" and row.result.cell.defense != "none"
    ]


def _marked(evidence: str) -> Markup:
    """Evidence, escaped, with its thresholds set apart."""
    out, end = Markup(), 0
    for found in _THRESHOLD.finditer(evidence):
        out += escape(evidence[end : found.start()])
        out += Markup('<span class="threshold">') + escape(found[0]) + Markup("</span>")
        end = found.end()
    return out + escape(evidence[end:])


def render(data: ReportData) -> str:
    """The page as text; the same data give the same text.

    Everything that users name is escaped. The page's content policy forbids scripts and requests:
    only its own style sheet, by its hash, and images inside the page are let in.

    Args:
        data: What to show.

    Cost: The images and gradients of at most `PIPELINES × STRIPS` samples.

    Example:
        >>> from feint.evaluation.verdict import conclude
        >>> page = render(ReportData([], [], conclude([], [])))
        >>> page.startswith("<!DOCTYPE html>"), "<script" in page
        (True, False)
    """
    folder = resources.files("feint.reports") / "templates"
    style = (folder / "report.css").read_text(encoding="utf-8").strip()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = Environment(
        loader=PackageLoader("feint.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    lanes, drawn = story(data), telling(curves(data))
    papers = _papers(data)
    order = {"fail": 0, "warn": 1, "pass": 2}
    failed = [
        *data.verdict.failed,
        *(
            f"no attacker who knows the defense met {words.deployment_words(_key(b))}"
            for b in data.verdict.bounds
            if b.worst is None
        ),
    ]
    drawn_kinds = {line.scenario for c in drawn for line in c.series}
    shown, made = galleries(data), attackers(data)
    pictures = [p for g in shown for strip in g.strips for p in strip.pictures]
    letters = {k.strip() for f in data.findings for k in f.source.split(",")}
    present = {m.kind for lane in lanes for m in lane.marks}
    return environment.get_template("report.html.j2").render(
        data=data,
        style=Markup(style),
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        headline=_kept(headline(data)),
        grade_words=GRADES.get(data.verdict.grade, ""),
        reasons=failed,
        sentences=[(name, _kept(rest)) for name, rest in sentences(data)],
        summary=summary(data),
        lanes=lanes,
        kinds=[k for k in KINDS if k in present],
        curve_kinds=[k for k in SCENARIOS if k == "none" or k in drawn_kinds],
        scenarios=tuple(SCENARIOS),
        elsewhere=any(m.context for lane in lanes for m in lane.marks),
        groups=groups(data),
        notes=[(raised(i), note(data, c)) for i, c in enumerate(footnotes(data), 1)],
        card=card(data),
        attackers=made,
        averaged=any(a.draws for a in made),
        uncovered=uncovered(data),
        findings=sorted(data.findings, key=lambda f: order[f.status]),
        passed=sum(f.status == "pass" for f in data.findings),
        curves=drawn,
        reach={c.norm: max(o.reach for o in drawn if o.norm == c.norm) for c in drawn},
        derived=any(s.derived for c in drawn for s in c.series),
        galleries=shown,
        defended=any(p.title == "defended" for p in pictures),
        probabilities=any(p.probable for p in pictures),
        sources=[(k, SOURCES[k]) for k in SOURCES if k in letters],
        settings=flatten(data.metadata) if data.metadata else [],
        tries=min([TRIES, *(int(r.rows["draws"].min()) for r in data.results if r.draws > 1)]),
        random=any(r.draws > 1 for r in data.results),
        targeted=any(r.cell.targeted for r in data.results),
        marked=_marked,
        svg=svg,
        words=words,
        papers=papers,
        paper_names=[name for name in PAPER_METRICS if any(name in found for *_, found in papers)],
        paper_words=PAPER_METRICS,
    )


def write(data: ReportData, path: str | Path) -> Path:
    """Write `render(data)` to a file, all of it or nothing, and return its path.

    Raises:
        DataError: It cannot be written.
    """
    path = Path(path)
    write_atomic(path, render(data).encode())
    return path
