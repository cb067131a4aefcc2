"""What bfloat16 gradients, channels innermost and `torch.compile` gain, and whether verdicts stay.

    python benchmarks/precision.py --model bundled:cifar10-resnet20-at
    python benchmarks/precision.py --model ../shared/models/zoo.py:resnet50 \
        --data ../shared/data/nips2017/images.csv --resize 224 --images 16 --steps 5

Every row is the same PGD with every step taken; `mixed()` runs gradients in bfloat16 and verifies
every success in float32. Success is judged here, by the plain model in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import feint.data
import feint.models
from feint.attacks import pgd
from feint.core.gradients import backprop
from feint.core.mixed import mixed
from pgd import RESULTS, machine

ROWS = {
    "float32": {},
    "float32, channels last": {"channels_last": True},
    "bf16": {"bf16": True},
    "bf16, channels last": {"channels_last": True, "bf16": True},
    "float32, compiled": {"compile": True},
    "bf16, channels last, compiled": {"channels_last": True, "bf16": True, "compile": True},
}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    data = feint.data.load(args.data, samples=args.images, resize=args.resize)
    batch = next(data.batches(len(data)))
    x, y = batch.x.to(args.device), batch.y.to(args.device)
    plain = feint.models.load(args.model, device=args.device)
    keep = range(0, len(x), args.batch)
    rows: dict[str, Any] = {}
    part = {"machine": machine(), "images": len(x), "steps": args.steps, "rows": rows}
    first: dict[str, torch.Tensor] = {}
    for name, how in ROWS.items():
        if how.get("compile") and not args.compile:
            continue
        model = feint.models.load(
            args.model, device=args.device,
            channels_last=how.get("channels_last", False), compile=how.get("compile", False),
        )  # fmt: skip
        gradient = mixed() if how.get("bf16") else backprop
        once = {"eps": args.eps / 255, "steps": args.steps, "gradient": gradient}
        pgd(model, x[: args.batch], y[: args.batch], **{**once, "steps": 1})  # warm up, compile
        for stop in ("never", "success"):
            begun = time.perf_counter(), time.process_time()
            found = [
                pgd(model, x[i : i + args.batch], y[i : i + args.batch], stop=stop, **once)
                for i in keep
            ]
            if args.device != "cpu":
                torch.cuda.synchronize()
            wall, cpu = time.perf_counter() - begun[0], time.process_time() - begun[1]
            with torch.no_grad():
                fell = torch.cat(
                    [plain(found[n]).argmax(1) != y[i : i + args.batch] for n, i in enumerate(keep)]
                )
            same = first.setdefault(stop, fell)
            rows[f"{name}, stop={stop}"] = {
                "seconds": wall, "cpu_seconds": cpu, "success": float(fell.double().mean()),
                "other_verdicts": int((fell != same).sum()),
            }  # fmt: skip
            print(name, stop, json.dumps(rows[f"{name}, stop={stop}"]), flush=True)
    return part


def markdown(report: dict[str, Any]) -> str:
    lines = ["# Precision and layout", ""]
    for key, part in report.items():
        where = part["machine"]
        lines += [
            f"## {key}", "",
            f"PGD, {part['steps']} steps, {part['images']} images. {where['cpu']}, "
            f"{where['threads']} threads, torch {where['versions']['torch']}.", "",
            "| how | CPU seconds | of float32 | success | verdicts that differ |",
            "|---|---|---|---|---|",
        ]  # fmt: skip
        for name, row in part["rows"].items():
            base = part["rows"][f"float32, stop={name.rpartition('=')[2]}"]
            lines.append(
                f"| {name} | {row['cpu_seconds']:.2f} | "
                f"{row['cpu_seconds'] / base['cpu_seconds']:.2f} | {row['success']:.1%} | "
                f"{row['other_verdicts']} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=feint.models.DEFAULT)
    parser.add_argument("--data", default=feint.data.DEFAULT)
    parser.add_argument("--resize", type=int)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--eps", type=float, default=8, help="linf, in 255ths")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile, too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "precision.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    report = json.loads(args.out.read_text()) if args.out.exists() else {}
    report[f"{args.model.rpartition('/')[2]}, {args.device}"] = measure(args)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
