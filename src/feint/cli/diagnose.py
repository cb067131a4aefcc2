"""`feint diagnose`: where gradients and perturbations go, as numbers, arrays and figures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from torch import Tensor, nn

from feint.cli import common
from feint.core.errors import ConfigError, RangeError, UnknownNameError
from feint.core.gradients import eot, is_stochastic
from feint.data import DEFAULT, load
from feint.defenses import parse
from feint.diagnostics import MEASURES, Options, Subject
from feint.diagnostics import diagnose as run
from feint.diagnostics.masked import Attack
from feint.diagnostics.overlap import OVERLAP_PRESETS
from feint.evaluation.attackers import parse_attack
from feint.evaluation.pipeline import Pipeline
from feint.models import check_model, resolve
from feint.reports.diagnostics import table, write
from feint.store.files import claim

__all__ = ["diagnose"]

MODELS = ("bundled:cifar10-resnet20", "bundled:cifar10-resnet20-ace100")
SAMPLES = 24
_INPUT, _WHAT, _WORK = "Models and data", "What to measure", "How to go about it"


def diagnose(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Model; may be given several times. Without it, the bundled plain and ACE λ=100 "
            "models are compared.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            help="Data: bundled:NAME, cifar10, imagefolder:DIR, images.csv, arrays.npz.",
            rich_help_panel=_INPUT,
        ),
    ] = DEFAULT,
    defense: Annotated[
        str,
        typer.Option(
            help="Defense; every model is then shown without and with it.", rich_help_panel=_INPUT
        ),
    ] = "none",
    samples: Annotated[
        int | None,
        typer.Option("--samples", "-n", help="Images; 24 by default.", rich_help_panel=_INPUT),
    ] = None,
    split: Annotated[str, typer.Option(help="test or train.", rich_help_panel=_INPUT)] = "test",
    resize: Annotated[
        int | None,
        typer.Option(help="Bring every image to this side first.", rich_help_panel=_INPUT),
    ] = None,
    input_size: Annotated[
        int | None,
        typer.Option(
            help="Let the models resize their input to this side.", rich_help_panel=_INPUT
        ),
    ] = None,
    arch: Annotated[
        str | None, typer.Option(help="Architecture of a checkpoint.", rich_help_panel=_INPUT)
    ] = None,
    trust: Annotated[
        bool,
        typer.Option("--trust", help="Open pickles and TorchScript.", rich_help_panel=_INPUT),
    ] = False,
    measure: Annotated[
        str,
        typer.Option(
            help=f"Separated by commas: {', '.join(MEASURES)}; or all.", rich_help_panel=_WHAT
        ),
    ] = "all",
    attack: Annotated[
        str | None,
        typer.Option(
            help="Attack behind perturbations; by default 20 steps along the normalised gradient.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    eps: Annotated[
        str, typer.Option(help="Its linf budget, such as 8/255.", rich_help_panel=_WHAT)
    ] = "8/255",
    share: Annotated[float, typer.Option(help="p of G(p).", rich_help_panel=_WHAT)] = 0.3,
    overlap: Annotated[
        str,
        typer.Option(
            help="How Ω counts: repo (S0's Table 2) or paper (its App. C; leaves activations out).",
            rich_help_panel=_WHAT,
        ),
    ] = "repo",
    stride: Annotated[
        int, typer.Option(help="Of C, for models without ACE.", rich_help_panel=_WHAT)
    ] = 2,
    pixel_images: Annotated[
        int, typer.Option(help="Images for p_attack.", rich_help_panel=_WHAT)
    ] = 6,
    window: Annotated[
        int | None,
        typer.Option(
            help="Side of the middle of the image that p_attack tries; all of a small image.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    points: Annotated[
        int, typer.Option(help="Points along an axis of a label map, odd.", rich_help_panel=_WHAT)
    ] = 25,
    seed: Annotated[int, typer.Option(help="Seed of every draw.", rich_help_panel=_WORK)] = 0,
    batch_size: Annotated[int, typer.Option(help="Images per pass.", rich_help_panel=_WORK)] = 128,
    device: Annotated[str, typer.Option(help="cpu, cuda …", rich_help_panel=_WORK)] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", rich_help_panel=_WORK)] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for arrays, figures and page.", rich_help_panel=_WORK)
    ] = Path("diagnosis"),
    as_json: common.Json = False,
) -> None:
    """Show where gradients and perturbations go: maps, masks, label planes, similarities.

    Exit codes: 0 done, 2 bad input, 130 interrupted.
    """
    begun = time.perf_counter()
    with common.guard():
        common.set_threads(threads)
        wanted = None if measure == "all" else [m.strip() for m in measure.split(",")]
        options = Options(
            seed=seed,
            eps=common.number(eps),
            attack=None if attack is None else _attack(attack, common.number(eps)),
            share=share,
            overlap=overlap,
            stride=stride,
            pixel_images=pixel_images,
            window=window,
            points=points,
            batch_size=batch_size,
        )
        _check(options)
        available = load(data, split=split, resize=resize).available
        count = min(SAMPLES, available) if samples is None else samples
        chosen = load(data, split=split, resize=resize, samples=count)
        batch = next(chosen.batches(len(chosen)))
        x, y = batch.x.to(device), batch.y.to(device)
        subjects: list[Subject] = []
        notes: list[str] = []
        for spec in dict.fromkeys(model or MODELS):
            own = arch if spec.endswith((".safetensors", ".pt", ".pth")) else None
            found = resolve(spec, arch=own, trust=trust, device=device, input_size=input_size)
            chosen.check_classes(int(check_model(found.model, x[:2]).shape[1]))
            size = getattr(found.model, "size", None)
            if size is not None and tuple(size) != chosen.shape[1:]:
                notes.append(
                    f"{spec} resizes {chosen.shape[1]}×{chosen.shape[2]} to {size[0]}×{size[1]} "
                    "inside, which blurs pixel patterns; --resize brings the images to its size"
                )
            subjects += _subjects(spec, found.model, defense, device)
        with claim(out), common.progress(not as_json) as bar:
            total = len(subjects) * (len(MEASURES) if wanted is None else len(set(wanted)))
            task = bar.add_task("starting", total=total, rate="")

            def show(name: str, subject: str) -> None:
                bar.update(task, advance=1, description=escape(f"{name} {subject}"[-44:]))

            result = run(
                subjects, x, y, measures=wanted, options=options, index=batch.index, on_measure=show
            )
            facts = _facts(subjects, str(chosen), defense, attack, options)
            written = write(
                result,
                out,
                title="Feint diagnosis",
                facts=facts,
                notes=notes,
                classes=chosen.classes or (),
            )
        if as_json:
            common.print_json(
                {
                    "models": [s.name for s in subjects],
                    "data": str(chosen),
                    "n": result.n,
                    "out": str(out),
                    "html": str(written.html),
                    "arrays": [str(p) for p in written.arrays],
                    "figures": [str(p) for p in written.figures],
                    "numbers": result.as_dict(),
                    "notes": notes,
                    "seconds": round(time.perf_counter() - begun, 2),
                }
            )
            return
        common.out.print(table(result))
        for note in notes:
            common.out.print(f"note: {escape(note)}", soft_wrap=True)
        common.out.print(f"page: {escape(str(written.html))}", soft_wrap=True)


def _subjects(spec: str, model: nn.Module, defense: str, device: str) -> list[Subject]:
    """The bare classifier and, if there is a defense, the defended one."""
    bare = Pipeline(model)
    found = [Subject(spec, model, bare, bare.view())]
    if defense.strip() not in ("", "none"):
        built = parse(defense).to(device).eval()
        deployed = Pipeline(model, built)
        found.append(Subject(f"{spec} + {built}", model, deployed, deployed.view()))
    return found


def _attack(text: str, eps: float) -> Attack:
    """The attack as typed, with the budget where it takes one, and EOT where the view is random."""
    typed = parse_attack(text)
    parameters = typed.info.parameters
    kwargs: dict[str, Any] = dict(typed.kwargs)
    if "eps" in parameters and not typed.fixes("eps"):
        kwargs["eps"] = eps

    def bound(model: nn.Module, x: Tensor, y: Tensor, **more: Any) -> Tensor:
        own = dict(kwargs)
        if is_stochastic(model) and "gradient" in parameters and not typed.fixes("gradient"):
            own["gradient"] = eot(8)
        return typed.info.component(model, x, y, **own, **more)  # type: ignore[no-any-return]

    return bound


def _check(options: Options) -> None:
    """Refuse numbers that no measure can use, before anything is computed."""
    if not 0 < options.share < 1:
        raise RangeError(f"--share is {options.share:g}; expected a fraction between 0 and 1")
    if options.overlap not in OVERLAP_PRESETS:
        raise UnknownNameError("--overlap preset", options.overlap, OVERLAP_PRESETS)
    if options.points < 3 or options.points % 2 == 0:
        raise RangeError(f"--points is {options.points}; expected an odd number of at least 3")
    for name, value in (
        ("--stride", options.stride),
        ("--pixel-images", options.pixel_images),
        ("--batch-size", options.batch_size),
    ):
        if value < 1:
            raise RangeError(f"{name} is {value}; expected at least 1")
    if not 0 < options.eps <= 1:
        raise ConfigError(
            f"--eps is {options.eps:g}; images are in [0, 1]; expected above 0 and at most 1, "
            "such as 8/255"
        )


def _facts(
    subjects: Sequence[Subject], data: str, defense: str, attack: str | None, options: Options
) -> dict[str, str]:
    return {
        "models": ", ".join(s.name for s in subjects),
        "data": data,
        "defense": defense,
        "attack": attack or "PGD, 20 steps along the l2-normalised gradient, clipped to linf",
        "eps": f"{255 * options.eps:g}/255",
        "seed": str(options.seed),
        "G(p)": f"p = {options.share:g}",
        "Ω": f"preset {options.overlap}",
        "P_attack": f"{options.pixel_images} images",
        "label maps": f"{options.points}×{options.points} points",
    }
