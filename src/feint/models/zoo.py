"""Pretrained classifiers of other libraries, from their caches; fetched only if asked."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from feint.core.errors import ConfigError, DataError, UnknownNameError
from feint.models.normalized import Normalized
from feint.models.resized import Resized

__all__ = ["load_robustbench", "load_timm", "load_torchvision"]

_FETCH = "fetch it with download=True (--download)"


def load_torchvision(rest: str, download: bool) -> nn.Module:
    """`NAME[:WEIGHTS]` of torchvision's classifiers, with their own mean, std and crop size.

    Raises:
        UnknownNameError: No such classifier or weights.
        DataError: The weights are not in torch's cache, or damaged.
    """
    name, _, wanted = rest.partition(":")
    from torchvision import models  # loads slowly, and only this function needs it

    names = models.list_models(module=models)
    if name not in names:
        raise UnknownNameError("torchvision model", name, names)
    choices = {w.name: w for w in models.get_model_weights(name)}
    if not wanted:
        wanted = models.get_model_weights(name).DEFAULT.name
    if wanted not in choices:
        raise UnknownNameError(f"weights of {name}", wanted, choices)
    weights = choices[wanted]
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if path.is_file():
        _check_hash(path)
    elif not download:
        raise DataError(
            f"the weights {wanted} of {name} are not at {path}; put them there or {_FETCH}"
        )
    with _explained(f"torchvision:{rest}"):
        net = models.get_model(name, weights=weights, progress=False)
    preset = weights.transforms()
    return Resized(Normalized(net, preset.mean, preset.std), int(preset.crop_size[0])).eval()


def _check_hash(path: Path) -> None:
    """The file's name ends in the first digits of its SHA-256, as torch.hub has it."""
    _, dash, digits = path.stem.rpartition("-")
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if not dash or not actual.startswith(digits):
        raise DataError(f"{path} is damaged (its SHA-256 does not begin with {digits}); delete it")


def load_timm(name: str, download: bool) -> nn.Module:
    """A classifier of timm, with its own mean, std and input size.

    Raises:
        ConfigError: timm is not installed.
        UnknownNameError: No such model.
        DataError: Its weights are not in the cache of the Hugging Face hub.
    """
    timm = _extra("timm", "zoo")
    plain = name.partition(".")[0]
    if not timm.is_model(plain):
        raise UnknownNameError("timm model", plain, timm.list_models())
    with _explained(f"timm:{name}"):
        if download:
            net = timm.create_model(name, pretrained=True)
        else:
            config = timm.get_pretrained_cfg(name)
            repository = getattr(config, "hf_hub_id", None) if config is not None else None
            path = repository and _extra("huggingface_hub", "zoo").try_to_load_from_cache(
                repository, "model.safetensors"
            )
            if not isinstance(path, str):
                raise DataError(f"the weights of timm's {name} are not in the cache; {_FETCH}")
            net = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": path})
    config = net.pretrained_cfg
    size = config["input_size"]
    return Resized(Normalized(net, config["mean"], config["std"]), (size[1], size[2])).eval()


def load_robustbench(rest: str, download: bool, trust: bool) -> nn.Module:
    """`NAME[:DATASET[:THREAT]]` of RobustBench, by default cifar10 and Linf.

    Its weights are pickles, kept under `robustbench` in torch's cache.

    Raises:
        ConfigError: RobustBench is not installed, or its pickles are not trusted.
        DataError: The weights are not in the cache.
    """
    parts = rest.split(":")
    if len(parts) > 3 or not parts[0]:
        raise ConfigError(
            f"model 'robustbench:{rest}'; expected robustbench:NAME[:DATASET[:THREAT]]"
        )
    name, data, threat = parts + ["cifar10", "Linf"][len(parts) - 1 :]
    utils = _extra("robustbench.utils", "robustbench")
    if not trust:
        raise ConfigError(
            f"the weights of robustbench:{rest} are a pickle, which can run code when opened; "
            "say trust=True (--trust) if you trust RobustBench"
        )
    folder = Path(torch.hub.get_dir()) / "robustbench"
    inside = folder / data / threat
    if not download and not list(inside.glob(f"{name}*")):
        raise DataError(f"the weights of robustbench:{rest} are not in {inside}; {_FETCH}")
    with _explained(f"robustbench:{rest}"):
        model: nn.Module = utils.load_model(
            model_name=name, dataset=data, threat_model=threat, model_dir=str(folder)
        )
    return model


def _extra(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(
            f"{module.partition('.')[0]} is not installed; pip install 'feint[{extra}]'"
        ) from None


@contextmanager
def _explained(spec: str) -> Iterator[None]:
    """What another library raises, as a message that names the model."""
    try:
        yield
    except (DataError, ConfigError):
        raise
    except Exception as error:  # network, cache and file errors of three libraries
        brief = str(error).partition("\n")[0]
        raise DataError(f"{spec} could not be loaded ({type(error).__name__}: {brief})") from error
