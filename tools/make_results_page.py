"""Write `docs/results.md` from `results/PAPER/TABLE.json`, the recipes, and `results_page.yaml`.

Every number on the page is read from a result; the words around them are in the YAML file.

    python tools/make_results_page.py           rewrite the page
    python tools/make_results_page.py --check   exit 1 if it is out of date
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
ORDER = ("ace", "qiu", "pixel_deflection", "s2snet", "prm")
ANSWERS = {
    "holds": "What holds",
    "fails": "What does not hold",
    "undecided": "What our numbers cannot decide",
}
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


def link(name: str, text: str = "") -> str:
    """To a result's page."""
    return f"[{text or '`' + name + '`'}](../results/{name}.md)"


def key_numbers(rows: list[dict[str, Any]], shelf: Shelf) -> list[str]:
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
        lines.append(f"| {row['what']} | {' | '.join(cells)} | {link(name)} |")
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


def _claim(claim: dict[str, str], name: str, result: dict[str, Any], answer: bool = False) -> str:
    told = f"*{claim['answer']}*: " if answer else ""
    evidence = " ".join(claim["evidence"].split())
    return f"- {told}{claim['say']} {link(name, result['place'])}: {evidence}."


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
        figure = f"../results/{name}.png" if recipe.get("drawing") else ""
        more = f" ([figure]({figure}))" if figure else ""
        lines.append(f"| {link(name)}{more} | {what} | {scale} | {hits} | {failed} |")
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
        lines.append(f"| [{paper}](#{paper}) | {len(done)} of {len(names)} | {hits} | {counts} |")
    return lines


def page(root: Path = ROOT) -> str:
    """The whole page."""
    shelf = Shelf(root)
    words = yaml.safe_load((root / "tools" / "results_page.yaml").read_text(encoding="utf-8"))
    lines = [
        "<!-- written by tools/make_results_page.py; do not edit -->",
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
    for paper in ORDER:
        own = words[paper]
        lines += [f'<a id="{paper}"></a>', f"## {own['heading']}", "", own["idea"], ""]
        lines += [*key_numbers(own["key"], shelf), ""]
        lines += verdicts(paper, shelf)
        lines += ["**Why**", ""]
        lines += [f"- {filled(text, shelf)}" for text in own["why"]]
        lines += ["", *tables(paper, shelf), ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if the page is out of date")
    arguments = parser.parse_args()
    target, text = ROOT / "docs" / "results.md", page()
    if arguments.check:
        same = target.exists() and target.read_text(encoding="utf-8") == text
        if not same:
            print(f"{target.name} is out of date: run python tools/make_results_page.py")
        return 0 if same else 1
    target.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
