"""What defenses with weights of their own share: where weights come from, and how they are used.

A learned defense has one `network` (any module) whose shape is decided by a few keywords, its
`structure`. A weights file is a safetensors file with the network's tensors; its metadata names the
network's `family` and its structure, so that `s2snet(weights='mine.safetensors')` needs nothing
else, and files are exchanged between defenses of one family. To add one:

    class Mine(Learned):
        family, bundled = "mine", "cifar10-mine"

        def __init__(self, *, weights: str | None = None, width: int | None = None) -> None:
            super().__init__()
            self.open(weights, {"width": width}, {"width": 64}, lambda width: Net(width))

        def transform(self, x, params): ...      # as deployed
        def learn(self, x, params): ...          # what training compares; by default `transform`

`feint.training` trains it by a recipe with `kind: defense`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from feint.core.errors import ConfigError, DataError, ShapeError, UnknownNameError
from feint.core.spec import format_value
from feint.core.trained import trained_path
from feint.core.weights import fill, initialise, read_safetensors
from feint.defenses.base import Defense, Params

__all__ = ["FOLDER", "UNTRAINED", "Learned", "bundled_weights", "weights_path"]

FOLDER = Path(__file__).parent / "weights"
UNTRAINED = "untrained"
"""The name that stands for fresh weights, which mean nothing until they are trained."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, which the papers' code uses for every data set."""

L = TypeVar("L", bound="Learned")


def bundled_weights() -> list[str]:
    """Names of the defense weights in the package."""
    return sorted(p.stem for p in FOLDER.glob("*.safetensors"))


def weights_path(weights: str) -> Path:
    """The file of bundled weights by name, of `trained:NAME` in the cache, or a file by its path.

    Raises:
        UnknownNameError: No such name in the package.
        DataError: No such weights in the cache; the message says how to make them.
        ConfigError: Several of that name in the cache.
    """
    if weights.startswith("trained:"):
        return trained_path(weights.partition(":")[2])
    if weights.endswith(".safetensors"):
        return Path(weights)
    if weights not in bundled_weights():
        raise UnknownNameError("defense weights", weights, [*bundled_weights(), UNTRAINED])
    return FOLDER / f"{weights}.safetensors"


class Learned(Defense):
    """Base of the defenses with weights; see the module's docstring.

    Convention:
        Images in [0, 1] in, images of the same shape out, not clipped: a decoder's last layer is
        linear, and a network on them is fed what it gives. `train()` leaves the network in eval
        mode, so that deployed it never moves its batch statistics; training switches its parts.
    """

    bounded: ClassVar[bool] = False
    family: ClassVar[str]
    """Which network the weights belong to; files of one family are exchangeable."""
    bundled: ClassVar[str]
    """The weights in the package that are used unless others are named."""

    network: nn.Module
    structure: dict[str, Any]
    """The keywords that decide the network's shape, with the values in force."""
    mean: Tensor
    std: Tensor

    def open(
        self,
        weights: str | None,
        asked: Mapping[str, Any],
        usual: Mapping[str, Any],
        make: Callable[..., nn.Module],
    ) -> None:
        """Set `network` and `structure` from a weights file, or fresh; arguments as of `opened`."""
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        self.network, self.structure = self.opened(weights, asked, usual, make)

    def opened(
        self,
        weights: str | None,
        asked: Mapping[str, Any],
        usual: Mapping[str, Any],
        make: Callable[..., nn.Module],
        seed: int = 0,
    ) -> tuple[nn.Module, dict[str, Any]]:
        """A network with its structure, from a weights file or fresh.

        Args:
            weights: A bundled name, `"trained:NAME"`, a `.safetensors` file, `"untrained"`, or None
                for the default.
            asked: The structure's keywords as given; None where the caller leaves them open.
            usual: The structure of an untrained network where nothing is asked, the paper's.
            make: Makes the network of a structure.
            seed: Of fresh weights.

        Raises:
            UnknownNameError: No such weights.
            DataError: A file that is missing or damaged.
            ConfigError: Weights of another family or structure.
        """
        name = self.bundled if weights is None else weights
        given = {key: value for key, value in asked.items() if value is not None}
        if name == UNTRAINED:
            structure = {**usual, **given}
            network = _frozen(_made(make, structure))
            initialise(network, seed)
            return network, structure
        path = weights_path(name)
        state, meta = read_safetensors(path)
        told = read_meta(meta, name)
        if told.get("family") != self.family:
            found = told.get("family")
            raise ConfigError(
                f"weights {name!r} are those of "
                + (f"a network of the family {found!r}" if found else "no defense")
                + f"; expected the family {self.family!r}"
            )
        own = {k: _tuples(v) for k, v in told.get("structure", {}).items()}
        if not own or not own.keys() <= asked.keys() | usual.keys():
            raise DataError(
                f"the metadata of weights {name!r} cannot be read: the structure has "
                f"{sorted(own)}; expected {sorted(usual)}"
            )
        for key, value in given.items():
            if own.get(key) != _tuples(value):
                raise ConfigError(
                    f"{key} is {format_value(value)}, but weights {name!r} were made with "
                    f"{key}={format_value(own.get(key))}; leave it out, or say "
                    f"weights={UNTRAINED!r} to train such a network"
                )
        structure = {**usual, **own}
        network = _frozen(_made(make, structure))
        return fill(network, state, name, f"the {self.family} {structure}"), structure

    def train(self: L, mode: bool = True) -> L:
        """Set the mode of the defense; its networks stay in eval mode."""
        super().train(mode)
        if "network" in self._modules:
            for part in self.children():
                part.eval()
        return self

    def learn(self, x: Tensor, params: Params) -> Tensor:
        """What training compares with a target: by default the deployed output."""
        return self.transform(x, params)

    def metadata(self, **extra: object) -> dict[str, str]:
        """The metadata of a weights file of this network."""
        told = {"family": self.family, "structure": self.structure, **extra}
        return {"feint": json.dumps(told)}

    def on_normalized(self, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`network` applied in ImageNet's normalised space, and brought back to images."""
        result: Tensor = network((x - self.mean) / self.std) * self.std + self.mean
        return result

    def check_shape(self, x: Tensor, least: int) -> None:
        """Require three channels and sides of at least `least` pixels.

        Raises:
            ShapeError: Otherwise.
        """
        if x.shape[1] != 3:
            raise ShapeError(
                f"x has shape {tuple(x.shape)}; expected 3 channels, as the network was made for"
            )
        if min(x.shape[-2:]) < least:
            raise ShapeError(
                f"x has shape {tuple(x.shape)}; expected sides of at least {least} pixels, the "
                "stride of the network"
            )


def read_meta(meta: Mapping[str, str], name: str) -> dict[str, Any]:
    """What a weights file says of itself.

    Raises:
        DataError: It cannot be read.
    """
    try:
        told = json.loads(meta.get("feint", "{}"))
        if not isinstance(told, dict) or not isinstance(told.get("structure", {}), dict):
            raise ValueError("no mapping")
    except ValueError as error:
        raise DataError(f"the metadata of weights {name!r} cannot be read: {error}") from None
    return told


def _made(make: Callable[..., nn.Module], structure: Mapping[str, Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # torch's own initialisation leaves no trace
        return make(**structure)


def _frozen(network: nn.Module) -> nn.Module:
    """In eval mode and without gradients of its parameters, which no attack needs."""
    return network.eval().requires_grad_(False)


def _tuples(value: object) -> object:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
