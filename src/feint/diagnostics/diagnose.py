"""A diagnosis: several measures of several models on the same images."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from feint.core import random
from feint.core.errors import ConfigError, UnknownNameError
from feint.diagnostics._common import check, sample_keys
from feint.diagnostics.measures import MEASURES
from feint.diagnostics.numbers import Measured
from feint.diagnostics.subject import Bench, Options, Subject

__all__ = ["Diagnosis", "diagnose"]

SSIM_SIDE = 7


@dataclass(frozen=True)
class Diagnosis:
    """What was measured.

    Attributes:
        subjects: Names, in order.
        results: Measure → subject → arrays and numbers.
        n: How many images.
        shape: Of one image, (C, H, W).
        seconds: Measure → seconds.
    """

    subjects: tuple[str, ...]
    results: Mapping[str, Mapping[str, Measured]]
    n: int
    shape: tuple[int, int, int]
    options: Options
    seconds: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """Numbers as plain data; arrays stay out."""
        return {
            measure: {
                name: {key: number.as_dict() for key, number in found.numbers.items()}
                for name, found in by.items()
            }
            for measure, by in self.results.items()
        }


def diagnose(
    subjects: Sequence[Subject],
    x: Tensor,
    y: Tensor,
    *,
    measures: Sequence[str] | None = None,
    options: Options | None = None,
    index: Tensor | None = None,
    on_measure: Callable[[str, str], None] | None = None,
) -> Diagnosis:
    """Take measures of models on the same images.

    Args:
        subjects: Classifiers, each under a name of its own.
        x: Images, (B, C, H, W), in [0, 1].
        y: Labels, (B,).
        measures: Names of `MEASURES`; all by default.
        options: Settings.
        index: Indices of the samples in their data set, which their draws hang on.
        on_measure: Called as `on_measure(measure, subject)` before each.

    Returns:
        Arrays and numbers by measure and subject.

    Raises:
        UnknownNameError: No such measure.
        ConfigError: No subject, two of one name, or images too small for a measure.
        ShapeError, DtypeError, RangeError, DeviceError: On bad arguments.
        GradientError, ModelError: What a model does not allow.

    Cost: the sum of the measures' (`MEASURES[name].cost`, per image and subject); gradients and
        attacks are computed once for all measures.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Flatten(), nn.Linear(36, 3)).eval()
        >>> subject = Subject("mine", net, net, net)
        >>> found = diagnose([subject], torch.rand(2, 3, 8, 8), torch.tensor([0, 1]),
        ...                  measures=["overlap", "gradients"])
        >>> sorted(found.results["overlap"]["mine"].numbers)
        ['connected_in_top', 'iou', 'share_on_connected']

    References:
        Each measure's own: `MEASURES[name].paper`.
    """
    settings = options or Options()
    check(x, y, settings.batch_size)
    names = [s.name for s in subjects]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"subjects are {names}; expected at least one, each of another name")
    wanted = list(MEASURES) if measures is None else list(dict.fromkeys(measures))
    for name in wanted:
        if name not in MEASURES:
            raise UnknownNameError("measure", name, MEASURES)
    if "ssim" in wanted and min(x.shape[-2:]) < SSIM_SIDE:
        raise ConfigError(
            f"images of {x.shape[-2]}×{x.shape[-1]} pixels are smaller than SSIM's window of "
            f"{SSIM_SIDE}; leave the measure 'ssim' out"
        )
    seed = settings.seed if index is None else random.keys(settings.seed, index.to(x.device))
    keys = sample_keys(seed, x)
    benches: dict[str, Bench] = {}
    chosen: list[int] = []
    for subject in subjects:
        benches[subject.name] = Bench(subject, x, y, keys, settings, benches, chosen)
    if "labels" in wanted:
        chosen += _clear(list(benches.values()), settings.map_images)
    results: dict[str, dict[str, Measured]] = {}
    seconds: dict[str, float] = {}
    for name in (m for m in MEASURES if m in wanted):
        begun = time.perf_counter()
        results[name] = {}
        for subject in subjects:
            if on_measure is not None:
                on_measure(name, subject.name)
            results[name][subject.name] = MEASURES[name].run(benches[subject.name])
        seconds[name] = time.perf_counter() - begun
    c, h, w = (int(n) for n in x.shape[1:])
    return Diagnosis(tuple(names), results, len(x), (c, h, w), settings, seconds)


def _clear(benches: Sequence[Bench], count: int) -> list[int]:
    """Rows of the images that every subject classifies rightly, or else the first ones."""
    right = torch.stack([b.right for b in benches]).all(0)
    order = torch.argsort(~right, stable=True)
    return [int(i) for i in order[:count]]
