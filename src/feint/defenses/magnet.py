"""MagNet: a reformer moves images towards those that it learned from; a detector refuses some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.checks import check_images
from feint.core.errors import ConfigError, RangeError, ShapeError
from feint.core.gradients import call
from feint.core.registry import defense
from feint.defenses._autoencoder import Autoencoder, Layers
from feint.defenses._learned import Learned
from feint.defenses.base import Params, backward_rule

__all__ = ["MagNet", "MagNetDetector"]


@defense("magnet", paper="Meng, Chen, 2017, arXiv:1705.09064")
class MagNet(Learned):
    """MagNet's reformer: a small autoencoder, trained on clean images with noise, in front.

    Several weights make the paper's defense by diversity: every image goes through one of the
    autoencoders, drawn at random. The other half of MagNet, which refuses images that look attacked
    to it, is `detector`; a pipeline has the reformer alone.

    Claim: effective against the strongest attacks of its day in the black-box and the gray-box
    setting, without refusing normal images (Meng & Chen, abstract). Known break: attacks with a
    margin on autoencoders of the attacker's own carry over to it with slightly more distortion
    (Carlini & Wagner 2017); a white-box attacker differentiates through the reformer anyway.
    Measured with `cifar10-magnet` on 200 bundled test images, 10 steps of PGD at linf 4/255
    (8/255): clean 81.5 % (without a defense 91.5 %); examples made on the bare ResNet-20, which
    gets 0 % of them right, 55.0 % (41.0 %); white-box 2.0 % (0 %) with `exact`, 7.5 % (0.5 %) with
    `identity`. 95 % intervals reach 7 points to each side at most.

    Backward rules:
        `exact`, the default, is autograd. `identity` passes the gradient straight through.

    Args:
        weights: Name of bundled weights, `trained:NAME`, a `.safetensors` file of `feint train`, or
            `"untrained"`; or a list of them, from which every image draws its own. By default
            `cifar10-magnet`.
        layers: The encoder's layers: a number is a convolution with so many channels, `"max"` or
            `"average"` a pooling; by default as the weights say, `[32]` (the paper's for CIFAR-10:
            convolutions to 32, 32 and 3 channels) if untrained. `[3, 'average', 3]` is MNIST's.
        channels: Of the images; by default as the weights say, 3 if untrained.

    Convention:
        Images in [0, 1] in and out (the last layer is a sigmoid), any size.

    Raises:
        ConfigError: Layers that make no autoencoder, an empty list, weights of another network.
        UnknownNameError, DataError: Weights that are not there, or damaged.
        ShapeError: Images with other channels than the network's.

    Cost: One forward pass of the autoencoder: 11.0 k weights at every pixel, 28 % of a ResNet-20
        at 32×32 and 13 % of a ResNet-50 at 224×224 in multiply–adds.

    Example:
        >>> import torch
        >>> MagNet(weights="untrained", layers=[4])(torch.rand(2, 3, 9, 8)).shape
        torch.Size([2, 3, 9, 8])

    References:
        Meng, Chen, "MagNet: a two-pronged defense against adversarial examples", CCS 2017, §4 and
        §5; original code, `defensive_models.py`, `worker.py`. Carlini, Wagner, "MagNet and
        'Efficient defenses against adversarial attacks' are not robust to adversarial examples",
        2017, arXiv:1711.08478.

    Deviations:
        The original trains for 400 epochs on CIFAR-10, the bundled recipe for fewer. It draws a
        reformer once per run, here every image draws.
    """

    differentiable: ClassVar[bool] = True
    stochastic: ClassVar[bool] = False
    bounded: ClassVar[bool] = True
    family: ClassVar[str] = "magnet"
    bundled: ClassVar[str] = "cifar10-magnet"

    network: Autoencoder

    def __init__(
        self,
        *,
        weights: str | Sequence[str] | None = None,
        layers: Layers | None = None,
        channels: int | None = None,
    ) -> None:
        super().__init__()
        files = list(weights) if isinstance(weights, list | tuple) else [weights]
        if not files:
            raise ConfigError("weights is an empty list; expected at least one")
        asked = {"layers": layers, "channels": channels}
        usual = {"layers": (32,), "channels": 3}
        self.open(files[0], asked, usual, Autoencoder)  # type: ignore[arg-type]
        others = [self.opened(f, asked, usual, Autoencoder, i) for i, f in enumerate(files[1:], 1)]  # type: ignore[arg-type]
        for name, (_, structure) in zip(files[1:], others, strict=True):
            if structure["channels"] != self.structure["channels"]:
                raise ConfigError(
                    f"weights {name!r} are for {structure['channels']} channels, the first ones "
                    f"for {self.structure['channels']}; expected the same"
                )
        self.others = nn.ModuleList(network for network, _ in others)
        self.stochastic = len(files) > 1  # type: ignore[misc]

    def draw(self, keys: Tensor, shape: torch.Size) -> Params:
        """`which`: the autoencoder of each image, int64 (B,)."""
        return {"which": random.integers(keys, 0, 1 + len(self.others))}

    def support(
        self, shape: torch.Size, device: torch.device | str | None = None
    ) -> tuple[Params, ...] | None:
        """Every autoencoder."""
        if not self.stochastic:
            return ({},)
        count = 1 + len(self.others)
        return tuple({"which": torch.full(shape[:1], i, device=device)} for i in range(count))

    def transform(self, x: Tensor, params: Params) -> Tensor:
        """The reconstruction."""
        if x.shape[1] != self.structure["channels"]:
            raise ShapeError(
                f"x has shape {tuple(x.shape)}; expected {self.structure['channels']} channels, "
                "as the network was made for"
            )
        if not self.stochastic:
            return self.network(x)
        if not len(x):
            return x.clone()
        made = torch.zeros_like(x)
        for number, network in enumerate([self.network, *self.others]):
            picked = (params["which"].to(x.device) == number).nonzero().flatten()
            if len(picked):
                made = made.index_copy(0, picked, network(x[picked]).to(made.dtype))
        return made

    @backward_rule("identity")
    def identity(self, x: Tensor, params: Params) -> Tensor:
        """The image itself."""
        return x

    def detector(
        self,
        model: nn.Module,
        x: Tensor,
        *,
        false_positive_rate: float = 0.01,
        errors: Sequence[float] = (1.0,),
        temperatures: Sequence[float] = (10.0, 40.0),
        batch_size: int = 100,
    ) -> MagNetDetector:
        """A detector with its thresholds set from clean validation images.

        Args:
            model: The classifier behind, images in [0, 1] to logits.
            x: Clean images, (B, C, H, W); neither those that the classifier learned from nor those
                that are to be judged.
            false_positive_rate: At most this share of `x` is refused by all tests together; each
                of the D tests gets an equal part of it.
            errors: Powers p of the tests on the reconstruction's error.
            temperatures: Of the tests on the classifier's divergence.
            batch_size: Images at a time; it changes nothing but memory.

        Returns:
            A module, from images to booleans.

        Raises:
            RangeError: A rate outside (0, 1), too few images for it, a power or temperature that is
                not positive.
            ConfigError: No tests at all.

        Cost: A forward pass of the reformer and two of the classifier per image.
        """
        check_images(x)
        found = MagNetDetector(self, model, errors, temperatures)
        tests = len(found.names)
        if not 0 < false_positive_rate < 1:
            raise RangeError(
                f"false_positive_rate is {false_positive_rate}; expected a share between 0 and 1"
            )
        refused = int(len(x) * false_positive_rate / tests + 1e-9)
        if refused < 1:
            raise RangeError(
                f"x has {len(x)} images; expected at least {round(tests / false_positive_rate)}, "
                f"so that each of {tests} tests refuses one at a rate of {false_positive_rate:g} "
                "in all"
            )
        keys = random.keys(0, len(x)).to(x.device)
        with torch.no_grad():
            parts = zip(x.split(batch_size), keys.split(batch_size), strict=True)
            scores = torch.cat([found.scores(part, own) for part, own in parts])
        # Half-way between the last that is refused and the first that is not: no rounding matters.
        found.thresholds.copy_(scores.topk(refused + 1, dim=0).values[-2:].mean(0))
        return found


class MagNetDetector(nn.Module):
    """MagNet's detector: an image is refused if one of its tests says that it looks attacked.

    A reconstruction far from the image is the one sign, mean |x − A(x)|^p; the other is a
    classifier that thinks otherwise about it, by the Jensen–Shannon divergence (in nats) of
    softmax(f(x)/T) and softmax(f(A(x))/T). `MagNet.detector` makes one with thresholds from clean
    images; an attacker who knows it adds `scores`, which can be differentiated, to his loss.

    Args:
        magnet: The reformer.
        model: The classifier behind.
        errors: Powers p of the tests on the reconstruction's error.
        temperatures: T of the tests on the divergence.

    Raises:
        RangeError: A power or temperature that is not positive.
        ConfigError: No tests at all.

    References:
        Meng, Chen, 2017, §4.2 and §5.3.

    Deviations:
        The original gives every test the whole rate, so that all together refuse more clean images
        than it says. With fewer validation images than one over the rate it refuses everything;
        here it is an error.
    """

    thresholds: Tensor

    def __init__(
        self,
        magnet: MagNet,
        model: nn.Module,
        errors: Sequence[float] = (1.0,),
        temperatures: Sequence[float] = (10.0, 40.0),
    ) -> None:
        super().__init__()
        for name, values in (("errors", errors), ("temperatures", temperatures)):
            if not all(0 < value < float("inf") for value in values):
                raise RangeError(f"{name} is {tuple(values)}; expected numbers above 0")
        self.errors, self.temperatures = tuple(errors), tuple(temperatures)
        if not self.names:
            raise ConfigError("errors and temperatures are empty; expected at least one test")
        self.magnet, self.model = magnet, model
        self.register_buffer("thresholds", torch.full((len(self.names),), torch.inf).double())

    @property
    def names(self) -> tuple[str, ...]:
        """One per test, in the order of `scores`."""
        return tuple(
            [f"error p={p:g}" for p in self.errors]
            + [f"divergence T={t:g}" for t in self.temperatures]
        )

    def scores(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """What the tests measure: (B, D) float64, higher for what looks attacked.

        Args:
            x: Images, (B, C, H, W), in [0, 1].
            keys: (B,) int64, for a reformer or a classifier that draws.
        """
        made = self.magnet(x, keys)
        off = (made.double() - x.double()).abs().flatten(1)
        found = [off.pow(p).mean(1) for p in self.errors]
        if self.temperatures:
            own = None if keys is None else random.fold(keys, "model")
            plain, reformed = (call(self.model, z, own).double() for z in (x, made))
            found += [_divergence(plain / t, reformed / t) for t in self.temperatures]
        return torch.stack(found, 1)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """Which images are refused: (B,) bool."""
        return (self.scores(x, keys) > self.thresholds).any(1)


def _divergence(a: Tensor, b: Tensor) -> Tensor:
    """Jensen–Shannon divergence of two rows of logits, in nats: (B,)."""
    p, q = a.log_softmax(1), b.log_softmax(1)
    middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0, dtype=p.dtype, device=p.device))
    return 0.5 * (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(1)
