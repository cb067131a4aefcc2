"""S1's Table I (properties of nine defenses) for any model and data, beside the published figures.

    python benchmarks/s1_table1.py --model zoo.py:inception_v3 --data images.csv [--limit 200]

Measured chunk by chunk; every chunk is kept under `--work`, so that a run that was stopped, or that
met its `--limit` in seconds, goes on where it was. Rows that the results hold already for the same
model, data, samples, draws and seed are not measured again, unless `--again`. Rows whose defense is
not registered are named as missing. Writes `results/s1_table1.json` and `.md`. Exit code 1 if a row
is not complete.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import feint.data
import feint.models
from feint.core import spec
from feint.core.registry import DEFENSES
from feint.defenses import parse
from feint.evaluation.metrics import Rate
from feint.evaluation.properties import Mean, Properties, measure, summarise
from feint.recipes.s1_table1 import CONTROLS, PRESETS, ROWS
from feint.store.memory import hold_on_to_memory
from provenance import provenance

RESULTS = Path(__file__).parent / "results"
CHUNK = 25


class Remembering(nn.Module):
    """A classifier that keeps its logits of whole batches, on disk: clean images come again."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        super().__init__()
        self.model, self.folder = model, folder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        name = hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()[:20]
        file = self.folder / f"logits-{name}.npy"
        if file.exists():
            return torch.from_numpy(np.load(file))
        logits = self.model(x)
        partial = file.with_suffix(".part.npy")
        np.save(partial, logits.numpy())
        partial.replace(file)
        return logits


def missing(expression: str) -> bool:
    """Whether a defense, or its preset, is not there."""
    for call in spec.calls(spec.parse(expression)):
        if call.name not in DEFENSES:
            return True
        preset = call.keywords.get("preset")
        if preset is not None and preset not in DEFENSES[call.name].presets:
            return True
    return False


def expressions() -> list[str]:
    rows = [row.expression(preset) for preset in PRESETS for row in ROWS]
    return list(dict.fromkeys([*rows, *CONTROLS]))


def chunk_file(work: Path, expression: str, start: int, args: argparse.Namespace) -> Path:
    parts = [DEFENSES[c.name].version for c in spec.calls(spec.parse(expression))]
    facts = [args.model, args.data, args.samples, args.draws, args.seed]
    key = json.dumps([expression, parts, start, *facts])
    return work / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.npz"


def work_on(
    expression: str, model: nn.Module, data: Any, args: argparse.Namespace, until: float
) -> Properties | None:
    """The properties of one defense; None if time ran out before they were complete."""
    parts = []
    for start in range(0, len(data), CHUNK):
        file = chunk_file(args.work, expression, start, args)
        if not file.exists():
            if time.monotonic() > until:
                return None
            rows = range(start, min(start + CHUNK, len(data)))
            batch = next(data.subset(rows).batches(CHUNK))
            found = measure(
                parse(expression),
                model,
                batch.x,
                batch.y,
                draws=args.draws,
                probed=CHUNK,
                seed=args.seed,
                # Samples are counted by their place, so that the first ones are probed.
                index=torch.arange(rows.start, rows.stop),
                batch_size=args.batch_size,
            )
            partial = file.with_suffix(".part.npz")
            np.savez(partial, **found)
            partial.replace(file)
        with np.load(file) as kept:
            parts.append(dict(kept))
    return summarise(parts, expression, draws=args.draws)


def measured(file: Path, args: argparse.Namespace) -> dict[str, Properties]:
    """The rows of an earlier result with the same settings."""
    if args.again or not file.exists():
        return {}
    kept = json.loads(file.read_text())
    settings = ("samples", "draws", "seed")
    if any(kept["about"][name] != getattr(args, name) for name in settings) or any(
        not getattr(args, name).endswith(kept["about"][name]) for name in ("model", "data")
    ):
        return {}
    rates, means = ("clean", "accuracy", "agreement"), ("rms", "ssim", "spread", "gradient")
    return {
        text: Properties(
            **{name: row[name] for name in ("defense", "n", "draws", "model_draws")},
            **{name: Rate(**row[name]) for name in rates},
            **{name: Mean(**row[name]) for name in means},
            fidelity={rule: Mean(**value) for rule, value in row["fidelity"].items()},
        )
        for text, row in kept["measured"].items()
        if row is not None
    }


def cells(p: Properties | None) -> list[str]:
    if p is None:
        return ["not measured"] * 4
    a = p.accuracy
    return [
        f"{p.rms.value:.4f} [{p.rms.low:.4f}, {p.rms.high:.4f}]",
        f"{p.ssim.value:.4f} [{p.ssim.low:.4f}, {p.ssim.high:.4f}]",
        f"{a.value:.3f} [{a.low:.3f}, {a.high:.3f}]",
        f"{p.spread.value:.4f}",
    ]


def markdown(found: dict[str, Properties | None], about: dict[str, Any]) -> str:
    some = next(p for p in found.values() if p is not None)
    lines = [
        "# S1, Table I: what nine defenses do to images and to accuracy",
        "",
        f"Model {about['model']}, {about['samples']} images of {about['data']}, "
        f"accuracy without defense {some.clean}. `repo` is S1's own code, `paper` the text. "
        "Distances are means over images and draws, accuracy is over one draw per image, in "
        "brackets 95 % intervals over the images. Published: 100 other images, Inception v3.",
        "",
    ]
    head = "| defense | | rms | SSIM | accuracy | spread over draws |"
    lines += [head, "|---|---|---|---|---|---|"]
    for row in ROWS:
        lines.append(
            f"| {row.name} | published | {row.rms:.4f} | {row.ssim:.4f} | {row.accuracy:.2f} | |"
        )
        for preset in PRESETS:
            text = row.expression(preset)
            lines.append(f"| `{text}` | {preset} | " + " | ".join(cells(found.get(text))) + " |")
    lines += ["", "Controls:", "", head, "|---|---|---|---|---|---|"]
    for text in CONTROLS:
        lines.append(f"| `{text}` | | " + " | ".join(cells(found.get(text))) + " |")
    lines += [
        "",
        "## Differentiability",
        "",
        "`autograd`: the share of a change by ±1/255 that autograd foretells (0: none, property 4 "
        "holds for it). The other columns: for each backward rule, the cosine between the change "
        "that it foretells for ±8/255 and the one that happens. First "
        f"{min(CHUNK, about['samples'])} images.",
        "",
        "| defense | autograd | rules |",
        "|---|---|---|",
    ]
    for text, p in found.items():
        if p is not None:
            rules = ", ".join(f"{name} {value.value:.3f}" for name, value in p.fidelity.items())
            lines.append(f"| `{text}` | {p.gradient.value:.3f} | {rules} |")
    lines += ["", *finding(found), "", "## Made by", "", "```json", json.dumps(about, indent=1)]
    return "\n".join([*lines, "```", ""])


def finding(found: dict[str, Properties | None]) -> list[str]:
    """FD's shift, in numbers."""
    coded, aligned = found.get("fd"), found.get("fd(preset='paper')")
    shift, thrice = found.get("pixel_shift(dx=2, dy=2)"), found.get("fd(passes=3)")
    exact = found.get("fd(align='exact', passes=3)")
    if coded is None or aligned is None or shift is None or thrice is None or exact is None:
        return []
    return [
        "## FD's shift",
        "",
        f"S1 publishes rms .1343 and SSIM .4310 for FD. As coded it measures rms "
        f"{coded.rms.value:.4f}, SSIM {coded.ssim.value:.4f}. The code pads 299 px to 304 around "
        "the image, and crops from the corner of the padded one, so that each pass moves the image "
        "by 2 px down and right. With the crop where it belongs FD measures rms "
        f"{aligned.rms.value:.4f}, SSIM {aligned.ssim.value:.4f}; the same move by (2, 2) without "
        f"any DCT rms {shift.rms.value:.4f}, SSIM {shift.ssim.value:.4f}. Three passes: as coded "
        f"{thrice.rms.value:.4f} / {thrice.ssim.value:.4f} (a move by 6 px), aligned "
        f"{exact.rms.value:.4f} / {exact.ssim.value:.4f}. Property 2 of FD, and all that further "
        "passes add to it, is the translation, which an attacker undoes exactly: for the change "
        "that ±8/255 makes, the identity foretells a cosine of "
        f"{coded.fidelity['identity'].value:.3f}, the translation alone (rule `aligned`) "
        f"{coded.fidelity['aligned'].value:.3f}.",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--only", default="", help="defenses, separated by semicolons")
    parser.add_argument("--work", type=Path, default=Path("runs/s1_table1"))
    parser.add_argument("--name", default="s1_table1")
    parser.add_argument("--again", action="store_true", help="rows that are there, too")
    args = parser.parse_args()
    hold_on_to_memory()
    until = time.monotonic() + args.limit
    args.work.mkdir(parents=True, exist_ok=True)
    model = Remembering(feint.models.load(args.model), args.work)
    data = feint.data.load(args.data, samples=args.samples)
    earlier = measured(RESULTS / f"{args.name}.json", args)
    wanted = [t.strip() for t in args.only.split(";")] if args.only else expressions()
    found: dict[str, Properties | None] = {}
    for text in expressions():
        if text in earlier:
            found[text] = earlier[text]
        elif text not in wanted:
            found[text] = None
        else:
            found[text] = None if missing(text) else work_on(text, model, data, args, until)
        state = "missing or unfinished" if found[text] is None else found[text].rms
        print(f"{text}: {state}", flush=True)
    if all(p is None for p in found.values()):
        return 1
    about = provenance(
        model=args.model, data=args.data, samples=len(data), draws=args.draws, seed=args.seed
    )
    RESULTS.mkdir(exist_ok=True)
    kept = {
        "about": about,
        "published": {r.name: {"rms": r.rms, "ssim": r.ssim, "accuracy": r.accuracy} for r in ROWS},
        "rows": {r.name: {p: r.expression(p) for p in PRESETS} for r in ROWS},
        "measured": {t: None if p is None else p.as_dict() for t, p in found.items()},
    }
    (RESULTS / f"{args.name}.json").write_text(json.dumps(kept, indent=1) + "\n")
    (RESULTS / f"{args.name}.md").write_text(markdown(found, about))
    return int(any(p is None for p in found.values()))


if __name__ == "__main__":
    sys.exit(main())
