"""Write `docs/results.md`, and a page for each paper in `docs/results/`.

Every number is read from `results/PAPER/TABLE.json`, what was to be measured from the recipes; the
words around them are in `results_page.yaml`.

    python tools/make_results_page.py           rewrite the pages
    python tools/make_results_page.py --check   exit 1 if one is out of date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
UP = "../../"  # from a paper's page to the root
ORDER = ("ace", "qiu", "pixel_deflection", "s2snet", "prm")
ANSWERS = {
    "holds": "What holds",
    "fails": "What does not hold",
    "undecided": "What our numbers cannot decide",
}
HEAD = "<!-- written by tools/make_results_page.py; do not edit -->"
_LOOKUP = re.compile(r"\[\[(.+?)\]\]")


class Shelf:
    """Results and recipes by name."""

    def __init__(self, root: Path) -> None:
        self.results = {}
        for file in sorted((root / "results").glob("*/*.json")):
            found = json.loads(file.read_text(encoding="utf-8"))
            if found.get("scale") == "smoke":
                sys.exit(f"{file}: a smoke test is no result")
            self.results[f"{file.parent.name}/{file.stem}"] = found
        self.recipes = {}
        for paper in ORDER:
            folder = root / "src" / "feint" / "recipes" / "papers" / paper
            for file in sorted(folder.glob("*.yaml"), key=lambda f: _order(f.stem)):
                text = yaml.safe_load(file.read_text(encoding="utf-8"))
                self.recipes[f"{paper}/{file.stem}"] = text

    def entry(self, name: str, labels: list[str]) -> dict[str, Any] | None:
        """One number of a result; None if it was not measured."""
        if name not in self.recipes:
            sys.exit(f"there is no recipe {name!r}")
        axes = [list(map(str, axis)) for axis in self.recipes[name]["axes"].values()]
        if len(labels) != len(axes) or any(
            label not in axis for label, axis in zip(labels, axes, strict=True)
        ):
            sys.exit(f"{name} has no cell {labels}; its axes are {axes}")
        if name not in self.results:
            return None
        for entry in self.results[name]["entries"]:
            if list(entry["labels"].values()) == labels:
                return entry if entry["ours"]["value"] is not None else None
        return None


def _order(stem: str) -> tuple[bool, int, str]:
    digits = re.search(r"\d+", stem)
    return (not stem.startswith("table"), int(digits.group()) if digits else 0, stem)


def number(found: dict[str, Any] | None, share: bool) -> str:
    """`71.9 % [63, 79]`: shares in percent; a dash for what is not there."""
    if found is None or found.get("value") is None:
        return "–"
    value, low, high = found["value"], found.get("low"), found.get("high")
    if not share:
        return f"{value:.3g}"
    text = f"{100 * value:.1f} %"
    return text if low is None or high is None else f"{text} [{100 * low:.0f}, {100 * high:.0f}]"


def published(entry: dict[str, Any]) -> str:
    """The published number as it was given."""
    value = entry["published"]
    if value is None:
        return "–"
    return f"{100 * value:.4g} %" if entry["unit"] == "share" else f"{value:.4g}"


def filled(text: str, shelf: Shelf) -> str:
    """A sentence with its numbers; those that nobody measured yet say so."""

    def look(match: re.Match[str]) -> str:
        name, *labels, field = (part.strip() for part in match.group(1).split(";"))
        entry = shelf.entry(name, labels)
        if entry is None:
            return f"(awaits `{name}`)"
        if field == "published":
            return published(entry)
        return number(entry[field], entry["unit"] == "share")

    return _LOOKUP.sub(look, text)


def link(name: str, up: str, text: str = "") -> str:
    """To a result's page, from a folder that is `up` below the root."""
    return f"[{text or '`' + name + '`'}]({up}results/{name}.md)"


def key_numbers(rows: list[dict[str, Any]], shelf: Shelf, up: str) -> list[str]:
    """The table of a paper's key numbers."""
    lines = ["| | published | ours | who knows of it | from |", "|---|---|---|---|---|"]
    for row in rows:
        name = row["at"]
        entry = shelf.entry(name, [str(label) for label in row["labels"]])
        if entry is None:
            lines.append(f"| {row['what']} | | not measured yet | | `{name}` |")
            continue
        share = entry["unit"] == "share"
        cells = (published(entry), number(entry["ours"], share), number(entry["adaptive"], share))
        lines.append(f"| {row['what']} | {' | '.join(cells)} | {link(name, up)} |")
    return lines


def verdicts(paper: str, shelf: Shelf) -> list[str]:
    """The papers' claims, and ours, by what the numbers say of them."""
    lines = []
    told = [
        (claim, name, result)
        for name, result in shelf.results.items()
        if name.partition("/")[0] == paper
        for claim in result["claims"]
    ]
    for answer, heading in ANSWERS.items():
        chosen = [t for t in told if t[0]["answer"] == answer and t[0]["by"] == "paper"]
        if chosen:
            lines += [f"**{heading}** of what the paper says:", ""]
            lines += [_claim(*entry) for entry in chosen]
            lines.append("")
    own = [t for t in told if t[0]["by"] == "us"]
    if own:
        lines += ["**What we say of it**, and what the numbers answer:", ""]
        lines += [_claim(*entry, answer=True) for entry in own]
        lines.append("")
    return lines


def answers(paper: str, shelf: Shelf) -> list[str]:
    """The paper's claims in a word each: holds, fails, undecided."""
    found = []
    for answer in ANSWERS:
        for name, result in shelf.results.items():
            found += [
                f"- *{answer}*: {claim['say']} ({link(name, '../', result['place'])})"
                for claim in result["claims"]
                if (claim["answer"], claim["by"]) == (answer, "paper")
                and name.partition("/")[0] == paper
            ]
    return ["**What of the paper's words holds**", "", *found] if found else []


def _claim(claim: dict[str, str], name: str, result: dict[str, Any], answer: bool = False) -> str:
    told = f"*{claim['answer']}*: " if answer else ""
    evidence = " ".join(claim["evidence"].split())
    return f"- {told}{claim['say']} {link(name, UP, result['place'])}: {evidence}."


def tables(paper: str, shelf: Shelf) -> list[str]:
    """A line for every table and figure, measured or not."""
    lines = [
        "| | what | scale | published numbers hit | failed checks |",
        "|---|---|---|---|---|",
    ]
    for name, recipe in shelf.recipes.items():
        if name.partition("/")[0] != paper:
            continue
        what = recipe["title"].replace("|", "\\|")
        result = shelf.results.get(name)
        if result is None:
            lines.append(
                f"| `{name}` | {what} | no result committed yet: `feint reproduce {name}` | | |"
            )
            continue
        count = result["targets"]
        known = count["hit"] + count["missed"]
        hits = f"{count['hit']} of {known}" if known else "none is known"
        left = sum("lacks" in entry for entry in result["entries"])
        scale = result["scale"] + (f", {left} cells left out" if left else "")
        failed = ", ".join(result["checks"]["failed"]) or "–"
        lines.append(f"| {link(name, UP)} | {what} | {scale} | {hits} | {failed} |")
    return lines


def figures(paper: str, shelf: Shelf) -> list[str]:
    """Every figure that was measured, with what it shows."""
    lines = []
    for name, recipe in shelf.recipes.items():
        result = shelf.results.get(name)
        if name.partition("/")[0] != paper or result is None or not recipe.get("drawing"):
            continue
        lines += [f"### {result['place']}: {recipe['title']}", ""]
        lines += [f"[![{recipe['title']}]({UP}results/{name}.png)]({UP}results/{name}.md)", ""]
    return lines


def overview(shelf: Shelf) -> list[str]:
    """One line per paper."""
    lines = [
        "| paper | tables and figures measured | published numbers hit | the paper's claims: "
        "hold / undecided / fail |",
        "|---|---|---|---|",
    ]
    for paper in ORDER:
        names = [n for n in shelf.recipes if n.partition("/")[0] == paper]
        done = [shelf.results[n] for n in names if n in shelf.results]
        hit = sum(r["targets"]["hit"] for r in done)
        known = hit + sum(r["targets"]["missed"] for r in done)
        claims = [c["answer"] for r in done for c in r["claims"] if c["by"] == "paper"]
        counts = " / ".join(str(claims.count(a)) for a in ("holds", "undecided", "fails"))
        hits = f"{hit} of {known}" if known else "–"
        lines.append(
            f"| [{paper}](results/{paper}.md) | {len(done)} of {len(names)} | {hits} | {counts} |"
        )
    return lines


def pages(root: Path = ROOT) -> dict[str, str]:
    """The text of every page by its path."""
    shelf = Shelf(root)
    words = yaml.safe_load((root / "tools" / "results_page.yaml").read_text(encoding="utf-8"))
    lines = [
        HEAD,
        "# What of the five papers holds",
        "",
        "Every table and figure is one recipe (`feint reproduce --list`); its committed result is "
        "linked below with scale, hardware, versions, seed and time. *Published* is the paper's "
        "number, *ours* the same protocol measured here with its 95 % interval, *who knows of "
        "it* the same cell under an attacker who knows the defense. At the scale `cpu` smaller "
        "networks and fewer images stand in for the paper's, as each result says: read orders "
        "and trends there, not digits, and take what fails there as failing for these "
        "stand-ins. A published number counts as hit if it lies within the sampling errors of "
        "both; a miss is reported and never edited away. A claim *holds* or *fails* only where "
        "the intervals bear it out.",
        "",
        *overview(shelf),
        "",
    ]
    found = {}
    for paper in ORDER:
        own = words[paper]
        why = ["**Why**", "", *(f"- {filled(text, shelf)}" for text in own["why"]), ""]
        lines += [f"## {own['heading']}", "", own["idea"], ""]
        lines += [*key_numbers(own["key"], shelf, "../"), "", *why]
        lines += [*answers(paper, shelf), ""]
        more = f"[this paper's page](results/{paper}.md)"
        lines += [f"The evidence, and every table and figure: {more}.", ""]
        alone = [HEAD, f"# {own['heading']}", "", own["idea"], ""]
        alone += ["How to read it: [what of the five papers holds](../results.md).", ""]
        alone += [*key_numbers(own["key"], shelf, UP), "", *verdicts(paper, shelf), *why]
        alone += ["## Tables and figures", "", *tables(paper, shelf), "", *figures(paper, shelf)]
        found[f"docs/results/{paper}.md"] = "\n".join(alone)
    return {"docs/results.md": "\n".join(lines), **found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a page is out of date")
    arguments = parser.parse_args()
    stale = 0
    for name, text in pages().items():
        target = ROOT / name
        if not arguments.check:
            target.parent.mkdir(exist_ok=True)
            target.write_text(text, encoding="utf-8")
        elif not target.exists() or target.read_text(encoding="utf-8") != text:
            print(f"{name} is out of date: run python tools/make_results_page.py")
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
