"""Metrics of S3: verdicts on 8-bit images, scaled perturbations, similarity of gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feint.core import random
from feint.core.errors import ConfigError, RangeError
from feint.core.norms import norm_of
from feint.core.quantise import quantise
from feint.core.similarity import ssim
from feint.diagnostics import (
    gradient_magnitude,
    gradient_ssim,
    input_gradients,
    label_map,
    other_labels,
    reconstruction_gradients,
)
from feint.diagnostics._common import logits_of
from feint.diagnostics.label_map import unit
from feint.diagnostics.numbers import Measured, Number, array, mean
from feint.evaluation import CellResult
from feint.evaluation.judge import judge
from feint.evaluation.metrics import Rate, rate, ratio, wilson
from feint.evaluation.scenarios import get_scenario
from feint.recipes.lab import Lab
from feint.recipes.measures import partial_attack
from feint.recipes.metrics import Case, Cells, Fields, attacked_cells, cell_of, metric

__all__: list[str] = []

RIGHT = 0.5
"""Share of draws from which on an image counts as rightly classified without attack."""


# --- cells, judged on images of 8 bits ------------------------------------------------------------


def _judged(fields: Fields) -> dict[str, Any]:
    """The fields of what is judged: without the defense where it is taken away."""
    scenario = get_scenario(str(fields.get("scenario", "none")))
    return {**fields, "defense": "none"} if scenario.judged == "model" else dict(fields)


def _asked(fields: Fields, shape: tuple[int, ...]) -> Cells:
    """The attacked cells, and what they judge on clean images."""
    own = _judged(fields) if fields.get("attack") == "none" else fields
    clean = cell_of({**_judged(fields), "backward": "default"}, shape, attack="none")
    return {"attacked": attacked_cells(own, shape), "clean": [clean]}


def shares_8bit(results: list[CellResult]) -> NDArray[np.float64]:
    """(N,) share of draws that are right about the 8-bit images, under the worst attack.

    Of a deterministic pipeline the worst case of every image, of a random one the attack that is
    worst on the mean: a choice per image would take luck for strength.
    """
    found = np.stack([r.rows["correct_8bit"] / r.rows["draws"] for r in results])
    if max(r.draws for r in results) == 1:
        return np.asarray(found.min(0))
    return np.asarray(found[found.mean(1).argmin()])


def _distances(case: Case) -> dict[str, Number]:
    found = {}
    for name in ("relative_l2", "linf"):
        rows = np.mean([r.rows[name] for r in case.cells["attacked"]], 0)
        found[name] = mean(torch.from_numpy(rows), (0.0, np.inf))
    return found


def _number(found: Rate) -> Number:
    return Number(found.value, found.n, found.low, found.high)


def _right(clean: NDArray[np.float64]) -> NDArray[np.bool_]:
    right = clean > RIGHT
    if not right.any():
        raise RangeError("what is judged gets no clean image right; there is nothing to count")
    return right


@metric("newly misclassified, 8-bit", ask=_asked)
def _newly(case: Case) -> Measured:
    """S3 §4: of the images that what is judged gets right, the share that the attack turns."""
    shares, right = shares_8bit(case.cells["attacked"]), _right(shares_8bit(case.cells["clean"]))
    value = rate(1 - shares[right], case.draws())
    accuracy = rate(shares, case.draws())
    return Measured(
        {}, {"value": _number(value), "accuracy": _number(accuracy), **_distances(case)}
    )


@metric("accuracy, 8-bit", ask=_asked)
def _accuracy(case: Case) -> Rate:
    """Share of images that what is judged gets right after rounding to 8 bits."""
    return rate(shares_8bit(case.cells["attacked"]), case.draws())


@metric("relative accuracy, 8-bit", ask=_asked)
def _relative(case: Case) -> Measured:
    """S3 App. A: accuracy under attack over the clean accuracy of what is judged, on 8 bits."""
    value = ratio(shares_8bit(case.cells["attacked"]), shares_8bit(case.cells["clean"]))
    return Measured({}, {"value": _number(value), **_distances(case)})


# --- scaled perturbations -------------------------------------------------------------------------


def _perturbed(case: Case, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
    """Images attacked as the fields say, by any attack and without a budget of the scenario's."""
    fields, lab = case.fields, case.lab
    scenario = get_scenario(str(fields["scenario"]))
    target = lab.model(str(fields["model"]))
    if scenario.attacked == "pipeline":
        rule = str(fields.get("backward", "default"))
        target = lab.pipeline(fields).view(None if rule == "default" else rule)
    elif scenario.attacked != "model":
        raise ConfigError(f"scenario {scenario.name!r} has no perturbation to scale")
    attack, size = partial_attack(str(fields["attack"])), lab.batch_size
    rows = [slice(i, i + size) for i in range(0, len(x), size)]
    return torch.cat([attack(target, x[r], y[r], seed=keys[r]) for r in rows])


def scaled(x: Tensor, x_adv: Tensor, factor: float) -> Tensor:
    """X plus a multiple of the perturbation, clipped and rounded to 8 bits (Guo et al.'s CW)."""
    return quantise((x + factor * (x_adv - x)).clamp(0, 1))


def _scaled(case: Case) -> Measured:
    """Verdicts and distances for every factor of the field `factors`, from one attack."""
    fields, lab = case.fields, case.lab

    def make() -> Measured:
        x, y, index = lab.images(fields)
        keys = random.keys(lab.seed, index)
        judged = lab.pipeline(_judged(fields))

        def right(images: Tensor) -> NDArray[np.float64]:
            said = judge(judged, images, y, keys, batch_size=lab.batch_size)
            return np.asarray(said.correct.double().numpy() / said.draws)

        clean, x_adv = right(quantise(x)), _perturbed(case, x, y, keys)
        arrays, numbers = {"clean": clean}, {}
        for factor in fields["factors"]:
            images = scaled(x, x_adv, float(factor))
            shares, delta = right(images), images.double() - x.double()
            relative = norm_of(delta, "l2") / norm_of(x.double(), "l2")
            found = {
                "newly": _number(rate(1 - shares[_right(clean)])),
                "accuracy": _number(rate(shares)),
                "relative_l2": mean(relative, (0.0, np.inf)),
                "linf": mean(norm_of(delta, "linf"), (0.0, np.inf)),
            }
            numbers.update({f"{factor} {name}": number for name, number in found.items()})
            arrays[f"{factor}"] = shares
        return Measured(arrays, numbers)

    used = ("model", "defense", "attack", "scenario", "backward", "factors")
    return lab.keep("scaled perturbation", fields, used, make)


def _of_scaled(kind: str, summary: str, share: bool) -> None:
    def read(case: Case) -> Measured:
        found, factor = _scaled(case).numbers, case.fields["factor"]
        if f"{factor} newly" not in found:
            raise ConfigError(f"factor {factor!r} is none of `factors`: {case.fields['factors']}")
        others = {n: found[f"{factor} {n}"] for n in ("accuracy", "relative_l2", "linf")}
        return Measured({}, {**others, "value": found[f"{factor} {kind}"]})

    read.__doc__ = summary
    name = "newly misclassified" if kind == "newly" else kind
    metric(f"{name}, scaled", share=share, models=True)(read)


_of_scaled("newly", "As `newly misclassified, 8-bit`, of a multiple of the perturbation.", True)
_of_scaled("accuracy", "As `accuracy, 8-bit`, of a multiple of the perturbation.", True)
_of_scaled("relative_l2", "Mean relative l2 distance of a multiple of the perturbation.", False)
_of_scaled("linf", "Mean linf distance of a multiple of the perturbation.", False)


# --- gradients ------------------------------------------------------------------------------------

SOURCES = ("f", "f∘S2S", "f∘AE", "S2S", "AE")
"""Where gradients are read (S3 Table 1): the classifier, it behind either network, these alone."""


def _all_gradients(lab: Lab, fields: Fields) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Images; (5, B, C, H, W) gradients in the order of `SOURCES`; those of another label."""
    x, y, index = lab.images(fields)
    keys, size = random.keys(lab.seed, index), lab.batch_size
    model = str(fields["model"])
    views, nets = [lab.model(model)], []
    for name in ("s2s", "ae"):
        views.append(lab.pipeline({"model": model, "defense": fields[name]}).view("exact"))
        net = lab.defense(str(fields[name]))
        if net is None:
            raise ConfigError(f"the field {name!r} is none; expected an autoencoder")
        nets.append(net)
    own = [input_gradients(v, x, y, seed=keys, batch_size=size) for v in views]
    classes = int(logits_of(views[0], x[:1], keys[:1], size).shape[1])
    z = other_labels(y, classes, seed=keys)
    others = [input_gradients(v, x, z, seed=keys, batch_size=size) for v in views]
    own += [reconstruction_gradients(net, x, batch_size=size) for net in nets]
    return x, torch.stack(own), others


def _similarities(case: Case) -> Measured:
    fields, lab = case.fields, case.lab

    def make() -> Measured:
        x, own, others = _all_gradients(lab, fields)
        size = lab.batch_size
        parts = [gradient_ssim(own[:, i : i + size]) for i in range(0, len(x), size)]
        pairs = torch.cat(parts, 2)
        numbers = {}
        for i, one in enumerate(SOURCES):
            for j, two in enumerate(SOURCES):
                numbers[f"{one} | {two}"] = mean(pairs[i, j], (-1.0, 1.0))
        for i, other in enumerate(others):
            found = ssim(gradient_magnitude(own[i]), gradient_magnitude(other))
            numbers[f"{SOURCES[i]} | another label"] = mean(found, (-1.0, 1.0))
        few = int(fields.get("shown", 4))
        size_of = gradient_magnitude(own[:, :few].flatten(0, 1), reduce="mean")
        maps = size_of.unflatten(0, (len(SOURCES), -1))[:, :, 0]
        return Measured({"images": array(x[:few]), "maps": array(maps)}, numbers)

    return lab.keep("gradient similarity", fields, ("model", "s2s", "ae", "shown"), make)


@metric("gradient similarity", share=False, models=True)
def _similarity(case: Case) -> Measured:
    """S3 Table 1: mean SSIM of gradient magnitudes, of the fields `of` and `against`."""
    found = _similarities(case)
    pair = f"{case.fields['of']} | {case.fields['against']}"
    value = found.numbers.get(pair, Number(None))
    if case.fields["of"] == case.fields["against"]:
        value = Number(1.0)
    return Measured({}, {"value": value})


@metric("gradient images", share=False, models=True)
def _gradient_images(case: Case) -> Measured:
    """S3 Fig. 2: gradient magnitudes of the first images; the number is the SSIM with f's."""
    found, source = _similarities(case), str(case.fields["of"])
    value = Number(1.0) if source == "f" else found.numbers[f"f | {source}"]
    arrays = {"images": found.arrays["images"], "map": found.arrays["maps"][SOURCES.index(source)]}
    return Measured(arrays, {"value": value})


# --- domains and examples -------------------------------------------------------------------------


def _both(case: Case) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Images that `model` gets right alone and behind `defense`, and both perturbed versions."""
    fields, lab = case.fields, case.lab
    x, y, index = lab.images(fields)
    keys, size = random.keys(lab.seed, index), lab.batch_size
    bare, behind = lab.model(str(fields["model"])), lab.pipeline(fields)
    said = [logits_of(m, x, keys, size).argmax(1) == y for m in (bare, behind)]
    chosen = torch.stack(said).all(0).nonzero().flatten()
    skip, most = int(fields.get("picture", 0)), int(fields.get("shown", 1))
    chosen = chosen[skip : skip + most]
    if not len(chosen):
        raise RangeError(
            f"fewer than {skip + 1} images are right both with and without the defense; "
            "take more with --samples"
        )
    x, y, keys = x[chosen], y[chosen], keys[chosen]
    attack = partial_attack(str(fields["attack"]))
    found = {
        "f": attack(bare, x, y, seed=keys),
        "f∘S2S": attack(behind.view("exact"), x, y, seed=keys),
    }
    return x, y, keys, {k: quantise(v) for k, v in found.items()}


_EXAMPLE = ("model", "defense", "attack", "picture", "shown", "reach", "points")


@metric("domain plane", share=False, models=True)
def _plane(case: Case) -> Measured:
    """S3 Fig. 1, measured: the plane of the perturbations from f and from f∘S2S, as `judged` sees.

    The number is the mean cosine between the two. Fields: `judged` (f or f∘S2S), `attack`, `reach`
    (in units of the perturbation from f), `points`.
    """
    fields, lab = case.fields, case.lab

    def make() -> Measured:
        x, y, keys, found = _both(case)
        deltas = {k: (v - x) for k, v in found.items()}
        first, other = unit(deltas["f"]), unit(deltas["f∘S2S"])
        cosine = (first * other).flatten(1).sum(1)
        across = other - cosine.view(-1, 1, 1, 1) * first
        second = unit(across)
        length = norm_of(deltas["f"], "l2")
        judged = lab.model(str(fields["model"]))
        if fields["judged"] != "f":
            judged = lab.pipeline(fields)
        reach = float(fields["reach"]) * float(length[0])
        plane = label_map(
            judged, x[:1], first[:1], second[:1], reach=reach, points=int(fields["points"]),
            seed=keys[:1], batch_size=lab.batch_size,
        )  # fmt: skip
        spots = [
            [float((deltas[k] * d).flatten(1).sum(1)[0]) for d in (first, second)] for k in deltas
        ]
        return Measured(
            {
                "wrong": array(plane.labels[0] != y[0]),
                "axis": array(plane.axis),
                "spots": np.array(spots),
                "image": array(x[0]),
            },
            {"value": mean(cosine, (-1.0, 1.0))},
        )

    return lab.keep("domain plane", fields, (*_EXAMPLE, "judged"), make)


@metric("perturbed example", share=False, models=True)
def _example(case: Case) -> Measured:
    """S3 Figs. 10–16: one image, perturbed by gradients of `of`, and its reconstruction.

    The `picture`-th image that the classifier gets right with and without the defense. The number
    is the relative l2 size of the perturbation.
    """
    fields, lab = case.fields, case.lab

    def make() -> Measured:
        x, y, keys, found = _both(case)
        x_adv = found[str(fields["of"])]
        behind = lab.pipeline(fields)
        net = behind.defense
        if net is None:
            raise ConfigError("the field 'defense' is none; expected an autoencoder")
        with torch.no_grad():
            made, before = net(x_adv, keys=keys), net(x, keys=keys)
            said = [
                logits_of(m, x_adv, keys, lab.batch_size).argmax(1)
                for m in (lab.model(str(fields["model"])), behind)
            ]
        relative = norm_of((x_adv - x).double(), "l2") / norm_of(x.double(), "l2")
        return Measured(
            {
                "clean": array(x[0]),
                "attacked": array(x_adv[0]),
                "reconstruction": array(made[0]),
                "left": array(made[0] - before[0]),
                "said": array(torch.stack(said)[:, 0]),
                "label": array(y[:1]),
            },
            {"value": Number(float(relative[0]), 1)},
        )

    return lab.keep("perturbed example", fields, (*_EXAMPLE, "of"), make)


@metric("membership", models=True)
def _membership(case: Case) -> Measured:
    """S3 Fig. 9: the share of perturbations from `domain` that fool `fools`, and both at once.

    Of the images that are right with and without the defense. Fields: `domain` and `fools`, each f
    or f∘S2S; `attack`.
    """
    fields, lab = case.fields, case.lab

    def make() -> Measured:
        _, y, keys, found = _both(case)
        nets = {"f": lab.model(str(fields["model"])), "f∘S2S": lab.pipeline(fields)}
        arrays, numbers = {}, {}
        for domain, x_adv in found.items():
            for name, net in nets.items():
                fooled = logits_of(net, x_adv, keys, lab.batch_size).argmax(1) != y
                arrays[f"{domain} | {name}"] = array(fooled)
                hits, n = int(fooled.sum()), len(fooled)
                numbers[f"{domain} | {name}"] = Number(hits / n, n, *wilson(hits, n))
        return Measured(arrays, numbers)

    found = lab.keep("membership", fields, _EXAMPLE, make)
    pair = f"{fields['domain']} | {fields['fools']}"
    return Measured(found.arrays, {"value": found.numbers[pair]})
