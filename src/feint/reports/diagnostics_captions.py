"""What each figure of a diagnosis shows, and how to read it."""

from __future__ import annotations

__all__ = ["caption"]

_CAPTIONS = {
    "overlap": "Every weight is set to one constant; the gradient then counts the paths from each "
    "pixel to the output. Bright pixels carry more of the network. Below: the connected pixels C "
    "of a checkerboard module (without one, every second row and column) and the pixels of the "
    "highest overlap, G(p).",
    "gradients": "Mean |∂L/∂x| over images and channels. A map that ignores the grid has a quarter "
    "of its mass on C.",
    "layers": "Mean gradient of the features after a layer. 'phase' is the largest share of one of "
    "the four (row, column) parities: 25 % where there is no checkerboard of period 2.",
    "p_attack": "Each pixel is set to white on its own, and the images that were right and become "
    "wrong are counted.",
    "perturbation": "Mean change of each pixel by the attack. The attack follows the normalised "
    "gradient, so it moves sensitive pixels most; the sign of the gradient would move all alike.",
    "masked": "The attacked image is mixed back into the clean one on all but a share of the "
    "pixels, ranked by R. Where the lines part, R tells where the model is vulnerable.",
    "labels": "Predicted class on planes through one image: along its gradient on and off C; along "
    "an attack's perturbation and the same one moved by a pixel; along the perturbation and a "
    "random direction. Points are not clipped to [0, 1].",
    "ssim": "Similar gradients show that two models look at an image alike; a gradient that hardly "
    "depends on the label says little about classes.",
    "rank": "Of the images whose class changed: where the class that the attack reached stood "
    "before, and where the original class stands after.",
}


def caption(measure: str) -> str:
    """What a figure shows, and how to read it."""
    return _CAPTIONS[measure]
