"""Classifiers for 32×32 images. Each maps images (in its own input space) to logits."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "ARCHITECTURES",
    "VGG11",
    "CifarResNet",
    "ResNet18",
    "Toy",
    "resnet18",
    "resnet20",
    "resnet32",
    "toy",
    "vgg11",
    "vgg11_thin",
]


class _ThinBlock(nn.Module):
    """Two 3×3 convolutions and a parameter-free shortcut (He et al. 2016, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.widen = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.widen:
            before = self.widen // 2
            x = F.pad(x, (0, 0, 0, 0, before, self.widen - before))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """Thin residual network for CIFAR with 6n+2 layers (ResNet-20: 0.27 M parameters).

    Args:
        depth: 20, 32, 44, 56 …
        classes: Number of logits.

    References:
        He, Zhang, Ren, Sun, "Deep residual learning for image recognition", CVPR 2016, §4.2.
    """

    def __init__(self, depth: int = 20, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        inputs, stages = 16, []
        for stage, outputs in enumerate((16, 32, 64)):
            blocks = []
            for position in range((depth - 2) // 6):
                blocks.append(_ThinBlock(inputs, outputs, 2 if stage and not position else 1))
                inputs = outputs
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (B, classes)."""
        x = self.stages(F.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class _WideBlock(nn.Module):
    """Two 3×3 convolutions and a 1×1 projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = (
            nn.Sequential()
            if same
            else nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 with a 3×3 stem for 32×32 images, as ACE (S0) uses it: 11 173 962 parameters."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs, blocks = 64, []
        for stage, outputs in enumerate((64, 128, 256, 512)):
            for position in range(2):
                blocks.append(_WideBlock(inputs, outputs, 2 if stage and not position else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (B, classes)."""
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class VGG11(nn.Module):
    """VGG-11 with batch normalisation and a 512–512–classes head, as ACE (S0) uses it.

    Args:
        classes: Number of logits.
        width: Channels of the first convolution, an eighth of the last one's.
    """

    def __init__(self, classes: int = 10, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs, top = 3, 8 * width
        for item in (width * m for m in (1, 0, 2, 0, 4, 4, 0, 8, 8, 0, 8, 8, 0)):
            if not item:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(inputs, item, 3, 1, 1), nn.BatchNorm2d(item), nn.ReLU()]
            inputs = item
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Linear(top, top), nn.ReLU(), nn.Linear(top, top), nn.ReLU(), nn.Linear(top, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (B, classes)."""
        logits: Tensor = self.head(self.features(x).flatten(1))
        return logits


class Toy(nn.Module):
    """S0's toy network (Table 6): three unpadded convolutions, 1600 → 512 → classes."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 2)
        self.conv2 = nn.Conv2d(16, 32, 3, 2)
        self.conv3 = nn.Conv2d(32, 64, 3, 1)
        self.fc1 = nn.Linear(1600, 512)
        self.fc2 = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (B, classes)."""
        x = F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))))
        logits: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits


def resnet20(classes: int = 10) -> nn.Module:
    """`CifarResNet` of depth 20."""
    return CifarResNet(20, classes)


def resnet32(classes: int = 10) -> nn.Module:
    """`CifarResNet` of depth 32."""
    return CifarResNet(32, classes)


def resnet18(classes: int = 10) -> nn.Module:
    """`ResNet18`."""
    return ResNet18(classes)


def vgg11(classes: int = 10) -> nn.Module:
    """`VGG11`."""
    return VGG11(classes)


def vgg11_thin(classes: int = 10) -> nn.Module:
    """`VGG11` of a quarter of the width."""
    return VGG11(classes, 16)


def toy(classes: int = 10) -> nn.Module:
    """`Toy`."""
    return Toy(classes)


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet18": resnet18,
    "vgg11": vgg11,
    "vgg11-thin": vgg11_thin,
    "toy": toy,
}
