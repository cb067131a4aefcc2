"""The page. Oracles: Python's own HTML parser, hashlib, and the fakes' numbers."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from feint.core.errors import DataError
from feint.evaluation import Cell, Finding
from feint.evaluation.checklist import CHECKS, SOURCES
from feint.evaluation.verdict import conclude
from feint.reports.card import attackers, card, uncovered
from feint.reports.data import Claim, ReportData, Seen
from feint.reports.html import flatten, headline, render, write
from feint.reports.story import story
from feint.reports.words import percent
from tests.reports.fakes import (
    ACE,
    SHIFT,
    cell_result,
    gradients_of,
    images_of,
    small_data,
    story_data,
    waves,
)

ALLOWED = {
    *("a", "b", "body", "caption", "circle", "code", "dd", "desc", "details", "div", "dl", "dt"),
    *("g", "h1", "i", "rect"),
    *("figcaption", "figure", "h2", "h3", "head", "header", "html", "img", "line", "main", "meta"),
    *("p", "path", "polyline", "pre", "section", "small", "span", "style", "summary", "svg"),
    *("table", "tbody", "td", "text", "th", "thead", "title", "tr"),
}


class Page(HTMLParser):
    """Tags with their attributes, and the text, as a browser would take them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.style = ""
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "style":
            self.style += data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\u00a0", " ").split())

    def all(self, tag: str, **attrs: str) -> list[dict[str, str]]:
        want = {k.rstrip("_"): v for k, v in attrs.items()}
        return [a for t, a in self.tags if t == tag and want.items() <= a.items()]


def full() -> ReportData:
    x = waves()
    return story_data(images=images_of(x), gradients=gradients_of(x))


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render(full()))


def test_it_asks_for_nothing_outside_itself(page: Page) -> None:
    for tag, attrs in page.tags:
        assert tag in ALLOWED
        for name, value in attrs.items():
            assert not name.startswith("on")
            assert name != "style"
            if name in ("src", "href", "srcset", "data", "action"):
                assert value.startswith(("data:image/png;base64,", "#")), (tag, name, value[:40])
            if name != "content":
                assert "://" not in value
    assert not re.search(r"url\(|@import|https?:", page.style)


def test_its_policy_lets_in_its_own_style_and_nothing_else(page: Page) -> None:
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    rules = dict(rule.strip().split(" ", 1) for rule in policy["content"].split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["style-src"] == f"'sha256-{digest}'"
    assert rules["img-src"] == "data:"
    assert "script-src" not in rules


HOSTILE = (
    "</title></style><script>alert(1)</script><img src=x onerror='x()'> & \"{{ 7*7 }}\" [b]$x$"
)


def test_what_users_name_is_text() -> None:
    cells = [
        cell_result(Cell("none", model=HOSTILE, defense=HOSTILE), 0.9),
        cell_result(Cell("gray-box", HOSTILE, HOSTILE, attack=HOSTILE), 0.8, size=0.1),
        cell_result(Cell("white-box", HOSTILE, HOSTILE, attack=HOSTILE), 0.1, size=0.1),
        cell_result(
            Cell("transfer", HOSTILE, HOSTILE, attack="pgd", source=HOSTILE), 0.5, size=0.1
        ),
    ]
    found = [Finding(HOSTILE, status, HOSTILE, HOSTILE) for status in ("pass", "warn")]  # type: ignore[arg-type]
    x = waves()
    data = ReportData(
        cells,
        found,
        conclude(cells, found),
        metadata={HOSTILE: {"inner": [HOSTILE]}},
        claims=[Claim(0.9, HOSTILE)],
        class_names=[HOSTILE] * 10,
        images=images_of(x),
        gradients=gradients_of(x),
        command=HOSTILE,
        run=HOSTILE,
        html=HOSTILE,
        title=HOSTILE,
    )
    page = Page(render(data))
    assert {tag for tag, _ in page.tags} <= ALLOWED
    assert all(a["src"].startswith("data:image/png;base64,") for a in page.all("img"))
    assert all(HOSTILE in a["alt"] for a in page.all("img"))
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    # model, defense, attack, source, finding, metadata, claim, classes, command, run, title
    assert page.text.count(HOSTILE) > 40


def test_every_cell_and_finding_is_there_with_its_interval(page: Page) -> None:
    data = full()
    for result in data.results:
        rate = result.accuracy
        assert percent(rate.value) in page.text
        assert f"[{percent(rate.low)}, {percent(rate.high)}]" in page.text
        assert result.key in page.text
    rows = [a for a in page.all("tr") if a.get("class", "").startswith("s-")]
    assert len(rows) == len(data.results) + len(attackers(data))
    # Thresholds are set apart by a tag: compare without spaces.
    dense = page.text.replace(" ", "")
    for finding in data.findings:
        assert finding.evidence.replace(" ", "") in dense
        assert finding.check in page.text
    for line in data.verdict.text.splitlines():
        assert line.replace(" ", "") in dense
    assert "98.3 % of clean accuracy, ACE, Table 3" in page.text
    assert "upper bound on robust accuracy" in page.text


def test_every_setting_is_there(page: Page) -> None:
    # By hand, from the fake's metadata.
    for text in ("packages.torch", "2.15.0+cpu", "git.dirty", "no", "spec.seed", "922a951"):
        assert text in page.text
    assert "feint evaluate --model bundled:ace-100" in page.text


def test_flatten() -> None:
    # By hand.
    value = {"a": {"b": [1, 2.5], "c": {}}, "d": [{"e": None}], "f": True, "g": []}
    assert flatten(value) == [
        ("a.b", "1, 2.5"),
        ("a.c", "none"),
        ("d[0].e", "none"),
        ("f", "yes"),
        ("g", "none"),
    ]


def test_the_story_draws_every_mark_where_its_number_is(page: Page) -> None:
    lanes = story(full())
    marks = [mark for lane in lanes for mark in lane.marks]
    drawn = [a for a in page.all("svg") if a.get("class") == "track" and a.get("role") == "img"]
    assert len(drawn) == len(marks)
    dots = [a for a in page.all("svg") if a.get("overflow") == "visible" and "x" in a]
    assert [float(a["x"].rstrip("%")) for a in dots] == pytest.approx(
        [100 * m.value for m in marks], abs=0.006
    )
    measured = [m for m in marks if m.kind != "claim"]
    whiskers = [
        a for a in page.all("line") if a.get("class", "").startswith("whisker") and "%" in a["x1"]
    ]
    assert [float(a["x1"].rstrip("%")) for a in whiskers] == pytest.approx(
        [100 * m.low for m in measured], abs=0.006
    )
    assert [float(a["x2"].rstrip("%")) for a in whiskers] == pytest.approx(
        [100 * m.high for m in measured], abs=0.006
    )


def test_pictures_have_words(page: Page) -> None:
    images = page.all("img")
    assert len(images) == 2 * 4 * 5  # two defended pipelines, four samples, five pictures
    assert all(a["alt"] and a["width"] == "32" and a["class"] == "pixels" for a in images)
    assert all("aria-label" in a or "aria-hidden" in a for a in page.all("svg", class_="curve"))
    assert len(page.all("h1")) == 1
    assert page.all("html", lang="en")
    assert all("scope" in a for a in page.all("th"))


def test_the_same_data_give_the_same_page() -> None:
    assert render(full()) == render(full())


def test_it_stays_small() -> None:
    x = waves(size=299)
    noisy = (x + 0.2 * (x * 1e4).sin()).clamp(0, 1)
    text = render(story_data(images=images_of(noisy), gradients=gradients_of(noisy)))
    assert len(text.encode()) < 2_000_000
    assert "shown at 128 × 128" in text


def test_headline_tells_claim_reproduction_and_bound() -> None:
    # From the fake: 98.3 % of 88.5 is 87.0.
    assert headline(story_data()) == (
        f"{ACE} + {SHIFT}: published 98.3 % of clean accuracy (87.0 % here), reproduced 81.5 %, "
        "and at most 0.0 % once the attacker knows of it"
    )
    # Without a claim, the largest loss: the random shift, 80.0 → 0.0.
    assert headline(story_data(claims=())) == (
        f"{ACE} + pixel_shift(random=true) keeps 80.0 % against attackers who do not know of the "
        "defense, and at most 0.0 % against those who do"
    )


def test_headline_without_a_gap_gives_the_bound() -> None:
    cells = [
        cell_result(Cell("gray-box", "m", "d", "pgd"), 0.05, size=0.1),
        cell_result(Cell("white-box", "m", "d", "pgd"), 0.05, size=0.1),
    ]
    assert headline(small_data(cells)) == "m + d: at most 5.0 % robust accuracy"


def test_one_cell_and_no_finding() -> None:
    page = Page(render(small_data()))
    assert "50.0" in page.text
    assert "No check was run" in page.text
    assert not page.all("img")
    assert "The verdict is withheld" in page.text


def test_withheld_says_why() -> None:
    cells = list(story_data().results)
    bad = [Finding("zero-gradient", "fail", "p", "100 % of the input gradients are zero")]
    page = Page(render(replace(story_data(), findings=bad, verdict=conclude(cells, bad))))
    assert "No verdict" in page.text
    assert "The verdict is withheld because: zero-gradient" in page.text
    alone = [cell_result(Cell("gray-box", "m", "d", attack="pgd"), 0.5, size=0.1)]
    text = Page(render(small_data(alone))).text
    assert "no attacker who knows the defense met m + d" in text


def test_distances_that_are_nan_are_dashes() -> None:
    result = cell_result(Cell("white-box", "m", attack="pgd"), 0.5, size=0.1)
    result.rows["relative_l2"][:] = float("nan")
    page = Page(render(small_data([result])))
    assert "nan" not in page.text.lower()


def test_targeted_and_voting_cells() -> None:
    cells = [
        cell_result(Cell("none", "m", "d", votes=5, targeted=True), 0.9, draws=4),
        cell_result(
            Cell("white-box", "m", "d", "pgd", votes=5, targeted=True), 0.2, draws=4, size=0.1
        ),
    ]
    cells[1].rows["target_hits"][:] = 3  # three of four draws
    page = Page(render(small_data(cells)))
    assert "m + d (5 votes, mean_probability)" in page.text
    assert "75.0" in page.text
    assert "4 tries" in page.text  # no more than the judge drew
    assert "the label that the attacker chose (targeted)" in page.text


def test_write_leaves_one_file(tmp_path: Path) -> None:
    path = write(small_data(), tmp_path / "report.html")
    assert path.read_text(encoding="utf-8") == render(small_data())
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        write(small_data(), tmp_path / "file" / "report.html")


def test_the_lane_shows_clean_accuracy_as_a_line(page: Page) -> None:
    lanes = story(full())
    lines = [float(a["x1"].rstrip("%")) for a in page.all("line", class_="reference")]
    assert lines == pytest.approx(
        [100 * lane.clean for lane in lanes for _ in lane.marks], abs=0.006
    )
    bars = [a for a in page.all("rect") if a["class"].startswith("bar")]
    measured = [m for lane in lanes for m in lane.marks if m.measured]
    assert [float(a["width"].rstrip("%")) for a in bars] == pytest.approx(
        [100 * m.value for m in measured], abs=0.006
    )
    # Every row says in words what it shows.
    drawn = [a for a in page.all("svg") if a.get("class") == "track" and a.get("role") == "img"]
    assert all(a["aria-label"] for a in drawn)
    assert len(page.all("desc")) == len(drawn)


def test_the_card_says_how_each_attacker_went_about_it(page: Page) -> None:
    rows = {(a.scenario, a.attack): a for a in attackers(story_data())}
    # By hand, from pgd's signature, its preset "ace", and the expressions of the fake.
    sign = rows["gray-box", "pgd(steps=40, step_size=2/255)"]
    assert (sign.steps, sign.restarts, sign.draws, sign.rule) == ("40", "1", "", "")
    eot = rows["white-box", "pgd(steps=20, gradient=eot(8))"]
    assert (eot.steps, eot.draws, eot.rule) == ("20", "eot(8)", "each part's own")
    for row in rows.values():
        assert row.attack in page.text
    words = dict(card(story_data()))
    assert words["Judge"] == [
        "32 fresh draws per image where the pipeline is random, one forward pass where it is not"
    ]
    assert words["Budget"] == [
        "linf at most 8/255 (0.0313725 of a [0, 1] image), and every pixel in [0, 1]"
    ]
    assert any(line.startswith("gray-box: ") for line in words["Knowledge"])
    told = {"text": "bundled:cifar10: 200 of 500 images", "samples": 200, "available": 500}
    lines = dict(card(story_data(metadata={"data": told})))["Data"]
    assert lines[0] == told["text"]
    assert "the first 200 in the order of a keyed hash" in lines[1]


def test_what_was_not_tried_is_said() -> None:
    lines = uncovered(story_data())
    assert any(line.startswith("not run: adaptive (") for line in lines)
    assert not any(line.startswith("not run: white-box") for line in lines)
    assert "other norms: l2, l1, l0; larger budgets" in lines
    assert "targeted attacks" in lines
    assert "untargeted attacks" not in lines


def test_settings_of_an_unknown_attack_are_left_out() -> None:
    cells = [cell_result(Cell("white-box", "m", attack="no_such(steps=3)"), 0.5, size=0.1)]
    (row,) = attackers(small_data(cells))
    assert (row.attack, row.steps) == ("no_such(steps=3)", "")


def test_what_the_model_sees_and_thinks() -> None:
    x = waves()

    def views(result, positions):  # type: ignore[no-untyped-def]
        shares = torch.zeros(len(positions), 10)
        shares[torch.arange(len(positions)), result.rows["prediction"][list(positions)]] = 0.625
        return Seen(1 - x[list(positions)], shares)

    data = story_data(images=images_of(x), gradients=gradients_of(x), views=views)
    page = Page(render(data))
    assert len(page.all("img")) == 2 * 4 * 6
    assert page.text.count("62 %") == 2 * 4 * 3  # clean, gray-box and white-box
    assert page.text.count("as the model sees it") == 2 * 4
    assert "on the judge's first draw" in page.text


def test_thresholds_and_sources_stand_beside_the_evidence() -> None:
    found = [Finding("zero-gradient", "warn", "p", "3 % are zero")]
    page = Page(render(small_data([cell_result(Cell("none", model="m"), 0.5)], findings=found)))
    assert CHECKS["zero-gradient"].threshold in page.text
    for letter in CHECKS["zero-gradient"].source.split(","):
        assert SOURCES[letter.strip()] in page.text
