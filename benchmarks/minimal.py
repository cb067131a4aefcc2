"""Minimal-norm and few-pixel attacks: Feint beside foolbox, adv-lib and torchattacks.

    python benchmarks/minimal.py deepfool --model ../shared/models/zoo.py:cifar_resnet20 --data F

Everyone attacks the same correctly classified images. Distances are measured here, over the images
that the attack fooled; success is judged here, too, by one forward pass. All run in one process,
and repeats alternate between the contestants, so that a slow moment hits all of them; medians
count, and CPU seconds stand beside seconds. Each group adds its part to `results/minimal.json`.

    pip install foolbox==3.3.4
    pip install --no-deps adv-lib==0.2.8 torchattacks==3.5.1     (they pin or want what is not used)

A peer that cannot be imported is named as missing. Exit code 1 if a target is missed or a peer is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import feint.attacks
import feint.data
import feint.models
from feint.core.norms import distance
from pgd import RESULTS, Counter, correct_images, machine

PEERS = {"foolbox": "foolbox", "torchattacks": "torchattacks", "adv_lib": "adv-lib"}
INF = float("inf")
Run = Callable[[Tensor, Tensor], Tensor]


def ours(name: str, **kwargs: Any) -> Callable[[nn.Module], Run]:
    attack = getattr(feint.attacks, name)
    return lambda model: lambda x, y: attack(model, x, y, **kwargs)


def foolbox_(name: str, **kwargs: Any) -> Callable[[nn.Module], Run]:
    def make(model: nn.Module) -> Run:
        import foolbox as fb

        wrapped = fb.PyTorchModel(model, bounds=(0, 1), device="cpu")
        attack = getattr(fb.attacks, name)(**kwargs)
        return lambda x, y: attack(wrapped, x, fb.criteria.Misclassification(y), epsilons=None)[1]

    return make


def torchattacks_(name: str, **kwargs: Any) -> Callable[[nn.Module], Run]:
    def make(model: nn.Module) -> Run:
        import torchattacks

        attack = getattr(torchattacks, name)(model, **kwargs)

        def run(x: Tensor, y: Tensor) -> Tensor:
            np.random.seed(0)  # noqa: NPY002  what its one-pixel attack draws from
            return attack(x, y)

        return run

    return make


def next_class(model: nn.Module) -> Run:
    """JSMA as torchattacks understands "untargeted": towards the next class."""
    return lambda x, y: feint.attacks.jsma(model, x, (y + 1) % 10, targeted=True, gamma=0.1)


def one_pixel(**kwargs: Any) -> Callable[[nn.Module], Run]:
    """As torchattacks does it: best1bin with dither, a uniform start, colors of any value."""
    return ours(
        "one_pixel", strategy="best1bin", scale=(0.5, 1.0), start="uniform", levels=None,
        popsize=40, generations=10, **kwargs,
    )  # fmt: skip


def bare_forwards(model: nn.Module) -> Run:
    """What one_pixel's forward passes cost with nothing around them."""

    def run(x: Tensor, y: Tensor) -> Tensor:
        wide = x.repeat_interleave(40, 0)
        with torch.no_grad():
            model(x)
            for _ in range(11):
                for part in wide.split(64):
                    model(part)
        return x

    return run


def adv_lib_(name: str, **kwargs: Any) -> Callable[[nn.Module], Run]:
    def make(model: nn.Module) -> Run:
        visdom = types.ModuleType("visdom")  # imported by adv-lib, used by nothing here
        visdom.Visdom = object
        sys.modules.setdefault("visdom", visdom)
        import adv_lib.attacks

        return lambda x, y: getattr(adv_lib.attacks, name)(model, x, y, **kwargs)

    return make


CW = {"steps": 1000, "initial_const": 1e-3}
EAD = {"steps": 200, "initial_const": 1e-2}


@dataclass(frozen=True)
class Group:
    """What is compared, in which norm, on how many images, how often (0: time the counted run)."""

    norm: str
    images: int
    repeats: int
    who: dict[str, Callable[[nn.Module], Run]]


GROUPS: dict[str, Group] = {
    "deepfool": Group("l2", 128, 3, {
        "feint": ours("deepfool"),
        "feint, 4 classes": ours("deepfool", classes=4),
        "feint, original": ours("deepfool", preset="original"),
        "adv_lib": adv_lib_("df", steps=50),
        "foolbox": foolbox_("L2DeepFoolAttack", steps=50, candidates=10),
    }),
    "deepfool_linf": Group("linf", 128, 3, {
        "feint": ours("deepfool", norm="linf"),
        "adv_lib": adv_lib_("df", steps=50, norm=INF),
        "foolbox": foolbox_("LinfDeepFoolAttack", steps=50, candidates=10),
    }),
    "carlini_wagner": Group("l2", 32, 0, {
        "feint": ours("carlini_wagner", **CW),
        "foolbox": foolbox_(
            "L2CarliniWagnerAttack", binary_search_steps=9, stepsize=0.01, confidence=0, **CW
        ),
    }),
    "carlini_wagner_one_c": Group("l2", 32, 3, {
        "feint": ours("carlini_wagner", search_steps=1, steps=1000, initial_const=1.0),
        "torchattacks": torchattacks_("CW", c=1, kappa=0, steps=1000, lr=0.01),
    }),
    "ddn": Group("l2", 64, 3, {
        "feint": ours("ddn", steps=100),
        "adv_lib": adv_lib_("ddn", steps=100, levels=None),
        "foolbox": foolbox_("DDNAttack", steps=100),
    }),
    "fmn_l2": Group("l2", 64, 3, {
        "feint": ours("fmn", steps=100),
        "adv_lib": adv_lib_("fmn", steps=100, norm=2),
        "foolbox": foolbox_("L2FMNAttack", steps=100),
    }),
    "fmn_linf": Group("linf", 64, 3, {
        "feint": ours("fmn", steps=100, norm="linf"),
        "adv_lib": adv_lib_("fmn", steps=100, norm=INF),
        "foolbox": foolbox_("LInfFMNAttack", steps=100),
    }),
    "fmn_l1": Group("l1", 64, 3, {
        "feint": ours("fmn", steps=100, norm="l1"),
        "adv_lib": adv_lib_("fmn", steps=100, norm=1),
        "foolbox": foolbox_("L1FMNAttack", steps=100),
    }),
    "fmn_l0": Group("l0", 64, 3, {
        "feint": ours("fmn", steps=100, norm="l0"),
        "adv_lib": adv_lib_("fmn", steps=100, norm=0),
    }),
    "ead": Group("l1", 16, 0, {
        "feint": ours("ead", search_steps=4, **EAD),
        "foolbox": foolbox_(
            "EADAttack", binary_search_steps=4, regularization=0.01, decision_rule="L1", **EAD
        ),
    }),
    "lbfgs": Group("l2", 32, 0, {"feint": ours("lbfgs")}),
    "jsma": Group("l0", 32, 0, {
        "feint": next_class,
        "torchattacks": torchattacks_("JSMA", theta=1.0, gamma=0.1),
    }),
    "one_pixel": Group("l0", 32, 3, {
        "bare": bare_forwards,
        "feint": one_pixel(),
        "feint never": one_pixel(stop="never"),
        "torchattacks": torchattacks_("OnePixel", pixels=1, steps=10, popsize=40),
    }),
}  # fmt: skip
TARGETS = {
    # group: [(contestant, against, at most in time, at most in distance)]; None: not a target
    "deepfool": [("feint", "adv_lib", 0.7, 1.0), ("feint, 4 classes", "adv_lib", 0.4, None)],
    "carlini_wagner": [("feint", "foolbox", 0.5, 1.0)],
    "carlini_wagner_one_c": [("feint", "torchattacks", 1.0, 1.0)],
    "jsma": [("feint", "torchattacks", 0.05, 1.0)],
    "one_pixel": [("feint", "torchattacks", 0.8, None), ("feint never", "bare", 1.1, None)],
}


def measure(group: str, model: nn.Module, x: Tensor, y: Tensor, repeats: int) -> dict[str, Any]:
    norm, makers = GROUPS[group].norm, GROUPS[group].who
    rows: dict[str, dict[str, Any]] = {}
    runs, missing = {}, {}
    for name, make in makers.items():  # counts and judged results
        counter = Counter(model).eval()
        try:
            runs[name] = make(model)
            counted = make(counter)
        except ImportError as error:
            missing[name] = str(error)
            continue
        wall, cpu = time.perf_counter(), time.process_time()
        x_adv = counted(x.clone(), y).detach()
        clocks = time.perf_counter() - wall, time.process_time() - cpu
        with torch.no_grad():
            fooled = model(x_adv).argmax(1) != y
        rows[name] = {
            "success": float(fooled.double().mean()),
            "distance": float(distance(x_adv, x, norm)[fooled].mean()) if fooled.any() else 0.0,
            "distances": [round(v, 6) for v in distance(x_adv, x, norm).tolist()],
            "forwards_per_image": counter.forwards / len(x),
            "backwards_per_image": counter.backwards / len(x),
            "seconds": [clocks[0]] if repeats == 0 else [],
            "cpu_seconds": [clocks[1]] if repeats == 0 else [],
        }
        print(group, name, {k: v for k, v in rows[name].items() if k != "distances"}, flush=True)
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
    return {
        "norm": norm,
        "images": len(x),
        "repeats": repeats,
        "rows": rows,
        "missing": missing,
        "targets": judge(group, rows, len(x)),
    }


def judge(group: str, rows: dict[str, dict[str, Any]], count: int) -> list[dict[str, Any]]:
    verdicts = []
    for name, against, slower, farther in TARGETS.get(group, []):
        verdict: dict[str, Any] = {"target": f"{name} against {against}", "at_most": slower}
        if against in rows:
            a, b = rows[name], rows[against]
            verdict["ratio"] = a["median_seconds"] / b["median_seconds"]
            verdict["cpu_ratio"] = a["median_cpu_seconds"] / b["median_cpu_seconds"]
            if b["distance"] > 0:
                verdict["distance_ratio"] = a["distance"] / b["distance"]
            near = farther is None or verdict["distance_ratio"] <= farther + 1e-3
            share = b["success"]  # whoever draws candidates at random has an interval
            slack = 1.96 * (share * (1 - share) / count) ** 0.5 if group == "one_pixel" else 0.0
            same = against == "bare" or a["success"] >= share - slack
            verdict["met"] = verdict["ratio"] <= slower and near and same
        else:
            verdict |= {"ratio": None, "met": False}
        verdicts.append(verdict)
    return verdicts


def markdown(report: dict[str, Any]) -> str:
    lines = ["# Minimal-norm attacks", ""]
    for group, part in report.items():
        about = part["machine"]
        lines += [
            f"## {group}: {part['images']} images, {part['norm']}",
            "",
            f"`{part['model']}`; {about['cpu']}, {about['threads']} threads, "
            f"torch {about['versions']['torch']}, load {about['load_average_before']:.1f}. "
            + part["note"],
            "",
            "| | success | mean distance | seconds | CPU seconds | forwards/image | "
            "backwards/image |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {name} | {row['success']:.1%} | {row['distance']:.5f} "
            f"| {row['median_seconds']:.2f} | {row['median_cpu_seconds']:.2f} "
            f"| {row['forwards_per_image']:.1f} | {row['backwards_per_image']:.1f} |"
            for name, row in part["rows"].items()
        ]
        lines += [f"| {name} | missing: {why} | | | | | |" for name, why in part["missing"].items()]
        if part["targets"]:
            lines += [
                "",
                "| target | at most | time | CPU time | distance | |",
                "|---|" + "---|" * 5,
            ]
        for v in part["targets"]:
            got = [f"{v[k]:.3f}" if v.get(k) else "–" for k in ("ratio", "cpu_ratio")]
            got.append(f"{v['distance_ratio']:.4f}" if "distance_ratio" in v else "–")
            verdict = "met" if v["met"] else "missed"
            lines.append(f"| {v['target']} | {v['at_most']} | {' | '.join(got)} | {verdict} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="+", choices=[*GROUPS, "all"])
    parser.add_argument("--model", default=feint.models.DEFAULT, help="model spec")
    parser.add_argument("--data", default=feint.data.DEFAULT, help="data spec or .npz file")
    parser.add_argument("--images", type=int, default=None, help="by default the group's own")
    parser.add_argument("--repeats", type=int, default=None, help="by default the group's own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--note", default="", help="kept in the report")
    parser.add_argument("--out", type=Path, default=RESULTS / "minimal.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")  # the peers' own deprecations
    model = feint.models.load(args.model).eval()
    report = json.loads(args.out.read_text()) if args.out.exists() else {}
    good = True
    for group in GROUPS if "all" in args.groups else args.groups:
        x, y = correct_images(model, args.data, args.images or GROUPS[group].images)
        about = machine()
        repeats = GROUPS[group].repeats if args.repeats is None else args.repeats
        part = measure(group, model, x, y, repeats)
        part |= {"model": args.model, "data": Path(args.data).name, "note": args.note}
        report[group] = part | {"machine": about}
        good &= not part["missing"] and all(v["met"] for v in part["targets"])
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")
        args.out.with_suffix(".md").write_text(markdown(report))
        print(markdown({group: report[group]}), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
