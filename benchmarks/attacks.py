"""Every attack beside every peer that has it, and what Feint's own cost around the model's passes.

    python benchmarks/attacks.py --model bundled:cifar10-resnet20-at --attacks pgd,autoattack
    python benchmarks/attacks.py --overhead

Everyone attacks the same correctly classified images with the same settings, in one process, in
turn. Success is judged here, by one forward pass over what each returned, and so is the distance,
over the images that it fooled. CPU seconds stand beside seconds: on a machine that does something
else, too, compare the former. Rows that the results file has already are kept (`--again` for new
ones), so that a run goes on where it was stopped. A contestant that needs more CPU time than
`--limit` is stopped and listed so; a peer that cannot be imported is listed as missing.

    pip install foolbox==3.3.4 adversarial-robustness-toolbox==1.20.1
    pip install --no-deps torchattacks==3.5.1 adv-lib==0.2.8 pyautoattack==0.2.0

`--overhead` runs every attack with `stop="never"` on a model that costs next to nothing, takes off
what that model's own passes cost, and sets the rest against the same passes of a ResNet-18: S0's
own for 32×32 pixels, or with `--size 224` torchvision's, which does fifteen times less for a pixel.
So the attack's own work is seen even where the passes are 99 % of the time and vary by more.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
import json
import os
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import feint.attacks
import feint.data
import feint.models
from contestants import CASES, PEERS, Budget
from feint.core.norms import distance
from feint.core.registry import ATTACKS
from pgd import RESULTS, Counter, correct_images, machine

OVER = 0.05
"""Target of `--overhead`: at most so much on top of the model's passes."""


class OutOfTimeError(Exception):
    """A contestant used up its CPU time."""


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError once this process has used so many CPU seconds more."""

    def stop(*_: Any) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def clocked(run: Callable[[], Any]) -> tuple[Any, float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    out = run()
    return out, time.perf_counter() - wall, time.process_time() - cpu


# --- the table ------------------------------------------------------------------------------------


def one_row(
    make: Callable[..., Any], model: nn.Module, other: nn.Module | None, budget: Budget, norm: str,
    x: Tensor, y: Tensor, limit: float, repeats: int,
) -> dict[str, Any]:  # fmt: skip
    """What one contestant did."""
    counter = Counter(model).eval()
    walls, cpus, x_adv = [], [], x
    try:
        run = make(counter, budget)
        with cpu_limit(limit):
            for _ in range(repeats):
                x_adv, wall, cpu = clocked(lambda: run(x.clone(), y).detach())
                walls.append(wall)
                cpus.append(cpu)
    except ImportError as error:
        return {"missing": str(error)}
    except OutOfTimeError:
        if not walls:
            return {"stopped_after_cpu_seconds": limit}
    except Exception as error:  # a peer's own failure is a result
        return {"failed": f"{type(error).__name__}: {error}"[:200]}
    with torch.no_grad():
        fooled = model(x_adv).argmax(1) != y
        elsewhere = None if other is None else other(x_adv).argmax(1) != y
    size = distance(x_adv, x, "linf" if norm == "spatial" else norm)
    row = {
        "success": float(fooled.double().mean()),
        "distance": float(size[fooled].mean()) if bool(fooled.any()) else None,
        "forwards_per_image": counter.forwards / len(x) / len(walls),
        "backwards_per_image": counter.backwards / len(x) / len(walls),
        "seconds": statistics.median(walls),
        "cpu_seconds": statistics.median(cpus),
        "repeats": len(walls),
    }
    if elsewhere is not None:
        row["success_on_other"] = float(elsewhere.double().mean())
    return row


def table(args: argparse.Namespace, report: dict[str, Any]) -> None:
    model = feint.models.load(args.model).eval()
    other = feint.models.load(args.other).eval() if args.other else None
    budget = Budget(linf=args.eps / 255, l2=args.eps_l2)
    key = f"{args.model.rpartition('/')[2]}, linf {args.eps:g}/255, l2 {args.eps_l2:g}"
    part = report.setdefault("tables", {}).setdefault(key, {})
    for name in args.attacks or CASES:
        case = CASES[name]
        count = min(args.images or case.images, case.images)
        x, y = correct_images(model, args.data, count)
        group = part.get(name)
        if group is None or group["images"] != count or args.again:
            group = part[name] = {"images": count, "norm": case.norm, "rows": {}}
        group["machine"] = about()
        for who, make in case.who.items():
            if who in group["rows"] or (args.only and not who.startswith(tuple(args.only))):
                continue
            group["rows"][who] = one_row(
                make, model, other, budget, case.norm, x, y, args.limit, args.repeats
            )
            print(name, who, json.dumps(group["rows"][who]), flush=True)
            save(args.out, report)


# --- the attacks' own cost ------------------------------------------------------------------------


class Cheap(nn.Module):
    """Next to no work: five logits from the first values of each image; notes each call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 5)
        self.calls: list[tuple[int, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        """Five logits."""
        self.calls.append((len(x), x.requires_grad))
        return self.linear(x.flatten(1)[:, :16])


def passes(model: nn.Module, x: Tensor, calls: list[tuple[int, bool]]) -> None:
    """The same passes with nothing around them."""
    for count, back in calls:
        wide = x[:count]
        if back:
            leaf = wide.detach().requires_grad_()
            y = torch.zeros(count, dtype=torch.int64)
            torch.autograd.grad(nn.functional.cross_entropy(model(leaf), y), leaf)
        else:
            with torch.no_grad():
                model(wide)


def overhead(args: argparse.Namespace, report: dict[str, Any]) -> None:
    import torchvision

    from feint.models.architectures import resnet18

    size, batch = args.size, args.batch
    keys = feint.core.random.keys(0, batch)
    x = feint.core.random.uniform(keys, (3, size, size))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = size <= 64
        cheap = Cheap().eval()
        network = (resnet18() if small else torchvision.models.resnet18()).eval()
    with torch.no_grad():
        y = cheap(x).argmax(1)
    cost = {}
    for back in (False, True):
        passes(network, x, [(batch, back)])
        took = [clocked(lambda b=back: passes(network, x, [(batch, b)]))[2] for _ in range(3)]
        cost[back] = statistics.median(took) / batch
    rows: dict[str, Any] = {}
    part = {
        "size": size, "batch": batch, "machine": about(), "rows": rows,
        "network": "S0's ResNet-18" if small else "torchvision's ResNet-18",
        "resnet18_seconds_per_image": {"forward": cost[False], "forward and backward": cost[True]},
    }  # fmt: skip
    report.setdefault("overhead", {})[str(size)] = part
    for name, case in CASES.items():
        if case.never is None or (args.attacks and name not in args.attacks):
            continue
        attack = ATTACKS[name.split()[0]]
        settings = {"stop": "never", "loss": "margin", **case.never}
        known = {k: v for k, v in settings.items() if k in attack.parameters}
        own, replay, calls = [], [], []
        for _ in range(args.repeats):
            cheap.calls.clear()
            own.append(clocked(lambda a=attack, k=known: a.component(cheap, x, y, **k))[2])
            calls = list(cheap.calls)
            most = max(count for count, _ in calls)
            wide = x.repeat(-(-most // batch), 1, 1, 1)
            replay.append(clocked(lambda w=wide, c=calls: passes(cheap, w, c))[2])
        work = max(0.0, statistics.median(own) - statistics.median(replay))
        bare = sum(count * cost[back] for count, back in calls)
        rows[name] = {
            "own_cpu_seconds": work, "bare_cpu_seconds": bare, "over": work / bare,
            "images_forward": sum(c for c, _ in calls),
            "images_back": sum(c for c, b in calls if b),
        }  # fmt: skip
        print(name, json.dumps(rows[name]), flush=True)
        save(args.out, report)


# --- results --------------------------------------------------------------------------------------


def about() -> dict[str, Any]:
    found = machine()
    for package in PEERS.values():
        try:
            found["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found["versions"][package] = "missing"
    return found


def save(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(report))


def head(where: dict[str, Any]) -> str:
    return (
        f"{where['cpu']}, {where['threads']} threads, torch {where['versions']['torch']}, "
        f"load {where['load_average_before']:.1f}"
    )


def markdown(report: dict[str, Any]) -> str:
    lines = ["# Attacks", ""]
    for key, part in report.get("tables", {}).items():
        lines += [
            f"## {key}", "",
            "Distance: mean over the fooled images, in the attack's norm. Machine of the last "
            f"group: {head(list(part.values())[-1]['machine'])}.", "",
            "| attack | images | who | success | distance | forwards/image | backwards/image "
            "| seconds | CPU seconds |",
            "|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for name, group in part.items():
            start = f"| {name} ({group['norm']}) | {group['images']}"
            for who, row in group["rows"].items():
                if "success" not in row:
                    what = ", ".join(f"{k.replace('_', ' ')}: {v}" for k, v in row.items())
                    lines.append(f"{start} | {who} | {what.replace('|', '/')} | | | | | |")
                    continue
                far = "" if row["distance"] is None else f"{row['distance']:.5g}"
                success = f"{row['success']:.1%}"
                if "success_on_other" in row:
                    success += f" (other model {row['success_on_other']:.1%})"
                lines.append(
                    f"{start} | {who} | {success} | {far} | {row['forwards_per_image']:.1f} "
                    f"| {row['backwards_per_image']:.1f} | {row['seconds']:.2f} "
                    f"| {row['cpu_seconds']:.2f} |"
                )
        lines.append("")
    for part in report.get("overhead", {}).values():
        lines += [
            "## What the attacks cost around the model's passes", "",
            f"`stop=\"never\"`, batch {part['batch']}, {part['size']}×{part['size']} pixels; "
            f"{part['network']} (random weights); target {OVER:.0%}. {head(part['machine'])}.", "",
            "| attack | own CPU seconds | passes, CPU seconds | over | |",
            "|---|---|---|---|---|",
        ]  # fmt: skip
        lines += [
            f"| {name} | {row['own_cpu_seconds']:.3f} | {row['bare_cpu_seconds']:.2f} "
            f"| {row['over']:.1%} | {'met' if row['over'] <= OVER else 'missed'} |"
            for name, row in part["rows"].items()
        ] + [""]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__).splitlines()[0])
    parser.add_argument("--model", default=feint.models.DEFAULT, help="model spec")
    parser.add_argument("--other", help="model spec: is what fools the first fooling this, too?")
    parser.add_argument("--data", default=feint.data.DEFAULT, help="data spec or .npz file")
    parser.add_argument("--attacks", type=lambda s: s.split(","), help=", ".join(CASES))
    parser.add_argument("--only", type=lambda s: s.split(","), help="contestants, such as feint")
    parser.add_argument("--images", type=int, help="at most; by default the attack's own number")
    parser.add_argument("--eps", type=float, default=8, help="linf, in 255ths")
    parser.add_argument("--eps-l2", type=float, default=0.5)
    parser.add_argument("--limit", type=float, default=600, help="CPU seconds per contestant")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="measure anew what is there")
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--size", type=int, default=32, help="--overhead: pixels a side")
    parser.add_argument("--batch", type=int, default=64, help="--overhead: images")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULTS / "attacks.json")
    args = parser.parse_args()
    for name in args.attacks or []:
        if name not in CASES:
            parser.error(f"unknown attack {name!r}; one of {', '.join(CASES)}")
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")  # the peers' own deprecations
    report = json.loads(args.out.read_text()) if args.out.exists() else {}
    (overhead if args.overhead else table)(args, report)
    part = report["overhead"][str(args.size)] if args.overhead else {"rows": {}}
    return 0 if all(row["over"] <= OVER for row in part["rows"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
