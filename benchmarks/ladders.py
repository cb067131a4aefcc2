"""The attackers' ladder for each of the five papers' systems, on real images, by `feint evaluate`.

    python benchmarks/ladders.py [--only "fd + rdg; prm"] [--threads 1] [--work runs/ladders]

Every system stands before the bundled CIFAR-10 ResNet-20 (ACE before the one that was trained with
it) and meets every attacker of `--scenario all`; the published claim, from its paper's own model
and data, stands beside the rung that it is about. Each ladder is a run that resumes; a finished one
is only read. Writes `results/ladders.json` and `.md`, and each ladder's figure into
`results/ladders/`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from feint.reports.figures import save, story_figure
from feint.reports.stored import from_run
from feint.reports.story import story
from feint.store import open_run

RESULTS = Path(__file__).parent / "results"
START = "from feint.cli.app import main; main()"


@dataclass(frozen=True)
class Ladder:
    """One system: where it stands, and how many images attack it."""

    name: str
    defense: str
    model: str = "bundled:cifar10-resnet20"
    samples: int = 25

    def arguments(self) -> list[str]:
        """Of the command line."""
        return [
            *("evaluate", "--model", self.model, "--defense", self.defense),
            *("--scenario", "all", "-n", str(self.samples)),
        ]


LADDERS = (
    Ladder("ace", "pixel_shift", "bundled:cifar10-resnet20-ace100", 100),
    Ladder("fd-rdg", "fd + rdg"),
    Ladder("fd-rand", "fd + rand"),
    Ladder("fd3-rdg", "fd*3 + rdg"),
    Ladder("pixel-deflection-wavelet", "pixel_deflection + wavelet"),
    Ladder("s2snet", "s2snet"),
    Ladder("prm", "prm"),
)


def climb(ladder: Ladder, work: Path, threads: int, samples: int | None) -> dict[str, Any]:
    """Run or resume one ladder, draw it, and return what it says."""
    folder = work / ladder.name
    words = ladder.arguments()
    if samples is not None:
        words[-1] = str(samples)
    own = ["--threads", str(threads), "--workers", "0", "--out", str(folder)]
    done = subprocess.run([sys.executable, "-c", START, *words, *own], check=False)
    if done.returncode > 1:
        raise SystemExit(f"feint {shlex.join(words)}: exit code {done.returncode}")
    stored = open_run(folder)
    data = from_run(stored)
    (RESULTS / "ladders").mkdir(parents=True, exist_ok=True)
    save(story_figure(data), RESULTS / "ladders" / f"{ladder.name}.svg")
    lane = next(lane for lane in story(data) if any(m.kind == "worst" for m in lane.marks))
    found = stored.evaluation
    return {
        "defense": ladder.defense,
        "model": ladder.model,
        "samples": int(words[-1]),
        "threat": lane.threat,
        "command": shlex.join(["feint", *words]),
        "marks": [asdict(mark) for mark in lane.marks],
        "grade": found.verdict.grade,
        "verdict": found.verdict.text,
        "checks": len(found.findings),
        "flagged": [f"{f.check}: {f.evidence}" for f in found.findings if f.status != "pass"],
        "seconds": round(found.seconds, 1),
        "environment": stored.info["environments"][-1],
    }


def number(mark: dict[str, Any]) -> str:
    """A rung's accuracy with its interval, or a claim."""
    value, low, high = (100 * mark[name] for name in ("value", "low", "high"))
    if mark["kind"] == "claim":
        return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def made(row: dict[str, Any]) -> str:
    """What the numbers come from."""
    where = row["environment"]
    git = where.get("git") or {}
    commit = f", commit {git['commit'][:12]}" if git else ""
    return f"{row['seconds']:.0f} s on {where['cpu']}, torch {where['packages']['torch']}{commit}."


def markdown(report: dict[str, Any]) -> str:
    """The page: a table and a figure for each system."""
    lines = [
        "# The attackers' ladder for the papers' systems",
        "",
        "Accuracy in %, 95 % intervals, worst case per sample within a rung; CIFAR-10 test images, "
        "bundled ResNet-20s. A published claim is about its paper's own model, data and budget, "
        "and no number here is its reproduction: those are in [docs/results.md]"
        "(../../docs/results.md). FD, RDG and Rand were made for images of 299 px, and cost most "
        "of the clean accuracy at 32 px; what they leave at their own size is "
        "[qiu/aligned](../../results/qiu/aligned.md).",
        "",
    ]
    for name, row in report["ladders"].items():
        lines += [
            f"## `{row['defense']}` before `{row['model']}`, {row['samples']} images",
            "",
            f"`{row['command']}`",
            "",
            f"Grade {row['grade']} of the evaluation, {row['checks']} checks. {row['verdict']}",
            "",
            made(row),
            "",
            "| | accuracy | |",
            "|---|---|---|",
        ]
        lines += [f"| {m['label']} | {number(m)} | {m['note']} |" for m in row["marks"]]
        if row["flagged"]:
            lines += [
                "",
                "Checks that did not pass:",
                "",
                *(f"- {text}" for text in row["flagged"]),
            ]
        lines += ["", f"![ladder of {row['defense']}](ladders/{name}.svg)", ""]
    return "\n".join(lines)


def main() -> int:
    """Run what is asked for, and write after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="defenses, separated by semicolons")
    parser.add_argument("--samples", type=int, default=None, help="instead of each ladder's own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/ladders"))
    parser.add_argument("--out", type=Path, default=RESULTS / "ladders.json")
    args = parser.parse_args()
    wanted = {text.strip() for text in args.only.split(";")} - {""}
    if unknown := wanted - {ladder.defense for ladder in LADDERS}:
        parser.error(f"no ladder for {', '.join(sorted(unknown))}")
    before = json.loads(args.out.read_text())["ladders"] if args.out.exists() else {}
    for ladder in LADDERS:
        if wanted and ladder.defense not in wanted:
            continue
        before[ladder.name] = climb(ladder, args.work, args.threads, args.samples)
        order = {one.name: before[one.name] for one in LADDERS if one.name in before}
        report = {"ladders": order}
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
