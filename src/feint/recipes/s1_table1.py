"""S1's Table I, the properties of nine defenses: what is measured, and what was published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from feint.core.errors import ConfigError
from feint.defenses import parse
from feint.evaluation.properties import Properties, properties

__all__ = ["CONTROLS", "PRESETS", "ROWS", "Row", "table"]

Preset = Literal["repo", "paper"]
PRESETS: tuple[Preset, ...] = ("repo", "paper")


@dataclass(frozen=True)
class Row:
    """One row: the paper's name and figures, and the expression of each reading of it."""

    name: str
    rms: float
    ssim: float
    accuracy: float
    repo: str
    """As S1's own code has it."""
    paper: str
    """As the defense's text has it."""

    def expression(self, preset: Preset) -> str:
        """The defense expression of a preset.

        Raises:
            ConfigError: If there is no such preset.
        """
        if preset not in PRESETS:
            raise ConfigError(f"preset is {preset!r}; expected one of {', '.join(PRESETS)}")
        return self.repo if preset == "repo" else self.paper


_FD, _RDG, _RAND = "fd(preset='paper')", "rdg(preset='paper')", "rand(preset='paper')"

ROWS = (
    Row("FD + RDG", 0.1944, 0.3093, 0.95, "fd + rdg", f"{_FD} + {_RDG}"),
    Row("FD + Rand", 0.2411, 0.2820, 0.94, "fd + rand", f"{_FD} + {_RAND}"),
    Row("RDG", 0.1903, 0.3116, 0.96, "rdg", _RDG),
    Row("Rand", 0.2268, 0.3110, 0.96, "rand", _RAND),
    Row("FD", 0.1343, 0.4310, 0.97, "fd", _FD),
    Row("SHIELD", 0.0405, 0.8475, 0.94, "shield(preset='qiu')", "shield"),
    Row("TV", 0.0338, 0.8759, 0.95, "tv(preset='qiu')", "tv"),
    Row(
        "Bit-depth reduction", 0.0709, 0.7730, 0.92, "bit_depth(preset='qiu')", "bit_depth(bits=3)"
    ),
    Row(
        "Pixel Deflection",
        0.0147,
        0.9877,
        0.97,
        "pixel_deflection(preset='qiu')",
        "pixel_deflection(preset='paper') + wavelet",
    ),
)
"""The nine rows in the paper's order; 100 ImageNet images, Inception v3, one draw."""

CONTROLS = (
    "pixel_shift(dx=2, dy=2)",
    "fd(passes=2)",
    "fd(passes=3)",
    "fd(align='exact', passes=3)",
    "fd(align='exact') + rdg",
)
"""What the finding about FD needs beside the rows: its shift alone, and its DCT alone."""


def table(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    preset: Preset = "repo",
    draws: int = 8,
    model_draws: int = 1,
    seed: int = 0,
    batch_size: int = 16,
) -> dict[str, Properties]:
    """Table I for any model and images: the properties of all nine rows.

    Args:
        model: Maps images in [0, 1] to logits.
        x: Images, (N, C, H, W), in [0, 1].
        y: True labels, (N,).
        preset: `"repo"` is S1's own code, `"paper"` the text.
        draws: See `feint.evaluation.properties`.
        model_draws: See there.
        seed: See there.
        batch_size: See there.

    Returns:
        Properties by the name of the row.

    Cost: See `feint.evaluation.properties`, nine times.
    """
    return {
        row.name: properties(
            parse(row.expression(preset)),
            model,
            x,
            y,
            draws=draws,
            model_draws=model_draws,
            seed=seed,
            batch_size=batch_size,
        )
        for row in ROWS
    }
