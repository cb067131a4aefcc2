"""High-level representation guided denoiser (HGD): subtract the noise that a UNet predicts."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from feint.core.registry import defense
from feint.defenses._dunet import DUNet
from feint.defenses._learned import Learned
from feint.defenses.base import Params, backward_rule

__all__ = ["HGD"]


@defense("hgd", paper="Liao, Liang, Dong, Pang, Hu, Zhu, 2018, arXiv:1712.02976")
class HGD(Learned):
    """High-level representation guided denoiser: x − d(x), d a UNet that predicts the noise.

    The denoiser learns on adversarial images of the bare classifier. Its loss is not the distance
    from the clean image but that of what the frozen classifier makes of both: of its logits (LGD,
    the paper's best and the bundled weights'), or of a layer's features (FGD).

    Claim: robust to white-box and black-box attacks on the bare classifier, which another one may
    replace; first place in the NIPS 2017 competition of defenses (Liao et al., abstract).
    Known break: PGD through denoiser and classifier finds a chosen target for 100 % of the images
    at linf 4/255 (Athalye & Carlini).
    Measured with `cifar10-hgd` on 200 bundled test images, 10 steps of PGD at linf 4/255 (8/255):
    clean 89.0 % (without a defense 91.5 %); examples made on the bare ResNet-20, which gets 0 % of
    them right, 71.0 % (58.5 %); white-box 0 % (0 %) with `exact`, 48.5 % (5.0 %) with `identity`.
    95 % intervals reach 7 points to each side at most.

    Backward rules:
        `exact`, the default and the break, is autograd through the denoiser. `identity` passes the
        classifier's gradient at the denoised image straight through.

    Args:
        weights: Name of bundled weights, `trained:NAME`, a `.safetensors` file of `feint train`, or
            `"untrained"`; by default `cifar10-hgd`, made for the bundled plain ResNet-20.
        width: Channels at full size; by default as the weights say, 64 if untrained.
        levels: Scales of the UNet, from 2; by default as the weights say, 5 if untrained.

    Convention:
        Any size. ImageNet-normalised values inside; the output is not clipped and goes straight to
        the classifier, as in the original. Recipes choose the paper's variants by their objective:
        `guided` is LGD, with `layer` FGD; `through-classifier` CGD; `reconstruct` the
        pixel-guided denoiser.

    Raises:
        UnknownNameError: No such weights.
        DataError: A file that is missing or damaged.
        ConfigError: Weights of another network, or made with another width or number of levels.
        RangeError: A width below 1, or fewer levels than 2.
        ShapeError: Images without three channels.

    Cost: One forward pass of the UNet, far above a transformation's 10 % of a classifier: the
        paper's size has 11.0 M parameters and takes 39 G multiply–adds at 224×224, nine times a
        ResNet-50; the bundled recipe's has 0.10 M and takes half of a ResNet-20.

    Example:
        >>> import torch
        >>> small = HGD(weights="untrained", width=4, levels=2)
        >>> small(torch.rand(2, 3, 33, 32)).shape
        torch.Size([2, 3, 33, 32])

    References:
        Liao, Liang, Dong, Pang, Hu, Zhu, "Defense against adversarial attacks using high-level
        representation guided denoiser", CVPR 2018, §3. Athalye, Carlini, "On the robustness of
        the CVPR 2018 white-box adversarial example defenses", 2018, arXiv:1804.03286.

    Deviations:
        The paper learns from a fixed set of FGSM and iterated FGSM images of several networks, with
        ε from 1 to 16; the bundled recipe attacks its one classifier anew in every step.
    """

    differentiable: ClassVar[bool] = True
    stochastic: ClassVar[bool] = False
    family: ClassVar[str] = "dunet"
    bundled: ClassVar[str] = "cifar10-hgd"

    network: DUNet

    def __init__(
        self, *, weights: str | None = None, width: int | None = None, levels: int | None = None
    ) -> None:
        super().__init__()
        usual = {"width": 64, "levels": 5}
        self.open(weights, {"width": width, "levels": levels}, usual, DUNet)

    def transform(self, x: Tensor, params: Params) -> Tensor:
        """The image without the noise that the network sees in it."""
        self.check_shape(x, 1)
        return x - self.noise(x)

    def noise(self, x: Tensor) -> Tensor:
        """The predicted noise, in image units."""
        result: Tensor = self.network((x - self.mean) / self.std) * self.std
        return result

    @backward_rule("identity")
    def identity(self, x: Tensor, params: Params) -> Tensor:
        """The image itself."""
        return x
