"""PGD: Feint beside foolbox, torchattacks, ART and the bare passes, in one process.

    python benchmarks/pgd.py --model ../shared/models/zoo.py:cifar_resnet20 --data cifar10.npz

Everyone attacks the same correctly classified images with linf 8/255, 40 steps of 2/255 and a
random start. The floor is what 40 forward and backward passes of the model cost with nothing around
them. Repeats alternate between the contestants, so that a slow moment hits all of them; medians
count. Success is judged here, by one forward pass over what each returned, and so is the distance.

    pip install foolbox==3.3.4 adversarial-robustness-toolbox==1.20.1
    pip install --no-deps torchattacks==3.5.1      (it pins an old requests)

A peer that cannot be imported is named as missing. Exit code 1 if a target is missed or a peer is.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import feint.data
import feint.models
from feint.attacks import pgd
from feint.core.norms import distance

EPS, STEP, STEPS = 8 / 255, 2 / 255, 40
RESULTS = Path(__file__).parent / "results"
PEERS = {
    "foolbox": "foolbox",
    "torchattacks": "torchattacks",
    "art": "adversarial-robustness-toolbox",
}
TARGETS = {
    # name: (numerator, denominator, at most)
    "default pgd at most a quarter of the fastest peer": ("feint", "peer", 0.25),
    "stop='never' not slower than the fastest peer": ("feint never", "peer", 1.0),
    "stop='never' within 10 % of the bare passes": ("feint never", "bare", 1.10),
}
Run = Callable[[Tensor, Tensor], Tensor]


class Counter(nn.Module):
    """Counts the samples that go forward and those that come back."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        """The model's logits."""
        self.forwards += len(x)
        if x.requires_grad:
            x = x.view_as(x)
            x.register_hook(self._back)
        return self.model(x)

    def _back(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


def bare(model: nn.Module) -> Run:
    def run(x: Tensor, y: Tensor) -> Tensor:
        for _ in range(STEPS):
            leaf = x.detach().requires_grad_()
            torch.autograd.grad(nn.functional.cross_entropy(model(leaf), y), leaf)
        return x

    return run


def feint_(model: nn.Module, **kwargs: Any) -> Run:
    return lambda x, y: pgd(model, x, y, eps=EPS, step_size=STEP, steps=STEPS, **kwargs)


def foolbox_(model: nn.Module) -> Run:
    import foolbox as fb

    wrapped = fb.PyTorchModel(model, bounds=(0, 1), device="cpu")
    attack = fb.attacks.LinfPGD(abs_stepsize=STEP, steps=STEPS, random_start=True)
    return lambda x, y: attack(wrapped, x, y, epsilons=EPS)[1]


def torchattacks_(model: nn.Module) -> Run:
    import torchattacks

    return torchattacks.PGD(model, eps=EPS, alpha=STEP, steps=STEPS, random_start=True)


def art_(model: nn.Module) -> Run:
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    with torch.no_grad():
        classes = model(torch.zeros(1, 3, 32, 32)).shape[1]
    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (3, 32, 32), classes, clip_values=(0, 1), device_type="cpu"
    )

    def run(x: Tensor, y: Tensor) -> Tensor:
        attack = ProjectedGradientDescent(
            classifier, norm=np.inf, eps=EPS, eps_step=STEP, max_iter=STEPS,
            num_random_init=1, batch_size=len(x), verbose=False,
        )  # fmt: skip
        return torch.from_numpy(attack.generate(x.numpy(), y.numpy()))

    return run


MAKERS: dict[str, Callable[[nn.Module], Run]] = {
    "bare": bare,
    "feint": feint_,
    "feint never": lambda model: feint_(model, stop="never"),
    "foolbox": foolbox_,
    "torchattacks": torchattacks_,
    "art": art_,
}


def contestants(model: nn.Module) -> tuple[dict[str, Run], dict[str, str]]:
    """What can run, and why the rest cannot."""
    found, missing = {}, {}
    for name, make in MAKERS.items():
        try:
            found[name] = make(model)
        except ImportError as error:
            missing[name] = str(error)
    return found, missing


def correct_images(model: nn.Module, spec: str, count: int) -> tuple[Tensor, Tensor]:
    dataset = feint.data.load(spec)
    xs, ys, have = [], [], 0
    for batch in dataset.batches(256):
        with torch.no_grad():
            right = model(batch.x).argmax(1) == batch.y
        xs.append(batch.x[right])
        ys.append(batch.y[right])
        have += int(right.sum())
        if have >= count:
            break
    x, y = torch.cat(xs)[:count].contiguous(), torch.cat(ys)[:count]
    if len(x) < count:
        raise SystemExit(f"only {len(x)} of {count} images are classified correctly")
    return x, y


def measure(model: nn.Module, x: Tensor, y: Tensor, repeats: int) -> tuple[dict, dict[str, str]]:
    runs, missing = contestants(model)
    rows: dict[str, dict[str, Any]] = {}
    for name in runs:  # counts, judged results, and the warm-up
        counter = Counter(model).eval()
        x_adv = MAKERS[name](counter)(x.clone(), y).detach()
        with torch.no_grad():
            fooled = model(x_adv).argmax(1) != y
        rows[name] = {
            "success": float(fooled.double().mean()),
            "linf_max": float(distance(x_adv, x, "linf").max()),
            "forwards_per_image": counter.forwards / len(x),
            "backwards_per_image": counter.backwards / len(x),
            "seconds": [],
            "cpu_seconds": [],
        }
    names = list(runs)
    for repeat in range(repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            wall, cpu = time.perf_counter(), time.process_time()
            runs[name](x.clone(), y)
            rows[name]["seconds"].append(time.perf_counter() - wall)
            rows[name]["cpu_seconds"].append(time.process_time() - cpu)
    for row in rows.values():
        row["median_seconds"] = statistics.median(row["seconds"])
        row["median_cpu_seconds"] = statistics.median(row["cpu_seconds"])
    return rows, missing


def judge(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    peers = [name for name in PEERS if name in rows]
    verdicts = []
    for target, (above, below, most) in TARGETS.items():
        if below == "peer" and not peers:
            verdicts.append({"target": target, "ratio": None, "at_most": most, "met": False})
            continue
        fastest = min(peers, key=lambda n: rows[n]["median_seconds"]) if peers else ""
        other = fastest if below == "peer" else below
        # The ratio of each repeat, so that both of its parts saw the same machine.
        ratio, cpu_ratio = (
            statistics.median(
                a / b for a, b in zip(rows[above][clock], rows[other][clock], strict=True)
            )
            for clock in ("seconds", "cpu_seconds")
        )
        same = below == "bare" or rows[above]["success"] >= rows[other]["success"]
        verdicts.append(
            {
                "target": target,
                "against": other,
                "ratio": ratio,
                "cpu_ratio": cpu_ratio,
                "at_most": most,
                "same_success": same,
                "met": ratio <= most and same,
            }
        )
    return verdicts


def machine() -> dict[str, Any]:
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    versions = {"python": platform.python_version()}
    for package in ("torch", "numpy", *PEERS.values()):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "missing"
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_before": os.getloadavg()[0],
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions,
    }


def markdown(report: dict[str, Any]) -> str:
    lines = [
        f"# PGD, {report['images']} images, linf 8/255, {STEPS} steps of 2/255",
        "",
        f"`{report['model']}`; {report['machine']['cpu']}, {report['machine']['threads']} threads, "
        f"torch {report['machine']['versions']['torch']}; medians of {report['repeats']} "
        "alternating repeats.",
        "",
        "| | success | seconds | CPU seconds | / bare | forwards/image | backwards/image |",
        "|---|---|---|---|---|---|---|",
    ]
    base = report["rows"]["bare"]["median_seconds"]
    for name, row in report["rows"].items():
        success = "" if name == "bare" else f"{row['success']:.1%}"
        lines.append(
            f"| {name} | {success} | {row['median_seconds']:.2f} | {row['median_cpu_seconds']:.2f} "
            f"| {row['median_seconds'] / base:.2f} | {row['forwards_per_image']:.2f} "
            f"| {row['backwards_per_image']:.2f} |"
        )
    lines += [f"| {name} | missing: {why} | | | | | |" for name, why in report["missing"].items()]
    lines += ["", "| target | at most | measured | |", "|---|---|---|---|"]
    for v in report["targets"]:
        got = "not measured" if v["ratio"] is None else f"{v['ratio']:.3f} ({v['against']})"
        verdict = "met" if v["met"] else "missed"
        lines.append(f"| {v['target']} | {v['at_most']} | {got} | {verdict} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=feint.models.DEFAULT, help="model spec")
    parser.add_argument("--data", default=feint.data.DEFAULT, help="data spec or .npz file")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--note", default="", help="kept in the report")
    parser.add_argument("--out", type=Path, default=RESULTS / "pgd.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")  # the peers' own deprecations
    about = machine()
    model = feint.models.load(args.model).eval()
    x, y = correct_images(model, args.data, args.images)
    rows, missing = measure(model, x, y, args.repeats)
    report = {
        "model": args.model,
        "data": Path(args.data).name,
        "images": args.images,
        "repeats": args.repeats,
        "note": args.note,
        "machine": about,
        "rows": rows,
        "missing": missing,
        "targets": judge(rows),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    text = markdown(report)
    args.out.with_suffix(".md").write_text(text)
    print(text)
    return 0 if not missing and all(v["met"] for v in report["targets"]) else 1


if __name__ == "__main__":
    sys.exit(main())
