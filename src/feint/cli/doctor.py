"""`feint doctor`: is this installation able to work, and how fast."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import time
from importlib import metadata

import torch
import typer
from rich.markup import escape

import feint
from feint import data, models
from feint.cli import common
from feint.core import random
from feint.core.gradients import call

__all__ = ["doctor"]

_REQUIRED = (
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "pillow",
    "torchmetrics",
    "pydantic",
    "PyYAML",
    "typer",
    "rich",
    "pyarrow",
    "safetensors",
    "jinja2",
    "matplotlib",
)
_EXTRAS = {
    "zoo": "timm",
    "robustbench": "robustbench",
    "train": "lightning_fabric",
    "cluster": "ray",
    "explore": "gradio",
    "diffusion": "diffusers",
}
_KNOWN_WORDS = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def doctor(as_json: common.Json = False) -> None:
    """Check the installation: packages, devices, random numbers, bundled data and models."""
    with common.guard():
        checks = [_packages(), _generator(), *_bundled(), _speed()]
        facts = {
            "feint": feint.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "devices": ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))],
            "extras": {name: _installed(module) for name, module in _EXTRAS.items()},
        }
        sound = all(c["ok"] for c in checks)
        if as_json:
            common.print_json({"ok": sound, "facts": facts, "checks": checks})
        else:
            for key, value in facts.items():
                shown = value
                if isinstance(value, dict):
                    shown = ", ".join(k for k, v in value.items() if v) or "none"
                elif isinstance(value, list):
                    shown = ", ".join(value)
                common.out.print(f"{key:>9}  {escape(str(shown))}")
            for check in checks:
                mark = "[green]ok[/]" if check["ok"] else "[red]bad[/]"
                common.out.print(f"{mark:>9}  {escape(str(check['text']))}")
        if not sound:
            raise typer.Exit(common.FAILED)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return module in sys.modules


def _packages() -> dict[str, object]:
    missing, found = [], []
    for name in _REQUIRED:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    text = "missing: " + ", ".join(missing) if missing else f"{len(found)} required packages"
    return {"name": "packages", "ok": not missing, "text": text}


def _generator() -> dict[str, object]:
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    words = [
        random.words(torch.zeros((), dtype=torch.int64, device=d), 4).tolist() for d in devices
    ]
    again = [random.uniform(random.keys(1, torch.arange(3, device=d)), (5,)).cpu() for d in devices]
    same = all(
        torch.equal(a, again[0]) and w == words[0] for a, w in zip(again, words, strict=True)
    )
    return {
        "name": "random",
        "ok": same,
        "text": f"random words are the same on {', '.join(devices)}"
        if same
        else f"random words differ between {', '.join(devices)}",
    }


def _bundled() -> list[dict[str, object]]:
    checks: list[dict[str, object]] = []
    sample = data.load("bundled:cifar10", samples=100)
    batch = next(sample.batches(100))
    for name in models.bundled():
        model = models.load(f"bundled:{name}")
        with torch.no_grad():
            hits = float((call(model, batch.x).argmax(1) == batch.y).double().mean())
        claimed = float(models.card(name)["accuracy"]["clean"]["value"])
        ok = abs(hits - claimed) < 0.12
        text = f"bundled:{name} is right on {hits:.0%} of 100 images (its card says {claimed:.1%})"
        checks.append({"name": name, "ok": ok, "text": text})
    return checks


def _speed() -> dict[str, object]:
    model = models.build("resnet20").eval()
    x = torch.rand(64, 3, 32, 32)
    leaf = x.requires_grad_()
    times = []
    for _ in range(4):
        begun = time.perf_counter()
        torch.autograd.grad(model(leaf).sum(), leaf)
        times.append(time.perf_counter() - begun)
    rate = 64 / min(times)
    text = f"ResNet-20: {rate:.0f} forward and backward passes per second at batch 64"
    return {"name": "speed", "ok": True, "text": text}
