"""Metrics of S4: masked attacks, one example with its probabilities, what defenses do to images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.errors import ConfigError, RangeError
from feint.core.losses import adversarial
from feint.core.quantise import quantise
from feint.defenses import PRM, Defense
from feint.diagnostics import blend_curve, heatmap, input_gradients
from feint.diagnostics._common import logits_of
from feint.diagnostics.numbers import Measured, Number, array, exact, mean, rate
from feint.evaluation.scenarios import get_scenario
from feint.recipes.measures import partial_attack
from feint.recipes.metrics import Case, metric

__all__: list[str] = []


@metric("masked attack", models=True)
def _masked(case: Case) -> Measured:
    """S4's image 3: accuracy if the attack stays only on a share of the pixels.

    Fields: `attack`; `shares`, all that are looked at; `share`, the point's; `end`, `bottom` or
    `top` of the pixels by the mean size of their gradient.
    """
    fields, lab = case.fields, case.lab
    shares = [float(s) for s in fields["shares"]]

    def make() -> Measured:
        x, y, index = lab.images(fields)
        keys, size = random.keys(lab.seed, index), lab.batch_size
        pipeline = lab.pipeline(fields)
        view, attack = pipeline.view(), partial_attack(str(fields["attack"]))
        score = heatmap(input_gradients(view, x, y, seed=keys, batch_size=size), reduce="mean")
        rows = [slice(i, i + size) for i in range(0, len(x), size)]
        x_adv = torch.cat([attack(view, x[r], y[r], seed=keys[r]) for r in rows])
        judge_keys = random.fold(keys, "judge")
        found = blend_curve(
            pipeline, x, y, x_adv, score, shares=shares, seed=judge_keys, batch_size=size
        )
        numbers = {}
        for end, right in (("bottom", found.bottom), ("top", found.top)):
            for share, row in zip(shares, right, strict=True):
                numbers[f"{end} {share}"] = rate(row)
        gap = (found.bottom.double() - found.top.double()).mean(0)
        numbers["gap"] = mean(gap, (-1.0, 1.0))
        return Measured({"score": array(score)}, numbers)

    found = lab.keep("masked attack", fields, ("model", "defense", "attack", "shares"), make)
    name = f"{fields['end']} {float(fields['share'])}"
    if name not in found.numbers:
        raise ConfigError(f"there is no {name!r}; there are {', '.join(found.numbers)}")
    return Measured(found.arrays, {"gap": found.numbers["gap"], "value": found.numbers[name]})


@metric("one example", models=True)
def _one(case: Case) -> Measured:
    """An image that is right, and what an attack makes of it.

    The number is the probability of the new class. Fields: `attack`; `scenario`; `picture`, the one
    of this number among the images that are right and that the attack turns, rounded to 8 bits.
    """
    fields, lab = case.fields, case.lab

    def make() -> Measured:
        x, y, index = lab.images(fields)
        keys, size = random.keys(lab.seed, index), lab.batch_size
        pipeline = lab.pipeline(fields)
        through = get_scenario(str(fields["scenario"])).attacked == "pipeline"
        target = pipeline.view() if through else lab.model(str(fields["model"]))
        attack = partial_attack(str(fields["attack"]))
        rows = [slice(i, i + size) for i in range(0, len(x), size)]
        x_adv = quantise(torch.cat([attack(target, x[r], y[r], seed=keys[r]) for r in rows]))
        before, after = (
            logits_of(pipeline, images, random.fold(keys, "judge"), size) for images in (x, x_adv)
        )
        turned = (~adversarial(before, y) & adversarial(after, y)).nonzero().flatten()
        number = int(fields.get("picture", 0))
        if number >= len(turned):
            raise RangeError(
                f"the attack turns {len(turned)} images; there is no number {number}; take more "
                "with --samples"
            )
        i = turned[number]
        sure, unsure = before[i].softmax(0), after[i].softmax(0)
        new = int(after[i].argmax())
        return Measured(
            {
                "clean": array(x[i]),
                "attacked": array(x_adv[i]),
                "classes": np.array([int(y[i]), new]),
                "confidence": np.array([float(sure[y[i]]), float(unsure[new])]),
            },
            {"value": exact(float(unsure[new]))},
        )

    used = ("model", "defense", "attack", "scenario", "picture")
    return lab.keep("one example", fields, used, make)


@metric("random views", models=True)
def _views(case: Case) -> Measured:
    """Several draws of a random defense on one image.

    The number is the accuracy over all images and draws. Fields: `draws`, how many; `picture`,
    which image.
    """
    fields, lab = case.fields, case.lab

    def make() -> Measured:
        x, y, index = lab.images(fields)
        keys, count = random.keys(lab.seed, index), int(fields.get("draws", 4))
        pipeline = lab.pipeline(fields)
        if pipeline.defense is None:
            raise ConfigError("the field 'defense' is none; expected a random one")
        which = int(fields.get("picture", 0))
        bound, seen, right = pipeline.defense.bind(pipeline.model), [], []
        for draw in range(count):
            own = random.fold(keys, "view", draw)
            with torch.no_grad():
                seen.append(bound(x[which : which + 1], keys=own[which : which + 1])[0])
            right.append(~adversarial(logits_of(pipeline, x, own, lab.batch_size), y))
        shares = torch.stack(right).double().mean(0)
        arrays = {"clean": array(x[which]), "seen": array(torch.stack(seen))}
        return Measured(arrays, {"value": mean(shares, (0.0, 1.0))})

    return lab.keep("random views", fields, ("model", "defense", "draws", "picture"), make)


def _prm(defense: Defense | None) -> PRM:
    if not isinstance(defense, PRM):
        raise ConfigError(f"the defense is {defense}; expected prm(…) alone")
    return defense


def stages(network: nn.Module, x: Tensor) -> list[tuple[str, tuple[int, ...]]]:
    """Names and output shapes (C, H, W) of the parts of a UNet, in the order in which they run."""
    found: list[tuple[str, tuple[int, ...]]] = []
    parts = [(n, m) for n, m in network.named_modules() if n.count(".") == n.startswith(("d", "u"))]
    hooks = [
        module.register_forward_hook(
            lambda _, __, out, name=name: found.append((name, tuple(out.shape[1:])))  # type: ignore[misc]
        )
        for name, module in parts
        if name and not isinstance(module, nn.ModuleList)
    ]
    try:
        with torch.no_grad():
            network(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@metric("prm stages", models=True)
def _stages(case: Case) -> Measured:
    """What each step of a PRM makes of an image, and the shapes inside of its network.

    The number is the share of the pixels that the first layer reads.
    """
    fields, lab = case.fields, case.lab

    def make() -> Measured:
        x, _, index = lab.images(fields)
        keys = random.keys(lab.seed, index)[:1]
        prm, x = _prm(lab.defense(str(fields["defense"]))), x[:1]
        params = prm.draw(keys, x.shape)
        params = {"choice": params["choice"] * 0 + int(fields.get("choice", 0))}
        height, width = int(x.shape[-2]), int(x.shape[-1])
        connected = prm.connected(height, width)[0, 0]
        with torch.no_grad():
            shifted = prm.identity(x, params)
            made = prm.learn(shifted, params)
            out = prm.transform(x, params)
        parts = stages(prm.network, x)
        return Measured(
            {
                "image": array(x[0]),
                "shifted": array(shifted[0]),
                "connected": array(connected),
                "made": array(made[0]),
                "out": array(out[0]),
                "names": np.array([name for name, _ in parts]),
                "shapes": np.array([shape for _, shape in parts]),
                "lam": np.array(prm.lams),
                "shifts": np.array(prm.shifts),
            },
            {"value": Number(float(connected.double().mean()))},
        )

    return lab.keep("prm stages", fields, ("defense", "choice"), make)
