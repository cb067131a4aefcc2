r"""Every defense before one classifier: clean, gray-box and white-box accuracy, in one table.

    python benchmarks/defense_table.py --model zoo.py:resnet50 --data images.csv --resize 224 \
        --samples 24 --steps 10 --white-steps 20 [--only "fd; fd + rdg"] [--limit 3600]

Gray-box: PGD on the bare classifier, whose examples are made once and judged by every pipeline.
White-box: PGD through the pipeline, exact forward pass, for each part the backward rule of its
declared break, the gradient averaged over `--eot` draws where there is randomness; a deterministic
pipeline's image is done when it is misclassified, a random one's takes every step unless `--stop
success`. Every defense is a run of its own under `--work`, resumable at any moment; finished ones
are only read; other settings need another folder. After `--limit` seconds no further defense is
begun. Writes
`results/defense_table.json` and `.md`; rows that are there and are not asked for stay, so that slow
defenses can be measured on fewer images or steps: each row says its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from feint.core.errors import FeintError
from feint.core.registry import DEFENSES
from feint.defenses import Chain, Defense, parse
from feint.evaluation import Cell, Evaluation
from feint.evaluation.adaptive import break_rules
from feint.evaluation.breaks import known_break
from feint.store import DataSpec, RunSpec, run
from feint.store.memory import hold_on_to_memory
from provenance import provenance

RESULTS = Path(__file__).parent / "results"
CHAINS = (
    "fd*3",
    "fd + rdg",
    "fd*3 + rdg",
    "fd + rand",
    "pixel_deflection + wavelet",
    "pixel_deflection(activation_map='rcam') + wavelet",
)


def spec_of(cells: list[Cell], args: argparse.Namespace, title: str) -> RunSpec:
    data = DataSpec(spec=args.data, samples=args.samples, resize=args.resize)
    return RunSpec(
        title=title,
        data=data,
        cells=tuple(cells),
        batch_size=args.batch_size,
        shard_size=args.batch_size,
        threads=args.threads,
        device=args.device,
        channels_last=True,
    )


def slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text).strip("-")


def rules_of(defense: Defense) -> list[str]:
    """For each part the backward rule of its known break, by name."""
    parts = defense.members if isinstance(defense, Chain) else (defense,)
    rules = [(part.name, known_break(part).rule, part.recommended_rule) for part in parts]
    return [f"{name}: {best if rule == 'default' else rule}" for name, rule, best in rules]


def row_of(found: Evaluation, defense: Defense | None) -> dict[str, Any]:
    row: dict[str, Any] = {"seconds": round(found.seconds, 1), "grade": found.verdict.grade}
    for result in found.results:
        cell = result.cell
        rate = result.accuracy.as_dict()
        row[cell.scenario] = {**rate, "attack": cell.attack, "draws": result.draws}
    if defense is not None:
        row["rules"] = rules_of(defense)
        row["stochastic"] = defense.stochastic
    row["findings"] = [f.as_dict() for f in found.findings if f.as_dict()["status"] != "pass"]
    return row


def percent(row: dict[str, Any], scenario: str) -> str:
    if scenario not in row:
        return "–"
    r = row[scenario]
    return f"{100 * r['value']:.1f} [{100 * r['low']:.1f}, {100 * r['high']:.1f}]"


def markdown(report: dict[str, Any]) -> str:
    about, rows = report["about"], report["rows"]
    learned = "Learned defenses have their bundled weights, trained on CIFAR-10 at 32 px."
    lines = [
        f"# Every defense before one classifier: {about['model']}",
        "",
        f"Images of {about['data']}, linf {about['eps'] * 255:g}/255. Gray-box: PGD on the bare "
        "model. White-box: PGD through the pipeline, for every part the backward rule of its known "
        "break, the gradient a mean over draws where there is randomness. "
        "Pipelines that are random are judged on held-out draws. Accuracy in %, "
        f"95 % intervals. One attack and one loss: an upper bound on what is left. {learned}",
        "",
        "| defense | images | clean | gray-box | white-box | steps × draws | backward rules |",
        "|---|---|---|---|---|---|---|",
    ]
    for text, row in rows.items():
        if "refused" in row:
            lines.append(f"| `{text}` | {row['refused']} | | | | | |")
            continue
        numbers = [percent(row, scenario) for scenario in ("none", "gray-box", "white-box")]
        own = row["settings"]
        draws = own["eot"] if row.get("stochastic") else 1
        steps = f"{own['white_steps']} × {draws}" if text != "none" else f"{own['steps']} × 1"
        cells = [own["samples"], *numbers, steps, ", ".join(row.get("rules", []))]
        lines.append(f"| `{text}` | {' | '.join(map(str, cells))} |")
    if not all(row.get("settings", {}).get("checked", True) for row in rows.values()):
        lines += ["", "The runs did not check themselves (see docs/honest-evaluation.md)."]
    return "\n".join([*lines, "", "```json", json.dumps(about, indent=1), "```", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--resize", type=int, default=None)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--eps", type=float, default=4.0, help="of 255")
    parser.add_argument("--steps", type=int, default=10, help="of the gray-box attack")
    parser.add_argument("--white-steps", type=int, default=20)
    parser.add_argument("--eot", type=int, default=4)
    parser.add_argument("--stop", choices=("never", "success"), default="never")
    parser.add_argument("--judge-draws", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="defenses, separated by semicolons")
    parser.add_argument("--unchecked", action="store_true", help="without the runs' checks")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--work", type=Path, default=Path("runs/defense_table"))
    parser.add_argument("--out", type=Path, default=RESULTS / "defense_table.json")
    args = parser.parse_args()
    until = time.monotonic() + args.limit
    torch.set_num_threads(args.threads)
    hold_on_to_memory()
    plain = f"pgd(steps={args.steps})"
    through = f"pgd(steps={args.white_steps})"
    averaged = f"pgd(gradient=eot({args.eot}), steps={args.white_steps}, stop='{args.stop}')"
    base = Cell("none", args.model, eps=args.eps / 255, judge_draws=args.judge_draws)
    bare_folder = args.work / "none"
    bare = [base, replace(base, scenario="white-box", attack=plain)]
    settings = {
        name: getattr(args, name)
        for name in ("samples", "resize", "steps", "white_steps", "eot", "stop", "judge_draws")
    } | {"checked": not args.unchecked}
    about = provenance(model=args.model, data=args.data, eps=args.eps / 255)
    rows = kept(args.out, about)
    alone = run(spec_of(bare, args, "none"), bare_folder, checked=not args.unchecked)
    if rows.get("none", {}).get("settings", {}).get("samples", 0) <= args.samples:
        rows["none"] = row_of(alone, None) | {"settings": settings}
    texts = [t.strip() for t in args.only.split(";")] if args.only else [*DEFENSES, *CHAINS]
    for text in texts:
        if time.monotonic() > until:
            print(f"{text}: not begun", flush=True)
            continue
        try:
            defense = parse(text)
            own = replace(base, defense=str(defense))
            attack = averaged if defense.stochastic else through
            cells = [
                own,
                replace(own, scenario="gray-box", attack=plain),
                replace(own, scenario="white-box", attack=attack, backward=break_rules(defense)),
            ]
            found = run(
                spec_of(cells, args, text),
                args.work / slug(text),
                checked=not args.unchecked,
                beside=[bare_folder],
            )
            rows[text] = row_of(found, defense) | {"settings": settings}
        except (FeintError, RuntimeError) as error:
            rows[text] = {"refused": f"{type(error).__name__}: {error}"[:160]}
        shown = {s: percent(rows[text], s) for s in ("none", "gray-box", "white-box")}
        print(text, rows[text].get("refused") or shown, flush=True)
        report = {"about": about, "rows": rows}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(markdown(report))
    return int(any("refused" in row for row in rows.values()))


def kept(file: Path, about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of an earlier result for the same model, data and budget."""
    if not file.exists():
        return {}
    earlier = json.loads(file.read_text())
    same = all(earlier["about"][name] == about[name] for name in ("model", "data", "eps"))
    return dict(earlier["rows"]) if same else {}


if __name__ == "__main__":
    sys.exit(main())
