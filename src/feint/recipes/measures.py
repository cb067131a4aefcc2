"""Metrics that need the models themselves: what a diagnosis or the properties of S1 §IV tell."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from feint.core import random
from feint.core.errors import ConfigError
from feint.diagnostics import Options, Subject, diagnose, gradient_overlap, masked_attack
from feint.diagnostics.numbers import Measured, Number, rate
from feint.evaluation.attackers import parse_attack
from feint.evaluation.properties import properties
from feint.recipes.lab import Lab
from feint.recipes.metrics import Case, metric
from feint.training.recipe import parse_fraction

__all__: list[str] = []


def _subject(lab: Lab, name: str, model: str, defense: str) -> Subject:
    pipeline = lab.pipeline({"model": model, "defense": defense})
    return Subject(name, lab.model(model), pipeline, pipeline.view())


@metric("diagnosis", share=False, models=True)
def _diagnosis(case: Case) -> Measured:
    """A number of one measure of `feint diagnose`: fields `measure`, `number` and `options`.

    `peers` maps names to model specs or to {model, defense}: further subjects, which some measures
    compare with.
    """
    fields, lab = case.fields, case.lab
    name = str(fields["measure"])
    used = ("model", "defense", "options", "peers", "attack")

    def make() -> Measured:
        x, y, index = lab.images(fields)
        given = {k: parse_fraction(v) for k, v in dict(fields.get("options", {})).items()}
        attack = fields.get("attack")
        if attack is not None:
            given["attack"] = partial_attack(str(attack))
        options = Options(**{"seed": lab.seed, "batch_size": lab.batch_size, **given})
        subjects = [_subject(lab, "this", str(fields["model"]), str(fields.get("defense", "none")))]
        for peer, what in dict(fields.get("peers", {})).items():
            own = {"model": what} if isinstance(what, str) else dict(what)
            subjects.append(_subject(lab, peer, own["model"], str(own.get("defense", "none"))))
        found = diagnose(subjects, x, y, measures=[name], options=options, index=index)
        return found.results[name]["this"]

    found = lab.keep(f"diagnosis {name}", fields, used, make)
    return _pick(found, fields.get("number"))


def partial_attack(text: str) -> Any:
    """An attack expression as a function of model, images and labels."""
    chosen = parse_attack(text)
    return partial(chosen.info.component, **chosen.kwargs)


def _value(number: Number) -> float:
    return number.value or 0.0


def _pick(found: Measured, name: object) -> Measured:
    if name is None:
        return Measured(found.arrays, {"value": Number(None), **found.numbers})
    if name == "max of all":
        most = max((n for n in found.numbers.values() if n.value is not None), key=_value)
        return Measured(found.arrays, {**found.numbers, "value": most})
    if name not in found.numbers:
        raise ConfigError(f"there is no number {name!r}; there are {', '.join(found.numbers)}")
    return Measured(found.arrays, {**found.numbers, "value": found.numbers[str(name)]})


@metric("accuracy, confined", models=True)
def _confined(case: Case) -> Measured:
    """S0 Table 1: accuracy after an attack that may touch only the pixels of G(p), by Ω.

    Fields: `attack`, `p`; the attack is white-box.
    """
    fields, lab = case.fields, case.lab

    def make() -> Measured:
        x, y, index = lab.images(fields)
        pipeline = lab.pipeline(fields)
        bare = lab.model(str(fields["model"]))
        shape = (int(x.shape[1]), int(x.shape[2]), int(x.shape[3]))
        omega = gradient_overlap(bare, shape)
        found = masked_attack(
            pipeline.view(),
            x,
            y,
            omega,
            shares=[float(fields["p"])],
            attack=partial_attack(str(fields["attack"])),
            judge=pipeline,
            order=("top",),
            seed=random.keys(lab.seed, index),
            batch_size=lab.batch_size,
        )
        return Measured({"right": found.top[0].cpu().numpy()}, {"value": rate(found.top[0])})

    return lab.keep("accuracy, confined", fields, ("model", "defense", "attack", "p"), make)


def _properties(case: Case) -> Measured:
    fields, lab = case.fields, case.lab

    def make() -> Measured:
        x, y, index = lab.images(fields)
        defense = lab.defense(str(fields["defense"]))
        if defense is None:
            raise ConfigError("properties are those of a defense; the field 'defense' is none")
        draws, probed = int(fields.get("draws", 8)), int(fields.get("probed", 4))
        last = index.sort().values[:probed].max()  # `properties` probes by index
        found = properties(
            defense, lab.model(str(fields["model"])), x, y,
            draws=draws, probed=int(last) + 1, seed=lab.seed, index=index,
            batch_size=min(lab.batch_size, 16),
        )  # fmt: skip
        numbers = {
            name: Number(m.value, m.n, m.low, m.high)
            for name, m in (
                ("rms", found.rms), ("ssim", found.ssim), ("spread", found.spread),
                ("accuracy", found.accuracy), ("clean", found.clean),
                ("agreement", found.agreement),
            )
        }  # fmt: skip
        return Measured({}, numbers)

    return lab.keep("properties", fields, ("model", "defense", "draws", "probed"), make)


@metric("property", share=False, models=True)
def _property(case: Case) -> Measured:
    """A property of a defense by S1 §IV: field `number`, such as rms or ssim."""
    return _pick(_properties(case), case.fields["number"])


@metric("example images", share=False, models=True)
def _examples(case: Case) -> Measured:
    """Images for a figure: clean, attacked, their difference, and what the defense makes of them.

    Fields: `attack` and `scenario` (gray-box or white-box) if there is one; `shown` images.
    """
    fields, lab = case.fields, case.lab

    def make() -> Measured:
        x, y, index = lab.images(fields)
        count = int(fields.get("shown", 4))
        x, y, keys = x[:count], y[:count], random.keys(lab.seed, index[:count])
        pipeline = lab.pipeline(fields)
        attack, x_adv = fields.get("attack", "none"), x
        if attack != "none":
            white = fields.get("scenario") == "white-box"
            target = pipeline.view() if white else lab.model(str(fields["model"]))
            x_adv = partial_attack(str(attack))(target, x, y, seed=keys)
        seen = x_adv
        if pipeline.defense is not None:
            with torch.no_grad():
                bound = pipeline.defense.bind(pipeline.model)
                seen = bound(x_adv, keys=random.fold(keys, "shown"))
        with torch.no_grad():
            said = pipeline(x_adv, keys=random.fold(keys, "shown")).argmax(1)
        return Measured(
            {
                "clean": x.cpu().numpy(),
                "attacked": x_adv.cpu().numpy(),
                "seen": seen.cpu().numpy(),
                "said": said.cpu().numpy(),
                "label": y.cpu().numpy(),
            },
            {"value": Number(float((x_adv - x).double().pow(2).mean().sqrt()), len(x))},
        )

    used = ("model", "defense", "attack", "scenario", "shown")
    return lab.keep("example images", fields, used, make)
