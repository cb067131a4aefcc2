"""What made a result: versions, commit, machine; no path of it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import feint

PACKAGES = ("feint", "torch", "torchvision", "numpy", "scipy", "pillow")


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return done.stdout.strip()


def name_of(spec: str) -> str:
    """A spec without the folders of this machine: `zoo.py:resnet50`, `nips2017/images.csv`."""
    if spec.startswith("bf16:"):
        return f"bf16:{name_of(spec.removeprefix('bf16:'))}"
    path, colon, rest = spec.rpartition(":") if ".py:" in spec else (spec, "", "")
    return "/".join(Path(path).parts[-2:]) + colon + rest if os.sep in path else spec


def provenance(**facts: Any) -> dict[str, Any]:
    """Facts of a run beside those of the machine and the code."""
    versions = {"python": platform.python_version(), "feint": feint.__version__}
    for package in PACKAGES[1:]:
        versions[package] = importlib.metadata.version(package)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")
    shown = {k: name_of(v) if isinstance(v, str) else v for k, v in facts.items()}
    return {
        **shown,
        "command": " ".join([Path(sys.argv[0]).name, *map(name_of, sys.argv[1:])]),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "uncommitted_source": bool(_git("status", "--porcelain", "--", "../src/feint")),
        "versions": versions,
        "cpu": cpu or platform.processor(),
        "threads": torch.get_num_threads(),
    }
