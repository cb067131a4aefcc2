"""Load a classifier by its spec."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from feint.core.errors import ConfigError, DeviceError, UnknownNameError
from feint.core.trained import trained_path
from feint.defenses import Defense, parse
from feint.models.bfloat16 import Bfloat16
from feint.models.bundle import bundled, bundled_path, read_card
from feint.models.checkpoint import PICKLES, load_checkpoint, load_pickle
from feint.models.facts import declared_size, describe, fingerprint
from feint.models.fronted import Fronted
from feint.models.resized import Resized
from feint.models.userfile import load_function
from feint.models.zoo import load_robustbench, load_timm, load_torchvision

__all__ = ["DEFAULT", "Loaded", "load", "resolve"]

DEFAULT = "bundled:cifar10-resnet20"
_SCHEMES = ("bundled", "trained", "torchvision", "timm", "robustbench", "bf16")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A classifier with what was found out while it was loaded."""

    model: nn.Module
    spec: str
    notes: tuple[str, ...] = ()
    """What a report must state: resizing, a switch to eval mode, how a pickle was read."""
    card: Mapping[str, Any] = field(default_factory=dict)
    """The card of bundled weights; empty for others."""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of structure and weights."""
        return fingerprint(self.model)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """`feint.models.describe` of the model."""
        return describe(self.model)


def load(
    spec: str = DEFAULT,
    *,
    arch: str | None = None,
    trust: bool = False,
    device: torch.device | str = "cpu",
    input_size: int | None = None,
    download: bool = False,
    channels_last: bool = False,
    compile: bool = False,
) -> nn.Module:
    """Load a classifier by its spec: an `nn.Module` in eval mode, images in [0, 1] in, logits out.

    ==============================  ===============================================================
    `bundled:NAME`                  weights in the package; `feint.models.bundled()` lists them
    `trained:NAME`                  weights that `feint train NAME` left in the cache
    `torchvision:NAME[:WEIGHTS]`    from torch's cache, with the weights' own mean, std and size
    `timm:NAME`                     needs the extra `zoo`
    `robustbench:NAME[:DATA[:TM]]`  needs the extra `robustbench`, and `trust`
    `PATH/FILE.py:FUNCTION`         runs your file and calls the function without arguments
    `PATH/NAME.safetensors`         with `arch`, unless the file's metadata names it
    `PATH/NAME.pt` and the like     pickle or TorchScript: needs `trust`
    `bf16:SPEC`                     any of these, computing in bfloat16, see `Bfloat16`
    `DEFENSE | MODEL`               any of these with a defense as part of it, see `Fronted`
    ==============================  ===============================================================

    Convention:
        A model with an input size of its own (bundled, torchvision, timm, or an attribute
        `input_size`) is wrapped in `Resized`, which passes images of that size unchanged and brings
        others to it inside the model. A model that declares none gets the images as they are
        (fully convolutional networks take any size); `input_size` gives it one.

    Args:
        spec: See the table.
        arch: `"resnet20"` or `"resnet20(ace=100, classes=10)"`, for weights in a file.
        trust: Open pickles and TorchScript, which can run code.
        device: Where the model goes.
        input_size: Side in pixels to which the model resizes its input; wins over its own.
        download: Fetch weights that are not in a cache. Nothing is ever fetched otherwise.
        channels_last: Keep the weights with channels innermost. Convolutions then run faster on
            most processors, above all in bfloat16, and differ in their last bits
            (`benchmarks/precision.py`).
        compile: Run through `torch.compile`, with shapes that may change: takes a minute or more
            once, so it is for long runs.

    Raises:
        UnknownNameError: No such kind of model, name or function; the nearest one is named.
        ConfigError: An option that cannot mean anything, an extra that is not installed, a pickle
            without trust, weights for another architecture.
        DataError: A file that is missing or damaged.
        ModelError: A user's function that raises or gives no module; weights that are not finite.
        DeviceError: No such device here.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> code = "from torch.nn import Flatten as tiny"
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "mine.py").write_text(code)
        ...     load(f"{folder}/mine.py:tiny")
        Flatten(start_dim=1, end_dim=-1)
    """
    return resolve(
        spec,
        arch=arch,
        trust=trust,
        device=device,
        input_size=input_size,
        download=download,
        channels_last=channels_last,
        compile=compile,
    ).model


def resolve(
    spec: str = DEFAULT,
    *,
    arch: str | None = None,
    trust: bool = False,
    device: torch.device | str = "cpu",
    input_size: int | None = None,
    download: bool = False,
    channels_last: bool = False,
    compile: bool = False,
) -> Loaded:
    """`load`, with notes, card and fingerprint beside the model; arguments and errors as there."""
    where = _device(device)
    front, bar, rest = spec.rpartition("|")
    with torch.random.fork_rng(devices=[]):  # building a network draws weights, then overwritten
        model, card, notes = _open(rest.strip(), arch, trust, download)
        if bar:
            model, note = _fronted(parse(front), model)
            notes.append(note)
    if model.training:
        notes.append("came in training mode, switched to eval mode")
    model.eval()
    size = (input_size, input_size) if input_size is not None else declared_size(model)
    if size is not None and not (isinstance(model, Resized) and model.size == size):
        inner = model.net if isinstance(model, Resized) else model
        model = Resized(inner, size).eval()
    if size is not None:
        notes.append(f"images of another size are resized to {size[0]}×{size[1]} inside the model")
    for note in notes:
        logger.info("%s: %s", spec, note)
    model = model.to(where)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        notes.append("weights with channels innermost")
    if compile:
        model.compile(dynamic=True)
        notes.append("compiled")
    return Loaded(model, spec, tuple(notes), card)


def _open(
    spec: str, arch: str | None, trust: bool, download: bool
) -> tuple[nn.Module, Mapping[str, Any], list[str]]:
    scheme, colon, rest = spec.partition(":")
    if colon and scheme == "bf16":
        model, card, notes = _open(rest, arch, trust, download)
        return Bfloat16.within(model), card, [*notes, "computes in bfloat16"]
    suffix = Path(spec).suffix.lower()
    if suffix in PICKLES:
        model, how = load_pickle(Path(spec), arch, trust)
        return model, {}, [f"read as {how}"]
    if suffix == ".safetensors":
        return load_checkpoint(Path(spec), arch), {}, []
    if arch is not None:
        raise ConfigError(f"arch is for weights in a file; {spec!r} brings its own architecture")
    if ".py:" in spec or suffix == ".py":
        return load_function(spec), {}, []
    if colon and scheme in ("bundled", "trained"):
        path = bundled_path(rest) if scheme == "bundled" else trained_path(rest)
        card = read_card(path)
        return load_checkpoint(path, None), card, []
    if colon and scheme == "torchvision":
        return load_torchvision(rest, download), {}, []
    if colon and scheme == "timm":
        return load_timm(rest, download), {}, []
    if colon and scheme == "robustbench":
        return load_robustbench(rest, download, trust), {}, []
    if colon:
        raise UnknownNameError("kind of model", scheme, _SCHEMES)
    known = [f"bundled:{name}" for name in bundled()]
    known += [
        "trained:NAME",
        "torchvision:NAME",
        "timm:NAME",
        "path/file.py:function",
        "NAME.safetensors",
    ]
    raise UnknownNameError("model", spec, known)


def _fronted(front: Defense, net: nn.Module) -> tuple[nn.Module, str]:
    size = declared_size(net)
    inner = net.net if isinstance(net, Resized) else net
    model = Fronted(front.eval(), inner.eval())
    return model if size is None else Resized(model, size), f"{front} is part of the model"


def _device(device: torch.device | str) -> torch.device:
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        brief = str(error).partition("\n")[0]
        raise DeviceError(
            f"device {device!s} cannot be used ({brief}); expected cpu or cuda"
        ) from None
    return where
