"""Diagnostics: where a model's gradients and an attacker's perturbations go, as arrays."""

from feint.diagnostics.checkerboard import checkerboard_share, phase_shares
from feint.diagnostics.diagnose import Diagnosis, diagnose
from feint.diagnostics.gradient_ssim import (
    gradient_magnitude,
    gradient_ssim,
    other_labels,
    reconstruction_gradients,
)
from feint.diagnostics.gradients import (
    heatmap,
    input_gradients,
    layer_heatmaps,
    pixel_robustness,
)
from feint.diagnostics.label_map import (
    LabelMap,
    flip_distance,
    label_map,
    masked_directions,
    perturbation_directions,
    random_direction,
    shifted_direction,
)
from feint.diagnostics.masked import MaskedAttack, blend_curve, masked_attack
from feint.diagnostics.masks import (
    connected_pixels,
    intersection_over_union,
    share_inside,
    top_pixels,
    window_overlap,
)
from feint.diagnostics.measures import MEASURES, Measure
from feint.diagnostics.numbers import Measured, Number
from feint.diagnostics.overlap import gradient_overlap
from feint.diagnostics.p_attack import PixelAttack, pixel_attack_rate
from feint.diagnostics.perturbation import perturbation_map
from feint.diagnostics.rank import Ranks, class_rank, class_ranks, rank_shares
from feint.diagnostics.subject import Options, Subject

__all__ = [
    "MEASURES",
    "Diagnosis",
    "LabelMap",
    "MaskedAttack",
    "Measure",
    "Measured",
    "Number",
    "Options",
    "PixelAttack",
    "Ranks",
    "Subject",
    "blend_curve",
    "checkerboard_share",
    "class_rank",
    "class_ranks",
    "connected_pixels",
    "diagnose",
    "flip_distance",
    "gradient_magnitude",
    "gradient_overlap",
    "gradient_ssim",
    "heatmap",
    "input_gradients",
    "intersection_over_union",
    "label_map",
    "layer_heatmaps",
    "masked_attack",
    "masked_directions",
    "other_labels",
    "perturbation_directions",
    "perturbation_map",
    "phase_shares",
    "pixel_attack_rate",
    "pixel_robustness",
    "random_direction",
    "rank_shares",
    "reconstruction_gradients",
    "share_inside",
    "shifted_direction",
    "top_pixels",
    "window_overlap",
]
