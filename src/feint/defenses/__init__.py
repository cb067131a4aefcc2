"""Defenses: one `Defense` per file, chains of them, and the expressions that people type."""

from feint.defenses.ace import ACE
from feint.defenses.base import Defense, Params, View
from feint.defenses.bit_depth import BitDepth
from feint.defenses.chain import Chain, parse
from feint.defenses.crop_ensemble import CropEnsemble
from feint.defenses.diffusion import Diffusion
from feint.defenses.fd import FD
from feint.defenses.hgd import HGD
from feint.defenses.jpeg import JPEG
from feint.defenses.magnet import MagNet
from feint.defenses.me_net import MENet
from feint.defenses.median import Median
from feint.defenses.noise import Noise
from feint.defenses.pixel_defend import PixelDefend
from feint.defenses.pixel_deflection import PixelDeflection
from feint.defenses.pixel_shift import PixelShift
from feint.defenses.prm import PRM
from feint.defenses.quilting import Quilting
from feint.defenses.rand import Rand
from feint.defenses.rdg import RDG
from feint.defenses.region_based import RegionBased
from feint.defenses.s2snet import S2SNet
from feint.defenses.shield import Shield
from feint.defenses.smoothing import Smoothing
from feint.defenses.thermometer import Thermometer
from feint.defenses.tv import TV
from feint.defenses.wavelet import Wavelet

__all__ = [
    "ACE",
    "FD",
    "HGD",
    "JPEG",
    "PRM",
    "RDG",
    "TV",
    "BitDepth",
    "Chain",
    "CropEnsemble",
    "Defense",
    "Diffusion",
    "MENet",
    "MagNet",
    "Median",
    "Noise",
    "Params",
    "PixelDefend",
    "PixelDeflection",
    "PixelShift",
    "Quilting",
    "Rand",
    "RegionBased",
    "S2SNet",
    "Shield",
    "Smoothing",
    "Thermometer",
    "View",
    "Wavelet",
    "parse",
]
