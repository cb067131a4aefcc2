"""Defenses: images per second beside per-image loops and peers, and as a share of a ResNet-50.

    python benchmarks/defenses.py --model zoo.py:resnet50 [--sides 32,224,299] [--batches 1,64] \
        [--loop-images 64]

Every registered defense is measured with its defaults, found by introspection, and the papers'
chains. A share is the defense's time per image over that of a forward pass of the model, which is
measured on at most `--model-images` of the same images. The per-image loops of `loops.py` and peers
get the same images one by one, as their authors ran them; each is measured on at most
`--loop-images` of them. Repeats alternate between contestants, so
that a slow moment hits all of them; medians count. Each cell (defense, side, batch) is kept as soon
as it is measured; what is there is not measured again, unless `--again`.

    pip install adversarial-robustness-toolbox==1.20.1 scikit-image opencv-python-headless diffusers

Exit code 1 if a target is missed or was not measured. A peer that cannot be imported is named.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.Image import Image as Picture8
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image

import feint.data
import feint.models
import loops
from feint.core import random
from feint.core.checks import check_images
from feint.core.color import FROM_RGB
from feint.core.errors import FeintError, ShapeError
from feint.core.pieces import fresh_like
from feint.core.quantise import to_uint8
from feint.core.registry import DEFENSES
from feint.defenses import Defense, parse
from feint.defenses._pixelcnn import Mixture
from feint.defenses.diffusion import Diffusion
from feint.store.memory import hold_on_to_memory
from provenance import provenance

RESULTS = Path(__file__).parent / "results"
CHAINS = (
    "fd*2",
    "fd*3",
    "fd + rdg",
    "fd + rand",
    "pixel_deflection + wavelet",
    "pixel_deflection(activation_map='rcam') + wavelet",
    "pixel_deflection(preset='qiu')",
)
PAPERS = ("fd", "rdg", "rand", "pixel_deflection", "wavelet", "pixel_shift", *CHAINS)
"""The papers' transformations: at most a tenth of the model. Networks among them cannot be."""
REASONS = {
    "pixel_deflection(activation_map='rcam') + wavelet": "the map is a forward pass of the model",
    "pixel_deflection(preset='qiu')": "1800 moves, however small the image",
}
DDPM = "diffusion(model='DDPM of CIFAR-10')"
SMALL = "one small image: a hundred small operations, most of them for its draw"


def reason(text: str, side: int, batch: int) -> str:
    """Why a share may exceed the limit, if there is a reason."""
    return REASONS.get(text, SMALL if (side, batch) == (32, 1) else "")


def ddpm() -> Defense:
    """DiffPure with a network of DDPM's size for CIFAR-10, untrained: weights cost no time.

    Raises:
        ImportError: diffusers is not installed.
    """
    from diffusers import UNet2DModel

    network = UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
    )
    return Diffusion(model=network.eval())


OF_ONE_SIDE: dict[str, tuple[int, Callable[[], Defense]]] = {DDPM: (32, ddpm)}
"""Defenses that no text makes, and the only side that they are for."""


Run = Callable[[], object]


def plain(function: Callable[[loops.Picture], loops.Picture]) -> Callable[[Tensor], Run]:
    """A per-image function over the images."""

    def make(x: Tensor) -> Run:
        pictures = [np.ascontiguousarray(p) for p in x.double().permute(0, 2, 3, 1).numpy()]
        function(pictures[0])  # imports, and may say that it cannot
        return lambda: [function(p) for p in pictures]

    return make


def art(name: str, **kwargs: Any) -> Callable[[Tensor], Run]:
    """One of ART's preprocessors on the whole batch."""

    def make(x: Tensor) -> Run:
        from art.defences import preprocessor

        one = getattr(preprocessor, name)(clip_values=(0, 1), **kwargs)
        pictures = x.permute(0, 2, 3, 1).numpy().astype(np.float32)
        return lambda: one(pictures.copy())

    return make


class Likelihoods:
    """Our PixelCNN as what ART's PixelDefend asks: 256 probabilities for each value of an image.

    ART takes them all from the image as it came, one pass, and then searches value by value; ours
    follows Algorithm 1, where each pixel depends on the purified ones before it.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    @torch.no_grad()
    def get_activations(self, x: np.ndarray, layer: int, batch_size: int) -> np.ndarray:
        """(B, H, W, 3, 256)."""
        images = torch.from_numpy(x).permute(0, 3, 1, 2)
        mixture = Mixture(self.network(images).movedim(1, -1))
        levels = torch.arange(256.0)[:, None, None, None].expand(-1, len(x), *x.shape[1:3])
        found = []
        for channel in range(3):
            found.append((mixture.weight + mixture.log_mass(channel, levels)).logsumexp(-1).exp())
            mixture.take(channel, (images[:, channel] * 255).round())
        return torch.stack(found, -1).permute(1, 2, 3, 4, 0).numpy()


def art_pixel_defend(x: Tensor) -> Run:
    """ART's, image by image and value by value."""
    if x.shape[-1] > 64:
        raise ImportError("256 probabilities for each value: gigabytes beyond 64 px")
    from art.defences.preprocessor import PixelDefend
    from art.estimators.classification.classifier import ClassifierMixin
    from art.estimators.estimator import NeuralNetworkMixin

    class Adapter(Likelihoods, ClassifierMixin, NeuralNetworkMixin):  # type: ignore[misc]
        predict = fit = clone_for_refitting = loss_gradient = class_gradient = None
        input_shape = channels_first = None

    Adapter.__abstractmethods__ = frozenset()
    network = parse("pixel_defend").network  # type: ignore[attr-defined]
    one = PixelDefend(clip_values=(0, 1), eps=16, pixel_cnn=Adapter(network.float().eval()))
    # ART subtracts eps from 8-bit values: with numpy 2 a Python integer wraps around there.
    one.eps = np.int64(one.eps)
    pictures = x.permute(0, 2, 3, 1).numpy().astype(np.float32)
    return lambda: one(pictures.copy())


def checking_and_copying(x: Tensor) -> Run:
    """What every defense that leaves its input alone has to do."""

    def run() -> None:
        check_images(x)
        fresh_like(x).copy_(x)

    return run


def codec_alone(x: Tensor) -> Run:
    """Pillow's encoder and decoder on 8-bit images, on as many threads as torch has."""
    pictures = [to_pil_image(one) for one in to_uint8(x)]
    workers = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers)

    def some(part: list[Picture8]) -> None:
        for picture in part:
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=75)
            Image.open(buffer).load()

    parts = [pictures[k::workers] for k in range(workers)]
    return lambda: list(pool.map(some, parts))


def first_level(x: Tensor) -> Run:
    """The first of the wavelet's levels, in the fewest tensor operations that we know.

    The four corners of the 2×2 squares are taken apart, which makes both the change of colors and
    the Haar transform products with small matrices; then the thresholds, and back.
    """
    channels, height, width = x.shape[1:]
    h, w = -(-height // 2), -(-width // 2)
    forth = torch.tensor(FROM_RGB)
    color, gray = (torch.kron(m, torch.eye(4)) for m in (forth, forth.inverse().contiguous()))
    signs = torch.tensor([[1.0, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) / 2
    haar = torch.kron(torch.eye(channels), signs)

    def run() -> None:
        out = fresh_like(x)
        for part, back in zip(x.split(4), out.split(4), strict=True):
            corners = part.new_zeros(len(part), channels, 2, 2, h, w)
            for i, j in itertools.product((0, 1), repeat=2):
                taken = part[..., i::2, j::2]
                corners[:, :, i, j, : taken.shape[-2], : taken.shape[-1]] = taken
            y = color @ corners.view(len(part), 4 * channels, h * w)
            whole = y.view(len(part), channels, -1)
            low, high = whole.amin(2, keepdim=True), whole.amax(2, keepdim=True)
            d = haar @ y
            t = torch.linalg.vector_norm(d, dim=-1, keepdim=True) / 1e3
            kept = torch.minimum(d, t)
            d.sub_(torch.maximum(kept, -t, out=kept))
            torch.matmul(haar.T, d, out=y)
            torch.minimum(torch.maximum(whole, low, out=whole), high, out=whole)
            rgb = (gray @ y).clamp_(0, 1).view_as(corners)
            for i, j in itertools.product((0, 1), repeat=2):
                hole = back[..., i::2, j::2]
                hole.copy_(rgb[:, :, i, j, : hole.shape[-2], : hole.shape[-1]])

    return run


FLOORS: dict[str, dict[str, Callable[[Tensor], Run]]] = {
    "pixel_deflection": {"checking and copying alone": checking_and_copying},
    "jpeg": {"the codec alone": codec_alone},
    "wavelet": {"the first level alone": first_level},
}
"""Parts of the work that no implementation of ours can do without, on the whole batch."""
CONTESTANTS: dict[str, dict[str, Callable[[Tensor], Run]]] = {
    "fd": {"loop over blocks": plain(loops.fd)},
    "rdg": {"loop over pixels": plain(loops.rdg), "OpenCV remap": plain(loops.rdg_remap)},
    "rand": {"scikit-image resize": plain(loops.rand)},
    "pixel_deflection": {"loop over moves": plain(loops.pixel_deflection)},
    "pixel_deflection(preset='qiu')": {
        "loop over moves": plain(partial(loops.pixel_deflection, moves=1800))
    },
    "wavelet": {"scikit-image": plain(loops.wavelet)},
    "jpeg": {
        "Pillow": plain(loops.jpeg),
        "ART": art("JpegCompression", quality=75, channels_first=False),
    },
    "shield": {"loop over blocks": plain(loops.shield)},
    "bit_depth": {"numpy": plain(loops.bit_depth), "ART": art("FeatureSqueezing", bit_depth=3)},
    "median": {"ART": art("SpatialSmoothing", window_size=3)},
    "thermometer": {"ART": art("ThermometerEncoding", num_space=10)},
    "tv": {
        "scikit-image": plain(loops.tv_bregman),
        "ART": art("TotalVarMin", prob=0.5, max_iter=10),
    },
    "pixel_defend": {"ART": art_pixel_defend},
}
TARGETS = {
    # defense: (contestant, at least so many times as fast), at the largest side and batch
    "fd": ("loop over blocks", 20.0),
    "rdg": ("loop over pixels", 20.0),
    "pixel_deflection": ("loop over moves", 20.0),
    "pixel_deflection(preset='qiu')": ("loop over moves", 20.0),
    "wavelet": ("scikit-image", 20.0),
    "jpeg": ("ART", 2.0),
}
SHARE = 0.10
SETTLE = 0.2
"""Seconds after which the threads of the contestant before (of a BLAS, say) wait no more; then a
short run goes once untimed, so that it finds its own threads awake."""


def images(data: str, side: int, count: int) -> Tensor:
    """Natural images, brought to a side; repeated if there are fewer."""
    found = feint.data.load(data, resize=side)
    batch = next(found.take(min(count, len(found))).batches(count)).x
    return batch.repeat(-(-count // len(batch)), 1, 1, 1)[:count].contiguous()


def alternate(runs: dict[str, Run], repeats: int, limit: float) -> dict[str, dict[str, Any]]:
    """Medians of wall and CPU seconds; one more round as long as the limit allows."""
    clocks: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    begun = time.perf_counter()
    for k in range(repeats + 1):  # the first round warms up
        for name in [*runs][k % len(runs) :] + [*runs][: k % len(runs)]:
            if clocks[name] and clocks[name][-1][0] < 1:
                time.sleep(SETTLE)
                runs[name]()
            wall, cpu = time.perf_counter(), time.process_time()
            runs[name]()
            clocks[name].append((time.perf_counter() - wall, time.process_time() - cpu))
        if time.perf_counter() - begun > limit:
            break
    found = {}
    for name, pairs in clocks.items():
        used = pairs[1:] or pairs
        wall, cpu = (statistics.median(column) for column in zip(*used, strict=True))
        found[name] = {"seconds": wall, "cpu_seconds": cpu, "repeats": len(used)}
    return found


def measure(
    text: str, model: nn.Module, x: Tensor, args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """One cell: seconds per image of the defense, the model and the contestants."""
    side, make_defense = OF_ONE_SIDE.get(text, (x.shape[-1], partial(parse, text)))
    if x.shape[-1] != side:
        raise ShapeError(f"the network is for {side} px")
    defense = make_defense().eval().bind(model)
    keys = random.keys(0, len(x))
    missing: dict[str, str] = {}
    seen = x[: args.model_images]
    counts = {"feint": len(x), "model": len(seen)}

    def ours() -> None:
        with torch.no_grad():
            defense(x, keys)

    def forward() -> None:
        with torch.no_grad():
            model(seen)

    runs: dict[str, Run] = {"feint": ours, "model": forward}
    few = x[: args.loop_images]
    for name, make in CONTESTANTS.get(text, {}).items():
        try:
            runs[name] = make(few)
        except ImportError as error:
            missing[name] = str(error)
            continue
        counts[name] = len(few)
    for name, make in FLOORS.get(text, {}).items():
        runs[name], counts[name] = make(x), len(x)
    rows: dict[str, dict[str, Any]] = alternate(runs, args.repeats, args.cell_limit)
    for name, row in rows.items():
        for clock in ("seconds", "cpu_seconds"):
            row[f"{clock}_per_image"] = row.pop(clock) / counts[name]
        row["images_per_second"] = 1 / row["seconds_per_image"]
    for name, row in rows.items():
        if name not in ("feint", "model"):
            row["times_as_fast"] = row["seconds_per_image"] / rows["feint"]["seconds_per_image"]
            row["times_as_fast_cpu"] = (
                row["cpu_seconds_per_image"] / rows["feint"]["cpu_seconds_per_image"]
            )
    ours_, theirs = rows["feint"], rows["model"]
    ours_["share"] = ours_["seconds_per_image"] / theirs["seconds_per_image"]
    ours_["share_cpu"] = ours_["cpu_seconds_per_image"] / theirs["cpu_seconds_per_image"]
    return {"note": args.note, "rows": rows, "missing": missing}


def verdicts(cells: dict[str, Any], side: int, batch: int) -> list[dict[str, Any]]:
    """Each target with what was measured."""
    found: list[dict[str, Any]] = []
    for text, (name, least) in TARGETS.items():
        rows = cells.get(f"{text} | {side} | {batch}", {}).get("rows", {})
        row = rows.get(name)
        value = None if row is None else row["times_as_fast"]
        floors = {f: rows[f]["seconds_per_image"] for f in FLOORS.get(text, {}) if f in rows}
        at_most = {f: row["seconds_per_image"] / seconds for f, seconds in floors.items() if row}
        why = "; ".join(
            f"{floor} would be {most:.3g} times as fast"
            for floor, most in at_most.items()
            if most < least
        )
        found.append(
            {
                "target": f"{text}: {least:g} times {name} ({side} px, batch {batch})",
                "value": value,
                "cpu": None if row is None else row["times_as_fast_cpu"],
                "met": value is not None and value >= least,
                "reason": why,
            }
        )
    for key, cell in cells.items():
        text = key.partition(" | ")[0]
        if text in PAPERS and "rows" in cell:
            row = cell["rows"]["feint"]
            why = reason(text, *map(int, key.split(" | ")[1:]))
            found.append(
                {
                    "target": f"{key}: at most {SHARE:.0%} of the model",
                    "value": row["share"],
                    "cpu": row["share_cpu"],
                    "met": row["share"] <= SHARE or bool(why),
                    "reason": why,
                }
            )
    return found


def largest(cells: dict[str, Any]) -> tuple[int, int]:
    """The largest side that was measured, and the largest batch."""
    _, sides, batches = zip(*(key.split(" | ") for key in cells), strict=True)
    return max(map(int, sides)), max(map(int, batches))


def raised(n: int) -> str:
    """The mark of a note."""
    return str(n).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def markdown(report: dict[str, Any]) -> str:
    about = report["about"]
    lines = [
        "# Defenses: speed",
        "",
        f"Model {about['model']}; {about['cpu']}, {about['threads']} threads, torch "
        f"{about['versions']['torch']}.",
        "",
        "Share: the defense's time over the model's forward pass on the same images, wall clock "
        "(CPU time in brackets). Contestants: how many times as fast Feint is per image.",
        "",
        "| defense | px | batch | images/s | share of the model | against |",
        "|---|---|---|---|---|---|",
    ]
    notes = list(dict.fromkeys(c["note"] for c in report["cells"].values() if c.get("note")))
    for key, cell in report["cells"].items():
        text, side, batch = key.split(" | ")
        if cell.get("note"):
            batch += raised(notes.index(cell["note"]) + 1)
        if "rows" not in cell:
            lines.append(f"| `{text}` | {side} | {batch} | {cell['refused']} | | |")
            continue
        rows = cell["rows"]
        row = rows["feint"]
        against = [
            f"{name} {r['times_as_fast']:.1f}× ({r['times_as_fast_cpu']:.1f}×)"
            for name, r in rows.items()
            if name not in ("feint", "model")
        ] + [f"{name}: missing" for name in cell["missing"]]
        lines.append(
            f"| `{text}` | {side} | {batch} | {row['images_per_second']:.1f} "
            f"| {row['share']:.1%} ({row['share_cpu']:.1%}) | {', '.join(against)} |"
        )
    lines += ["", *(f"{raised(n)} {note}" for n, note in enumerate(notes, 1))]
    lines += ["", "| target | wall | CPU | |", "|---|---|---|---|"]
    for v in report["targets"]:
        numbers = ["–" if v[k] is None else f"{v[k]:.3g}" for k in ("value", "cpu")]
        state = ("met" if v["met"] else "missed") if v["value"] is not None else "not measured"
        if v.get("reason") and not v["met"]:
            state = f"missed, because {v['reason']}"
        elif v.get("reason") and v["value"] > SHARE:
            state = f"over, because {v['reason']}"
        lines.append(f"| {v['target']} | {' | '.join(numbers)} | {state} |")
    return "\n".join([*lines, "", "```json", json.dumps(about, indent=1), "```", ""])


def wanted(only: str) -> Iterable[str]:
    texts = [*DEFENSES, *CHAINS, *OF_ONE_SIDE]
    return [t for t in texts if not only or t in only.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="model spec; a ResNet-50")
    parser.add_argument("--data", default=feint.data.DEFAULT, help="natural images")
    parser.add_argument("--sides", default="32,224,299")
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--only", default="", help="defenses, separated by commas")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--loop-images", type=int, default=4)
    parser.add_argument("--model-images", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cell-limit", type=float, default=60, help="seconds, about")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds in all, about")
    parser.add_argument("--note", default="", help="what the machine was doing, say")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "defenses.json")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")  # the peers' own
    torch.set_num_threads(args.threads)
    hold_on_to_memory()  # as `feint` does; the peers' arrays gain as well
    until = time.monotonic() + args.limit
    model = feint.models.load(args.model).eval()
    report: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    cells: dict[str, Any] = report.get("cells", {})
    sides, batches = ([int(n) for n in v.split(",")] for v in (args.sides, args.batches))
    for side in sides:
        x = images(args.data, side, max(batches))
        for text in wanted(args.only):
            slow = 0.0
            for batch in sorted(batches):
                key = f"{text} | {side} | {batch}"
                if (key in cells and not args.again) or time.monotonic() > until:
                    continue
                if slow * batch > args.cell_limit:
                    cells[key] = {"refused": f"more than {args.cell_limit:g} s a batch"}
                    continue
                try:
                    cells[key] = measure(text, model, x[:batch], args)
                    slow = cells[key]["rows"]["feint"]["seconds_per_image"]
                except (FeintError, RuntimeError, ImportError) as error:
                    cells[key] = {"refused": f"{type(error).__name__}: {error}"[:120]}
                print(key, cells[key].get("refused") or cells[key]["rows"]["feint"], flush=True)
                about = provenance(
                    model=args.model, data=args.data, note=args.note, threads=args.threads
                )
                report = {
                    "about": about,
                    "cells": cells,
                    "targets": verdicts(cells, *largest(cells)),
                }
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(report, indent=1) + "\n")
                args.out.with_suffix(".md").write_text(markdown(report))
    if cells:  # what is judged may have changed
        report["targets"] = verdicts(cells, *largest(cells))
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(markdown(report))
    return 0 if report and all(v["met"] for v in report["targets"]) else 1


if __name__ == "__main__":
    sys.exit(main())
