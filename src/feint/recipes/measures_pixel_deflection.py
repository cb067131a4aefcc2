"""What S2 needs: votes, class probabilities, perturbation maps and activation maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from feint.core import random
from feint.core.errors import ConfigError, RangeError
from feint.core.gradients import call
from feint.defenses import parse
from feint.defenses.activation import ActivationMap
from feint.diagnostics import class_ranks, perturbation_map
from feint.diagnostics.numbers import Measured, Number, mean
from feint.diagnostics.numbers import rate as number_rate
from feint.evaluation.metrics import Rate, rate
from feint.recipes.lab import Lab
from feint.recipes.measures import _pick, partial_attack
from feint.recipes.metrics import METRICS, Case, metric

__all__ = ["half_of", "similarity"]


@metric("majority of the right", ask=METRICS["accuracy of the right"].ask)
def _majority_of_the_right(case: Case) -> Rate:
    """S2's Ens: share that the majority of the judge's draws gets right, of images right bare."""
    right = case.shares("clean") > 0.5
    if not right.any():
        raise RangeError("the bare classifier gets no clean image right; there is nothing to count")
    won = [r.rows["prediction"] == r.rows["label"] for r in case.cells["attacked"]]
    return rate(np.min(np.stack(won).astype(float), 0)[right])


def _batches(lab: Lab, function: Any, *tensors: Tensor) -> Tensor:
    size = lab.batch_size
    return torch.cat(
        [function(*(t[i : i + size] for t in tensors)) for i in range(0, len(tensors[0]), size)]
    )


def _logits(lab: Lab, model: Any, x: Tensor, keys: Tensor) -> Tensor:
    with torch.no_grad():
        return _batches(lab, lambda a, k: call(model, a, k), x, keys)


def _crafted(
    lab: Lab, fields: Mapping[str, Any], attack: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clean images that the bare classifier gets right, the attacked ones, labels and keys."""
    model = lab.model(str(fields["model"]))
    x, y, index = lab.images(fields)
    keys = random.keys(lab.seed, index)

    def make() -> Measured:
        right = _logits(lab, model, x, keys).argmax(1) == y
        run = partial_attack(attack)
        found = x.clone()
        if bool(right.any()):
            kept = random.fold(keys[right], "attack")
            found[right] = _batches(
                lab, lambda a, b, k: run(model, a, b, seed=k), x[right], y[right], kept
            )
        return Measured({"found": found.cpu().numpy(), "right": right.cpu().numpy()}, {})

    held = lab.keep("crafted", {**fields, "attack": attack}, ("model", "attack"), make)
    right = torch.from_numpy(np.asarray(held.arrays["right"])).to(x.device)
    if not bool(right.any()):
        raise RangeError(
            "the bare classifier gets no clean image right; there is nothing to attack"
        )
    found = torch.from_numpy(np.asarray(held.arrays["found"])).to(x.device)
    return x[right], found[right], y[right], keys[right]


# --- Figure 1 -------------------------------------------------------------------------------------


@metric("deflection", share=False, models=True)
def _deflection(case: Case) -> Measured:
    """S2 Fig. 1: rms between clean and deflected images; the first one as arrays.

    Fields: `defense` (the deflection), `denoiser`, `number` (`deflected` or `denoised`).
    """
    fields, lab = case.fields, case.lab

    def make() -> Measured:
        x, _, index = lab.images(fields)
        keys = random.keys(lab.seed, index)
        model = lab.model(str(fields["model"]))
        with torch.no_grad():
            moved = parse(str(fields["defense"])).to(lab.device).bind(model)(x, keys)
            clean = parse(str(fields["denoiser"])).to(lab.device)(moved, keys)
        far = [(z - x).double().square().mean((1, 2, 3)).sqrt().cpu() for z in (moved, clean)]
        return Measured(
            {
                "clean": x[0].cpu().numpy(),
                "deflected": moved[0].cpu().numpy(),
                "denoised": clean[0].cpu().numpy(),
            },
            {"deflected": mean(far[0], (0.0, np.inf)), "denoised": mean(far[1], (0.0, np.inf))},
        )

    found = lab.keep("deflection", fields, ("model", "defense", "denoiser"), make)
    return _pick(found, fields["number"])


# --- Figure 2 -------------------------------------------------------------------------------------


@metric("class probability", models=True)
def _probability(case: Case) -> Measured:
    """S2 Fig. 2: mean probability of a class behind the defense, over images that fell.

    Fields: `attack`; `image` (clean or adversarial); `of` (true, or adversarial: what the attacked
    image is taken for); `defense`; `draws`.
    """
    fields, lab = case.fields, case.lab

    def make() -> Measured:
        x, x_adv, y, keys = _crafted(lab, fields, str(fields["attack"]))
        model = lab.model(str(fields["model"]))
        said = _logits(lab, model, x_adv, keys).argmax(1)
        fell = said != y
        names = ("clean true", "clean adversarial", "adversarial true", "adversarial adversarial")
        if not bool(fell.any()):
            return Measured({}, {name: Number(None, 0) for name in names})
        pipeline = lab.pipeline(fields)
        draws = int(fields.get("draws", 4)) if pipeline.stochastic else 1
        numbers = {}
        for image, points in (("clean", x[fell]), ("adversarial", x_adv[fell])):
            total = torch.zeros(len(points), 2, dtype=torch.float64, device=points.device)
            for d in range(draws):
                own = random.fold(keys[fell], "shown", d)
                shares = _logits(lab, pipeline, points, own).softmax(1).double()
                both = torch.stack([y[fell], said[fell]], 1)
                total += shares.gather(1, both) / draws
            for place, name in enumerate(("true", "adversarial")):
                numbers[f"{image} {name}"] = mean(total[:, place].cpu(), (0.0, 1.0))
        return Measured({}, numbers)

    used = ("model", "defense", "attack", "draws")
    return _pick(
        lab.keep("class probability", fields, used, make), f"{fields['image']} {fields['of']}"
    )


# --- Figure 3 -------------------------------------------------------------------------------------


def half_of(weights: Tensor, guide: Tensor) -> Tensor:
    """Share of the weights on the half of the places where the guide is largest.

    Args:
        weights: (B, H, W), not negative.
        guide: (B, H, W).

    Returns:
        (B,) float64, 0.5 where the two have nothing to do with each other; NaN where all weights
        are 0. Of places with equal guide the first ones count.
    """
    flat, order = (
        weights.flatten(1).double(),
        guide.flatten(1).argsort(dim=1, descending=True, stable=True),
    )
    upper = flat.gather(1, order[:, : flat.shape[1] // 2]).sum(1)
    whole = flat.sum(1)
    return torch.where(whole > 0, upper / whole.clamp_min(1e-300), torch.nan)


@metric("perturbation on the object", models=True)
def _on_the_object(case: Case) -> Measured:
    """S2 Fig. 3: share of a perturbation on that half of the image where the object is seen.

    The object is where the class activation map of the clean image is largest. Field `attack`;
    `none` is the object's map itself. Array `map`: the mean over the images, each scaled to sum 1.
    """
    fields, lab = case.fields, case.lab

    def make() -> Measured:
        attack = str(fields["attack"])
        every = attack == "none"
        x, x_adv, _, _ = _crafted(lab, fields, str(fields["usual"]) if every else attack)
        maps = _batches(lab, ActivationMap(lab.model(str(fields["model"])), top=1), x)[:, 0]
        weights = maps if every else (x_adv - x).abs().sum(1)
        if every:
            whole = maps.double().sum((1, 2), keepdim=True).clamp_min(1e-300)
            drawn = (maps.double() / whole).mean(0)
        else:
            drawn = perturbation_map(x, x_adv, weigh="place")
        share = half_of(weights, maps)
        return Measured(
            {"map": drawn.float().cpu().numpy()}, {"value": mean(share.cpu(), (0.0, 1.0))}
        )

    found: Measured = lab.keep("perturbation on the object", fields, ("model", "attack"), make)
    return found


# --- Figures 4 and 7 ------------------------------------------------------------------------------


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Correlation over places of two maps (B, H, W); NaN where one is constant."""
    a, b = (t.flatten(1).double() - t.flatten(1).double().mean(1, keepdim=True) for t in (a, b))
    size = (a.square().sum(1) * b.square().sum(1)).sqrt()
    return torch.where(size > 0, (a * b).sum(1) / size.clamp_min(1e-300), torch.nan)


@metric("activation map kept", share=False, models=True)
def _kept_map(case: Case) -> Measured:
    """S2 Figs. 4 and 7: correlation of an activation map with that of the attacked image.

    Fields: `attack`; `top`, the number of classes (1 is CAM, 5 is R-CAM). Over images that fell.
    Arrays: the first of them, and their maps.
    """
    fields, lab = case.fields, case.lab

    def make() -> Measured:
        x, x_adv, y, keys = _crafted(lab, fields, str(fields["attack"]))
        model = lab.model(str(fields["model"]))
        fell = _logits(lab, model, x_adv, keys).argmax(1) != y
        if not bool(fell.any()):
            return Measured({}, {"value": Number(None, 0)})
        x, x_adv = x[fell], x_adv[fell]
        make_map = ActivationMap(model, top=int(fields["top"]))
        before, after = (_batches(lab, make_map, z)[:, 0] for z in (x, x_adv))
        shown = slice(0, int(fields.get("shown", 4)))
        return Measured(
            {
                "clean": x[shown].cpu().numpy(),
                "attacked": x_adv[shown].cpu().numpy(),
                "before": before[shown].cpu().numpy(),
                "after": after[shown].cpu().numpy(),
            },
            {"value": mean(similarity(before, after).cpu(), (-1.0, 1.0))},
        )

    used = ("model", "attack", "top", "shown")
    found: Measured = lab.keep("activation map kept", fields, used, make)
    return found


# --- Figure 6 -------------------------------------------------------------------------------------


@metric("rank of the class", models=True)
def _ranked(case: Case) -> Measured:
    """S2 Fig. 6: share of the images that fell whose class has a rank, 1 … 5, or 0 for beyond.

    Fields: `attacks`, pooled; `place`, the rank; `side`: `adversarial` (the attacked image's class
    among the clean one's predictions) or `original` (the reverse).
    """
    fields, lab = case.fields, case.lab
    parts = []
    for attack in fields["attacks"]:

        def make(attack: str = str(attack)) -> Measured:
            x, x_adv, _, keys = _crafted(lab, fields, attack)
            model = lab.model(str(fields["model"]))
            found = class_ranks(model, x, x_adv, seed=keys, batch_size=lab.batch_size)
            arrays = {k: v.cpu().numpy() for k, v in found._asdict().items()}
            return Measured(arrays, {})

        own = {**fields, "attack": str(attack)}
        parts.append(lab.keep("ranks", own, ("model", "attack"), make))
    side, wanted = str(fields["side"]), int(fields["place"])
    if side not in ("adversarial", "original"):
        raise ConfigError(f"side is {side!r}; expected adversarial or original")
    ranks = np.concatenate([np.asarray(p.arrays[side])[p.arrays["moved"]] for p in parts])
    hit = ranks > 5 if wanted == 0 else ranks == wanted
    return Measured({}, {"value": number_rate(torch.from_numpy(np.asarray(hit)))})
