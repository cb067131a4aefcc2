"""A small PixelCNN: the probability of every 8-bit value, given all values before it.

Two stacks of masked convolutions as in Gated PixelCNN. The vertical one sees the rows above, the
horizontal one that and the pixels at the left. A mixture of discretised logistics per pixel, as in
PixelCNN++, makes the three channels depend on each other without more passes.

`forward` evaluates all pixels at once, for training. `Raster` evaluates them one after the other
and computes every feature once, so that a whole image costs as many multiplications as one
`forward`: what takes time is the number of steps, height × width, which a batch shares.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feint.core.errors import RangeError

__all__ = ["Mixture", "PixelCNN", "Raster", "bits"]

LEAST_LOG_SCALE = -7.0
HALF = 1 / 255
"""Half the distance of two 8-bit values, in [−1, 1]."""


class PixelCNN(nn.Module):
    """Parameters of every pixel's mixture from the pixels before it in raster order.

    Args:
        width: Channels of both stacks.
        layers: Gated residual layers; the receptive field is 2 + layers pixels up and left.
        mixtures: Components per pixel.

    Raises:
        RangeError: One of them below 1.
    """

    def __init__(self, width: int = 32, layers: int = 4, mixtures: int = 5) -> None:
        super().__init__()
        if min(width, layers, mixtures) < 1:
            raise RangeError(
                f"width, layers, mixtures are {width}, {layers}, {mixtures}; expected whole "
                "numbers from 1"
            )
        self.width, self.layers, self.mixtures = width, layers, mixtures
        # The image gets a channel of ones, which tells its border from black pixels.
        self.first_above = nn.Conv2d(4, width, (2, 3))
        self.first_left = nn.Conv2d(4, width, (1, 2))
        self.first_link = nn.Conv2d(width, width, 1)
        self.above = nn.ModuleList(nn.Conv2d(width, 2 * width, (2, 3)) for _ in range(layers))
        self.left = nn.ModuleList(nn.Conv2d(width, 2 * width, (1, 2)) for _ in range(layers))
        self.link = nn.ModuleList(nn.Conv2d(width, 2 * width, 1) for _ in range(layers))
        self.last = nn.Conv2d(width, 10 * mixtures, 1)

    def forward(self, x: Tensor) -> Tensor:
        """From images in [0, 1], (B, 3, H, W), to (B, 10·mixtures, H, W) for `Mixture`."""
        z = signed(x)
        # Shifted by a row, or by a pixel, so that no feature sees the value that it predicts.
        v = self.first_above(F.pad(z, (1, 1, 2, 0))[:, :, :-1])
        h = self.first_left(F.pad(z, (2, 0))[..., :-1]) + self.first_link(v)
        for above, left, link in zip(self.above, self.left, self.link, strict=True):
            v = v + gate(above(F.pad(F.elu(v), (1, 1, 1, 0))))
            h = h + gate(left(F.pad(F.elu(h), (1, 0))) + link(v))
        result: Tensor = self.last(F.elu(h))
        return result

    def log_likelihood(self, x: Tensor) -> Tensor:
        """Of images, by their nearest 8-bit values: (B,) in nats."""
        p = self(x).movedim(1, -1)
        mixture = Mixture(p.float() if p.dtype in (torch.bfloat16, torch.float16) else p)
        value = (x.to(mixture.weight.dtype) * 255).round()
        for channel in range(3):
            mixture.take(channel, value[:, channel])
        return mixture.weight.logsumexp(-1).flatten(1).sum(1)


def signed(x: Tensor) -> Tensor:
    """Images in [0, 1] as the network sees them: in [−1, 1], with a channel of ones."""
    return torch.cat([2 * x - 1, torch.ones_like(x[:, :1])], 1)


def gate(a: Tensor) -> Tensor:
    """Half of the channels, each let through by its partner."""
    value, door = a.chunk(2, 1)
    return torch.tanh(value) * torch.sigmoid(door)


class Mixture:
    """The mixture of pixels, whose channels are taken one after the other.

    Args:
        parameters: (…, 10·K): logits of the components; means of red, green and blue; logarithms
            of their scales; how green's mean depends on red, blue's on red, blue's on green.

    Convention:
        Values are 0 … 255. A mean is in [−1, 1], and a value has the mass of the logistic within
        1/255 of it, 0 and 255 that of the whole tail.
    """

    def __init__(self, parameters: Tensor) -> None:
        split = parameters.unflatten(-1, (10, -1))
        self.weight = split[..., 0, :].log_softmax(-1)
        """(…, K): logarithm of each component's share; what was taken is multiplied in."""
        self._means = split[..., 1:4, :]
        self._rates = (-split[..., 4:7, :].clamp_min(LEAST_LOG_SCALE)).exp()
        self._slopes = torch.tanh(split[..., 7:10, :])
        self._taken: list[Tensor] = []

    def log_mass(self, channel: int, value: Tensor) -> Tensor:
        """Of values of a channel, given those taken of the ones before it.

        Args:
            channel: 0, 1 or 2; the ones before it have been taken.
            value: (…) or (N, …): 0 … 255.

        Returns:
            (…, K) or (N, …, K): logarithm of each component's mass.
        """
        mean, rate = self._means[..., channel, :], self._rates[..., channel, :]
        for before in range(channel):
            slope = self._slopes[..., channel - 1 + before, :]
            mean = mean + slope * self._taken[before][..., None]
        middle = value[..., None] * (2 / 255) - 1 - mean
        # σ(a) − σ(b) = σ(a)·σ(−b)·(1 − e^(b−a)): no difference of nearly equal numbers.
        below = F.logsigmoid((middle + HALF) * rate)
        beyond = F.logsigmoid((HALF - middle) * rate)
        both = below + beyond + torch.log(-torch.expm1(-2 * HALF * rate))
        v = value[..., None]
        return torch.where(v < 0.5, below, torch.where(v > 254.5, beyond, both))

    def take(self, channel: int, value: Tensor) -> None:
        """Fix a channel's value, (…), for the channels after it."""
        self.weight = self.weight + self.log_mass(channel, value)
        self._taken.append(value * (2 / 255) - 1)


class Raster:
    """The network's predictions pixel by pixel: ask for one, give its values, go on.

    Args:
        network: In the dtype in which to compute.
        like: A batch (B, 3, H, W), of which shape and device count.
    """

    def __init__(self, network: PixelCNN, like: Tensor) -> None:
        self.network = network
        b, _, self.height, self.width = like.shape
        dtype = network.last.weight.dtype
        f = network.width

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(b, *shape, dtype=dtype, device=like.device)

        # Two rows above the image and its border left and right, as `F.pad` gives `forward`.
        self._image = zeros(4, self.height + 2, self.width + 4)
        self._rows = [zeros(f, 1, self.width + 2) for _ in range(network.layers)]
        self._left = [_flat(conv) for conv in (network.first_left, *network.left)]
        self._last = _flat(network.last)
        self._links: list[Tensor] = []
        self._before: list[Tensor] = []

    def start_row(self, row: int) -> None:
        """The vertical stack of a row, all rows above of which are given."""
        net = self.network
        v = net.first_above(self._image[:, :, row : row + 2, 1:-1])
        self._links = [net.first_link(v)[:, :, 0].permute(2, 0, 1).contiguous()]
        for number, (above, link) in enumerate(zip(net.above, net.link, strict=True)):
            own = F.pad(F.elu(v), (1, 1))
            v = v + gate(above(torch.cat([self._rows[number], own], 2)))
            self._rows[number] = own
            self._links.append(link(v)[:, :, 0].permute(2, 0, 1).contiguous())
        zero = v.new_zeros(len(v), net.width)
        self._before = [zero] * net.layers

    def predict(self, row: int, column: int) -> Tensor:
        """Parameters of the mixture of a pixel, (B, 10·K)."""
        seen = self._image[:, :, row + 2, column : column + 2].movedim(-1, 1).flatten(1)
        weight, bias = self._left[0]
        h = torch.addmm(bias, seen, weight) + self._links[0][column]
        for number, (weight, bias) in enumerate(self._left[1:]):
            own = F.elu(h)
            a = torch.addmm(bias, torch.cat([self._before[number], own], 1), weight)
            h = h + gate(a + self._links[number + 1][column])
            self._before[number] = own
        weight, bias = self._last
        return torch.addmm(bias, F.elu(h), weight)

    def give(self, row: int, column: int, value: Tensor) -> None:
        """The pixel's values, (B, 3), 0 … 255."""
        place = self._image[:, :, row + 2, column + 2]
        place[:, :3] = value * (2 / 255) - 1
        place[:, 3] = 1


def _flat(conv: nn.Module) -> tuple[Tensor, Tensor]:
    """Weights of a convolution of one row as a matrix (taps·inputs, outputs), and its bias."""
    weight = conv.get_parameter("weight")[:, :, 0, :]
    return weight.movedim(-1, 1).flatten(1).T.contiguous(), conv.get_parameter("bias")


def bits(nats: Tensor, values: int) -> Tensor:
    """Bits per value of a log-likelihood in nats."""
    return -nats / (math.log(2) * values)
