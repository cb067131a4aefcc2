"""A diagnosis as files: numbers, arrays, figures, and one HTML page that opens offline."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from rich import box
from rich.markup import escape
from rich.table import Table

from feint.diagnostics import MEASURES, Diagnosis, Number
from feint.reports.diagnostics_captions import caption
from feint.reports.diagnostics_drawing import brief, number, percent, short, stacked
from feint.reports.diagnostics_figures import figure
from feint.reports.figures import save
from feint.store.files import write_atomic

__all__ = ["Written", "headline", "lines", "slugs", "table", "write"]


@dataclass(frozen=True)
class Line:
    """A line of the table."""

    measure: str
    label: str
    values: tuple[str, ...]
    """One per subject."""
    intervals: tuple[str, ...]
    """95 % intervals with counts, where there are some."""


@dataclass(frozen=True)
class Written:
    """Where everything is."""

    html: Path
    numbers: Path
    arrays: tuple[Path, ...]
    figures: tuple[Path, ...]


_ROWS: tuple[tuple[str, str, str, bool], ...] = (
    ("overlap", "connected_in_top", "C inside G({p}) of Ω", True),
    ("overlap", "share_on_connected", "Ω on C", True),
    ("gradients", "share_on_connected", "|gradient| on C", True),
    ("gradients", "connected_in_top", "C inside the top {p} of R", True),
    ("gradients", "iou", "IoU of C and the top of R", False),
    ("gradients", "zero_gradients", "images with a zero gradient", True),
    ("p_attack", "rate", "one white pixel breaks", True),
    ("p_attack", "on_connected", "… a pixel on C", True),
    ("p_attack", "off_connected", "… a pixel off C", True),
    ("perturbation", "clean_accuracy", "accuracy, clean", True),
    ("perturbation", "accuracy", "accuracy, attacked", True),
    ("perturbation", "share_on_connected", "|perturbation| on C", True),
    ("masked", "accuracy_attack_on_top_overlap", "attacked on G({p}) only", True),
    ("masked", "accuracy_attack_on_bottom_overlap", "attacked on the lowest {p} only", True),
    ("masked", "gap", "bottom minus top curve of R", True),
    ("labels", "mask_flip_up", "label changes along C at l2", False),
    ("labels", "mask_flip_right", "label changes off C at l2", False),
    ("labels", "shift_flip_right", "label changes along δ at l2", False),
    ("labels", "shift_flip_up", "label changes along shifted δ at l2", False),
    ("ssim", "between_labels", "SSIM of gradients, other label", False),
    ("rank", "moved", "class changed", True),
    ("rank", "second", "… to the clean runner-up", True),
)


def lines(data: Diagnosis) -> list[Line]:
    """The lines of the table: the numbers of the measures that were taken."""
    found = []
    rows = list(_ROWS)
    if len(data.subjects) > 1:
        at = next(i for i, r in enumerate(rows) if r[0] == "rank")
        new = [
            ("ssim", f"to {n}", f"SSIM of gradients, to {short(n, 28)}", False)
            for n in data.subjects
        ]
        rows[at:at] = new
    for measure, key, label, share in rows:
        if measure not in data.results:
            continue
        numbers = [data.results[measure][name].numbers.get(key) for name in data.subjects]
        found.append(
            Line(
                measure,
                label.format(p=f"{data.options.share:g}"),
                tuple(percent(n, 1) if share else number(n) for n in numbers),
                tuple(_interval(n, share) for n in numbers),
            )
        )
    return found


def _interval(found: Number | None, share: bool) -> str:
    if found is None or found.n is None:
        return ""
    if found.low is None or found.high is None:
        return f"n = {found.n}"
    low, high = (100 * v if share else v for v in (found.low, found.high))
    digits = 1 if share else 2
    return f"[{low:.{digits}f}, {high:.{digits}f}], n = {found.n}"


def headline(data: Diagnosis) -> str:
    """What stands out, in one sentence."""
    if "gradients" in data.results:
        by = data.results["gradients"]
        shares = {n: by[n].numbers["share_on_connected"].value or 0.0 for n in data.subjects}
        c = float(np.mean(by[data.subjects[0]].arrays["connected"]))
        most = max(shares, key=lambda n: shares[n])
        said = f"{percent(shares[most])} of the gradient of {brief(most)} lies on {percent(c)} "
        rest = [n for n in data.subjects if n != most]
        if rest:
            least = min(rest, key=lambda n: shares[n])
            return f"{said}of the pixels; of {brief(least)} it is {percent(shares[least])}"
        return f"{said}of the pixels"
    if "overlap" in data.results:
        by = data.results["overlap"]
        told = [f"{brief(n)} {percent(by[n].numbers['connected_in_top'])}" for n in data.subjects]
        return f"Share of C in G({data.options.share:g}): " + ", ".join(told)
    return f"{len(data.results)} measures of {len(data.subjects)} models"


def table(data: Diagnosis) -> Table:
    """The numbers for a terminal: a line per number, a column per model."""
    made = Table(box=box.SIMPLE_HEAD, title=escape(headline(data)), title_justify="left")
    made.title_style = "bold"
    made.add_column("", no_wrap=True)
    for name in data.subjects:
        made.add_column(escape(stacked(brief(name))), justify="right", min_width=7)
    before = ""
    for line in lines(data):
        if line.measure != before:
            made.add_section()
            made.add_row(f"[dim]{MEASURES[line.measure].title}[/]", *[""] * len(data.subjects))
        values = [v.replace(" %", "\u00a0%") for v in line.values]
        made.add_row(f"  {escape(line.label)}", *values)
        before = line.measure
    return made


def slugs(data: Diagnosis) -> dict[str, str]:
    """A name for every subject that is good in files and archives, each another one."""
    found: dict[str, str] = {}
    for name in data.subjects:
        slug = re.sub(r"[^A-Za-z0-9]+", "-", brief(name)).strip("-")[-48:].strip("-") or "model"
        while slug in found.values():
            slug += "_"
        found[name] = slug
    return found


def write(
    data: Diagnosis,
    folder: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    notes: Sequence[str] = (),
    classes: Sequence[str] = (),
) -> Written:
    """Write arrays, figures (SVG and PNG), numbers and the page; each file whole or not at all.

    Args:
        data: The diagnosis.
        folder: An existing folder.
        title: What was diagnosed.
        facts: Settings that the page lists.
        notes: What a reader must know.
        classes: Names of the classes, if known.

    Returns:
        The files: `diagnosis.html`, `numbers.json`, and for each measure `MEASURE.npz` (arrays
        `SUBJECT.ARRAY`), `MEASURE.svg` and `MEASURE.png`.

    Raises:
        DataError: A file cannot be written.
    """
    names = slugs(data)
    arrays, figures, shown = [], [], []
    for measure, by in data.results.items():
        path = folder / f"{measure}.npz"
        held = {f"{names[s]}.{key}": v for s, m in by.items() for key, v in m.arrays.items()}
        write_atomic(path, _npz(held))
        arrays.append(path)
        drawn = figure(data, measure, classes)
        figures += [save(drawn, folder / f"{measure}{suffix}") for suffix in (".svg", ".png")]
        shown.append((measure, _uri(figures[-2])))
    record = {
        "models": names,
        "n": data.n,
        "shape": list(data.shape),
        "facts": dict(facts),
        "notes": list(notes),
        "headline": headline(data),
        "table": [
            {
                "measure": line.measure,
                "label": line.label,
                "values": list(line.values),
                "intervals": list(line.intervals),
            }
            for line in lines(data)
        ],
        "numbers": data.as_dict(),
    }
    numbers = folder / "numbers.json"
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(numbers, text.encode())
    page = folder / "diagnosis.html"
    write_atomic(page, _page(data, title, facts, notes, shown).encode())
    return Written(page, numbers, tuple(arrays), tuple(figures))


def _npz(held: Mapping[str, NDArray[Any]]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **dict(held))  # type: ignore[arg-type]
    return buffer.getvalue()


def _uri(path: Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()


_EXTRA = """
td.n small { display: block; }
"""


def _page(
    data: Diagnosis,
    title: str,
    facts: Mapping[str, str],
    notes: Sequence[str],
    shown: Sequence[tuple[str, str]],
) -> str:
    style = resources.files("feint.reports").joinpath("templates/report.css").read_text("utf-8")
    style += _EXTRA
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = Environment(
        loader=PackageLoader("feint.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("diagnostics.html.j2").render(
        data=data,
        title=title,
        facts=facts,
        notes=notes,
        shown=shown,
        lines=lines(data),
        brief=brief,
        headline=headline(data),
        measures=MEASURES,
        caption=caption,
        style=Markup(style),
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'",
    )
