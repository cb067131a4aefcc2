"""A classifier as a file: weights (safetensors) and a card (JSON) that says what they are."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from feint.core.errors import ConfigError, DataError, UnknownNameError

__all__ = ["WEIGHTS", "bundled", "bundled_path", "card", "read_card", "save_bundle", "save_weights"]

WEIGHTS = Path(__file__).parent / "weights"


def bundled() -> list[str]:
    """Names of the classifiers in the package."""
    return sorted(p.stem for p in WEIGHTS.glob("*.safetensors"))


def bundled_path(name: str) -> Path:
    """The weights of a bundled classifier.

    Raises:
        UnknownNameError: No such classifier in the package.
    """
    if name not in bundled():
        raise UnknownNameError("bundled model", name, bundled())
    return WEIGHTS / f"{name}.safetensors"


def card(name: str) -> dict[str, Any]:
    """The card of a bundled classifier: architecture, recipe, data, seed, measured accuracy.

    Raises:
        UnknownNameError: No such classifier in the package.
        DataError: Its card is missing or damaged.
    """
    return read_card(bundled_path(name))


def read_card(path: Path) -> dict[str, Any]:
    """The card beside a safetensors file.

    Raises:
        DataError: It is missing, damaged, or belongs to other weights.
    """
    beside = path.with_suffix(".json")
    try:
        found = json.loads(beside.read_text(encoding="utf-8"))
        recorded = found["sha256"]
        actual = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{beside} is no model card ({error!r}); train or install anew") from None
    if actual != recorded:
        raise DataError(
            f"{path} is not the file that {beside.name} describes (its SHA-256 differs); "
            "train or install anew"
        )
    return dict(found)


def save_bundle(model: nn.Module, path: str | Path, card: Mapping[str, Any]) -> dict[str, Any]:
    """Write a model's weights and their card, each file whole or not at all.

    Args:
        model: Made by `feint.models.build`.
        path: `NAME.safetensors`; the card goes beside it as `NAME.json`.
        card: What the weights are; `architecture`, `ace` and `classes` (the arguments of `build`)
            and `input_size` (height, width) are repeated in the weights file, for loading.

    Returns:
        The card as written, with `parameters` and `sha256` (of the weights file) added.

    Raises:
        ConfigError: The name does not end in .safetensors, or the card lacks its architecture.
        DataError: A file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path} does not end in .safetensors")
    if "architecture" not in card:
        raise ConfigError("the card names no architecture; expected a name of ARCHITECTURES")
    told = ("architecture", "ace", "classes", "input_size")
    # One entry: safetensors writes several in an order that changes from process to process.
    meta = {"feint": json.dumps({key: card[key] for key in told if key in card})}
    parameters = sum(p.numel() for p in model.parameters())
    return save_weights(path, model.state_dict(), meta, {**card, "parameters": parameters})


def save_weights(
    path: Path, state: Mapping[str, Tensor], meta: dict[str, str], card: Mapping[str, Any]
) -> dict[str, Any]:
    """Write tensors with their metadata, and a card beside them, each file whole or not at all.

    Returns:
        The card as written, with `format` and `sha256` (of the weights file) added.

    Raises:
        DataError: A file cannot be written.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    raw = safetensors.torch.save(tensors, meta)
    written = {"format": 1, **card, "sha256": hashlib.sha256(raw).hexdigest()}
    text = json.dumps(written, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    _write(path, raw)
    _write(path.with_suffix(".json"), text.encode())
    return written


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from None
    finally:
        if partial.exists():
            partial.unlink()
