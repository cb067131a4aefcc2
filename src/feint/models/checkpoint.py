"""Weights from a file: safetensors, and pickles only from those one trusts."""

from __future__ import annotations

import ast
import json
import math
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from feint.core.errors import ConfigError, DataError, ModelError, UnknownNameError
from feint.core.weights import fill, read_safetensors
from feint.models.architectures import ARCHITECTURES
from feint.models.build import build
from feint.models.resized import Resized

__all__ = ["PICKLES", "Arch", "fill", "load_checkpoint", "load_pickle", "read_safetensors"]

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".torchscript", ".ts")


@dataclass(frozen=True)
class Arch:
    """The arguments of `feint.models.build`."""

    architecture: str
    ace: float | None = None
    classes: int = 10

    @classmethod
    def parse(cls, text: str) -> Arch:
        """From `resnet20` or `resnet20(ace=100, classes=10)`.

        Raises:
            UnknownNameError: No such architecture or option.
            ConfigError: Not of this form.
        """
        form = f"arch is {text!r}; expected for example 'resnet20' or 'resnet20(ace=100)'"
        try:
            node = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError):
            raise ConfigError(form) from None
        name = node.func if isinstance(node, ast.Call) else node
        if not isinstance(name, ast.Name) or (isinstance(node, ast.Call) and node.args):
            raise ConfigError(form)
        options: dict[str, Any] = {}
        for keyword in node.keywords if isinstance(node, ast.Call) else ():
            if keyword.arg not in ("ace", "classes"):
                raise UnknownNameError("option of arch", str(keyword.arg), ("ace", "classes"))
            value = keyword.value
            if isinstance(value, ast.Name) and value.id == "inf":
                options[keyword.arg] = math.inf
            else:
                try:
                    options[keyword.arg] = ast.literal_eval(value)
                except (ValueError, TypeError):
                    raise ConfigError(form) from None
        return cls.make(name.id, **options)

    @classmethod
    def make(cls, architecture: object, ace: object = None, classes: object = 10) -> Arch:
        """From values that a file or a user gave.

        Raises:
            UnknownNameError: No such architecture.
            ConfigError: A value of another type.
        """
        if architecture not in ARCHITECTURES:
            raise UnknownNameError("architecture", str(architecture), ARCHITECTURES)
        if ace == "inf":
            ace = math.inf
        number = isinstance(ace, int | float) and not isinstance(ace, bool) and ace >= 0
        if not (ace is None or number):
            raise ConfigError(f"ace is {ace!r}; expected λ ≥ 0, inf or none")
        if isinstance(classes, bool) or not isinstance(classes, int) or classes < 2:
            raise ConfigError(f"classes is {classes!r}; expected an integer from 2")
        return cls(str(architecture), None if ace is None else float(ace), classes)  # type: ignore[arg-type]

    def build(self) -> nn.Module:
        """The model, with weights that mean nothing yet."""
        return build(self.architecture, self.ace, self.classes)

    def __str__(self) -> str:
        ace = "" if self.ace is None else f"ace={self.ace:g}, "
        return f"{self.architecture}({ace}classes={self.classes})"


def load_checkpoint(path: Path, arch: str | None) -> nn.Module:
    """A model from a safetensors file whose metadata, or `arch`, names the architecture.

    An input size in the metadata makes it a `Resized` model.

    Raises:
        DataError: The file is missing or damaged.
        ConfigError: No architecture, two different ones, or weights of another one.
    """
    state, meta = read_safetensors(path)
    try:
        known = ("architecture", "ace", "classes", "input_size")
        raw = json.loads(meta.get("feint", "{}"))
        told = {key: raw[key] for key in known if key in raw}
    except (ValueError, TypeError) as error:
        raise DataError(f"the metadata of {path} cannot be read: {error}") from None
    size = told.pop("input_size", None)
    found = Arch.make(**told) if "architecture" in told else None
    wanted = Arch.parse(arch) if arch is not None else found
    if wanted is None:
        raise ConfigError(
            f"{path} does not say its architecture; give arch (--arch), one of "
            f"{', '.join(ARCHITECTURES)}, with ACE as 'resnet20(ace=100)'"
        )
    if found is not None and wanted != found:
        raise ConfigError(f"{path} was made for {found}, but arch is {wanted}; leave arch out")
    model = fill(wanted.build(), state, str(path), str(wanted)).eval()
    return model if size is None else Resized(model, size).eval()


def load_pickle(path: Path, arch: str | None, trust: bool) -> tuple[nn.Module, str]:
    """A model from a pickle or TorchScript file, and a note on how it was read.

    A pickle may run any code when it is opened. Without `trust` it is not opened at all; with it,
    plain tensors are tried first (`torch.load(weights_only=True)`), then everything.

    Raises:
        ConfigError: Not trusted; or weights without `arch`, or of another architecture.
        DataError: The file is missing or damaged.
        ModelError: It holds something else than a module or weights.
    """
    if not trust:
        raise ConfigError(
            f"{path} is a pickle or TorchScript file, which can run code when opened; convert it "
            "to safetensors, or say trust=True (--trust) if you know where it comes from"
        )
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    content, how = _unpickled(path)
    if isinstance(content, nn.Module):
        if arch is not None:
            raise ConfigError(f"{path} holds a whole module; leave arch out")
        return content, how
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content, how = content[key], f"{how}, weights under {key!r}"
            break
    if not isinstance(content, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    ):
        raise ModelError(f"{path} holds a {type(content).__name__}; expected a module or weights")
    if arch is None:
        raise ConfigError(
            f"{path} holds weights; give arch (--arch), one of {', '.join(ARCHITECTURES)}"
        )
    wanted = Arch.parse(arch)
    return fill(wanted.build(), content, str(path), str(wanted)).eval(), how


def _unpickled(path: Path) -> tuple[Any, str]:
    try:
        if _is_torchscript(path):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch deprecates TorchScript; users' files remain
                return torch.jit.load(str(path), map_location="cpu"), "TorchScript, trusted"
        try:
            return torch.load(path, "cpu", weights_only=True), "tensors only, nothing unpickled"
        except pickle.UnpicklingError:
            return torch.load(path, "cpu", weights_only=False), "pickle, trusted"
    except Exception as error:  # an unpickler raises whatever the file makes it raise
        brief = str(error).partition("\n")[0]
        raise DataError(
            f"{path} cannot be opened ({type(error).__name__}: {brief}); "
            "it is damaged, or needs code that is not installed"
        ) from error


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())
