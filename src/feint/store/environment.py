"""What a run was computed with: packages, machine, threads, and the commit of a checkout."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import feint

__all__ = ["describe", "git"]

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "pillow", "safetensors", "pyarrow")


def describe(device: str) -> dict[str, Any]:
    """The environment of this process, as plain data."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "device": device,
        "accelerator": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "packages": {"feint": feint.__version__, **{name: _version(name) for name in PACKAGES}},
        "git": git(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    """The processor's name, as well as this system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git() -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout that this package runs from; None if it is none."""
    here = Path(feint.__file__).parent

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here), *words],
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may lie inside of someone else's checkout: then git does not track it.
    if ask("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    changed = ask("status", "--porcelain", "--untracked-files=no", "--", ".")
    return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(changed)}
