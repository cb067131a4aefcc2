"""Inline SVG drawn by hand: it follows the page's colors, reflows on a phone and needs no script.

Coordinates are rounded to a hundredth, so that equal data give equal text.
"""

from __future__ import annotations

import math

from markupsafe import Markup, escape

from feint.reports.curves import Curve
from feint.reports.story import Mark
from feint.reports.words import budget, percent, rate_words

__all__ = ["TICKS", "axis", "curve", "symbol", "ticks", "track"]

TICKS = (0, 25, 50, 75, 100)
"""Percentages with a grid line."""
_SHAPES = {
    "none": '<circle r="5"/>',
    "claim": '<path d="M0-6.5 6.5 0 0 6.5-6.5 0z"/>',
    "gray-box": '<circle r="5.5"/>',
    "transfer": '<path d="M-5-5H5V5H-5z"/>',
    "removal": '<path d="M0 6 6-5H-6z"/>',
    "decision": '<path d="M0-6.2 5.9-1.9 3.6 5H-3.6L-5.9-1.9z"/>',
    "score": '<path d="M-3-5.2H3L6 0 3 5.2H-3L-6 0z"/>',
    "semi-brute-force": '<path d="M-2-6H2V-2H6V2H2V6H-2V2H-6V-2H-2z"/>',
    "white-box": '<path d="M0-6.5 6.2 5H-6.2z"/>',
    "adaptive": '<path d="M0-7 6 0 0 7-6 0z"/>',
    "bare": '<path d="M-4.5-4.5 4.5 4.5M4.5-4.5-4.5 4.5" class="cross"/>',
    "worst": '<path d="M-2.5-8.5H2.5V8.5H-2.5z"/>',
}
_OTHER = '<path d="M-5-5 5 5M5-5-5 5" class="cross"/>'


def _round(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _class(kind: str) -> str:
    return f"mark {kind if kind in _SHAPES else 'other'}"


def symbol(kind: str) -> Markup:
    """A kind's symbol, for legends."""
    return Markup(
        '<svg class="key" width="16" height="16" viewBox="-8 -8 16 16" aria-hidden="true">'
        f'<g class="{_class(kind)}">{_SHAPES.get(kind, _OTHER)}</g></svg>'
    )


def track(mark: Mark, clean: float | None = None) -> Markup:
    """One row of the ladder: the mark with its whiskers on a 0–100 % axis.

    Horizontal positions are percentages of the width, so the row fits any screen.

    Args:
        mark: What to draw.
        clean: Clean accuracy, drawn as a line of reference.
    """
    said = f"{mark.label}: {percent(mark.value)} %"
    if mark.measured:
        said += f", 95 % interval {percent(mark.low)} to {percent(mark.high)}"
    kind = _class(mark.kind)
    parts = [
        f'<svg class="track" width="100%" height="26" role="img" aria-label="{escape(said)}">'
        f"<title>{escape(said)}</title><desc>{escape(mark.note or mark.label)}</desc>"
    ]
    where, low, high = (_round(100 * v) for v in (mark.value, mark.low, mark.high))
    if mark.measured:
        parts.append(f'<rect class="bar {kind}" x="0" y="6" width="{where}%" height="14"/>')
    parts += [f'<line class="grid" x1="{t}%" x2="{t}%" y1="0" y2="26"/>' for t in TICKS]
    if clean is not None:
        at = _round(100 * clean)
        parts.append(f'<line class="reference" x1="{at}%" x2="{at}%" y1="0" y2="26"/>')
    if mark.measured or mark.low < mark.high:
        style = "whisker" if mark.measured else "range"
        parts.append(f'<line class="{style} {kind}" x1="{low}%" x2="{high}%" y1="13" y2="13"/>')
    parts += [
        f'<line class="each {kind}" x1="{_round(100 * v)}%" x2="{_round(100 * v)}%" '
        'y1="7" y2="19"/>'
        for v in mark.others
    ]
    parts.append(
        f'<svg x="{where}%" y="13" overflow="visible"><g class="dot {kind}">'
        f"{_SHAPES.get(mark.kind, _OTHER)}</g></svg></svg>"
    )
    return Markup("".join(parts))


def axis() -> Markup:
    """The percentages under the story figure."""
    labels = "".join(
        f'<text x="{t}%" y="14" text-anchor="middle">{t}{" %" if t == 100 else ""}</text>'
        for t in TICKS
    )
    return Markup(f'<svg class="track" width="100%" height="20" aria-hidden="true">{labels}</svg>')


def ticks(reach: float, norm: str) -> list[tuple[float, str]]:
    """About four round budgets from 0 to `reach`, with their labels."""
    unit, steps = (1 / 255, (1, 2, 4, 5, 8, 10)) if norm == "linf" else (1.0, (1, 2, 2.5, 5, 10))
    span = reach / unit
    power = 10 ** math.floor(math.log10(span / 4)) if span > 0 else 1.0
    fitting = [m * power for m in steps if span / (m * power) <= 5]
    # The finest step that ends at the right edge, or else the finest.
    step = next((s for s in fitting if abs(span / s - round(span / s)) < 1e-6), fitting[0])
    count = math.floor(span / step + 1e-9) if step > 0 else 0
    values = [n * step for n in range(count + 1)]
    return [(v * unit, f"{v:g}" if norm != "linf" or v == 0 else f"{v:g}/255") for v in values]


def curve(data: Curve, reach: float = 0.0) -> Markup:
    """A security curve: accuracy against eps, one line per scenario, whiskers at every point.

    Args:
        data: What to draw.
        reach: Right end of the axis; by default the curve's own.
    """
    width, height, left, right, top, bottom = 360, 232, 34, 14, 10, 40
    reach = reach or data.reach or 1.0

    def at(eps: float, share: float) -> tuple[str, str]:
        x = left + (width - left - right) * eps / reach
        y = top + (height - top - bottom) * (1 - share)
        return _round(x), _round(y)

    said = f"Accuracy against eps ({data.norm}) of {data.name}. " + " ".join(
        f"{s.scenario}: "
        + ", ".join(f"{rate_words(r)} at {budget(data.norm, e)}" for e, r in s.points)
        + "."
        for s in data.series
    )
    parts = [
        f'<svg class="curve" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(said)}">'
    ]
    for t in TICKS:
        x, y = at(0, t / 100)
        parts.append(f'<line class="grid" x1="{x}" x2="{width - right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{left - 7}" y="{y}" dy="4" text-anchor="end">{t}</text>')
    for eps, label in ticks(reach, data.norm):
        x, _ = at(eps, 0)
        parts.append(f'<text x="{x}" y="{height - 22}" text-anchor="middle">{label}</text>')
    middle = _round((left + width - right) / 2)
    parts.append(
        f'<text class="title" x="{middle}" y="{height - 4}" text-anchor="middle">'
        f"eps ({escape(data.norm)})</text>"
    )
    for series in data.series:
        points = [at(eps, r.value) for eps, r in series.points]
        path = " ".join(f"{x},{y}" for x, y in points)
        kind = _class(series.scenario)
        derived = " derived" if series.derived else " sparse" if len(points) < 3 else ""
        parts.append(f'<polyline class="line {kind}{derived}" points="{path}"/>')
        for (eps, r), (x, y) in zip(series.points, points, strict=True):
            low, high = at(eps, r.low)[1], at(eps, r.high)[1]
            parts.append(f'<line class="whisker {kind}" x1="{x}" x2="{x}" y1="{low}" y2="{high}"/>')
            # At eps 0 every line starts from clean accuracy.
            shape = "none" if eps == 0 else series.scenario
            parts.append(
                f'<g class="dot {_class(shape)}" transform="translate({x} {y}) scale(.72)">'
                f"{_SHAPES.get(shape, _OTHER)}</g>"
            )
    parts.append("</svg>")
    return Markup("".join(parts))
