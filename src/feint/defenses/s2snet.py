"""Structure-to-signal network (S2SNet): an autoencoder whose decoder a classifier has tuned."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from feint.core.registry import defense
from feint.defenses._learned import Learned
from feint.defenses._segnet import SegNet
from feint.defenses.base import Params, backward_rule

__all__ = ["S2SNet"]


@defense("s2snet", paper="Folz et al. 2018, arXiv 1803.07994 (S2SNet), §3.1")
class S2SNet(Learned):
    """SegNet autoencoder in front of a classifier, trained in two stages.

    First the whole autoencoder learns to reconstruct images, without labels. Then the decoder alone
    learns to give the classifier what it needs: cross-entropy through the frozen classifier, with
    the encoder frozen as well. Gradients that come out at the encoder are meant to speak of
    structure instead of classes. The first stage's weights alone are the paper's control, a plain
    autoencoder.

    Claim: white-box attacks through the network are blunted; behind a removed S2SNet the attack's
    images hardly fool the bare classifier (`removal`: 0.896 of the clean accuracy for BIM and
    ResNet-50, App. A). Known break: the paper's own bypass (gradients of the bare classifier leave
    0 for BIM), and better the rule `identity`, which takes the classifier's gradient at the
    reconstruction.

    Of the bundled weights, trained for minutes: 79.5 % of the CIFAR-10 test set behind it, 90.8 %
    without, 65.2 % behind the plain autoencoder. Of 100 bundled images under PGD-20, linf 8/255: 84
    right before the attack, 56 after one on the bare classifier, 8 by `exact`, 1 by `identity`;
    with the network removed 82 and 14. At 2/255 53 by `exact`, 26 by `identity`; behind the plain
    autoencoder 38 and 14.

    Backward rules:
        `exact` is autograd through the network, the places of the maxima held constant.
        `identity` (the default of a view: the stronger one) passes the classifier's gradient
        straight through.

    Args:
        weights: Name of bundled weights, `trained:NAME`, a `.safetensors` file of `feint train`, or
            `"untrained"` for fresh ones; by default `cifar10-s2snet`, trained for the bundled
            plain ResNet-20.
        width: Channels of the first stage; by default as the weights say, 64 if untrained.
        stages: Poolings, 1 to 5; by default as the weights say, 5 if untrained.

    Convention:
        Works on ImageNet-normalised values inside; the output is not clipped and goes straight to
        the classifier, as in the original. For the paper's noise layer write
        `noise(kind='sign') + s2snet`; for its gray box use the scenario `removal`.

    Raises:
        UnknownNameError: No such weights.
        DataError: A file that is missing or damaged.
        ConfigError: Weights of another network, or made with another width or number of stages.
        RangeError: A width below 1 or stages outside 1 … 5.
        ShapeError: Images without three channels, or smaller than 2^stages pixels.

    Cost: One forward pass of the autoencoder, far above a transformation's 10 % of a classifier.
        The paper's size has 29.5 M parameters and takes 32 G multiply–adds at 224×224, eight times
        a ResNet-50; the bundled one has 0.22 M and takes two thirds of a ResNet-20.

    Example:
        >>> import torch
        >>> small = S2SNet(weights="untrained", width=4, stages=2)
        >>> small(torch.rand(2, 3, 33, 32)).shape
        torch.Size([2, 3, 33, 32])

    References:
        Folz, Palacio, Hees, Dengel, "Adversarial defense based on structure-to-signal
        autoencoders", arXiv 1803.07994, §3.1 and §4; Palacio et al., "What do deep networks like
        to see?", CVPR 2018; Badrinarayanan et al., SegNet, arXiv 1511.00561; original code,
        `models/segnet_autoencoder.py`.

    Deviations:
        Odd sides unpool to the size before the pooling; the original takes multiples of 32. The
        original detaches the features while its decoder is in training mode, so that an attack in
        that mode has no gradient; here nothing is ever detached. The paper's weights are not
        public and its training constants are not given: ours are in the recipes.
    """

    differentiable: ClassVar[bool] = True
    stochastic: ClassVar[bool] = False
    best_rule: ClassVar[str | None] = "identity"
    family: ClassVar[str] = "segnet"
    bundled: ClassVar[str] = "cifar10-s2snet"

    network: SegNet

    def __init__(
        self, *, weights: str | None = None, width: int | None = None, stages: int | None = None
    ) -> None:
        super().__init__()
        usual = {"width": 64, "stages": 5}
        self.open(weights, {"width": width, "stages": stages}, usual, SegNet)

    def transform(self, x: Tensor, params: Params) -> Tensor:
        """The reconstruction."""
        self.check_shape(x, self.network.stride)
        return self.on_normalized(self.network, x)

    @backward_rule("identity")
    def identity(self, x: Tensor, params: Params) -> Tensor:
        """The image itself."""
        return x
