"""The active test of Zimmermann et al.: does the attack find what is known to exist?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.errors import FeintError
from feint.core.gradients import call, is_stochastic
from feint.core.norms import norm_of, project, random_in_ball
from feint.evaluation.attackers import parse_attack
from feint.evaluation.findings import Finding, Status
from feint.evaluation.health.case import Case
from feint.evaluation.metrics import rate

__all__ = ["Head", "binarisation", "features_of"]

SAMPLES, INNER, BLIND, DRAWS = 12, 999, 200, 16
"""Samples, inner points and random tries for each, and draws that judge a random pipeline."""
INSIDE = 0.7
"""Inner points lie within this share of the budget."""
FOUND, EASY = 0.95, 0.5
"""Share of planted examples that the attack must find, and that random tries may."""


class Head(nn.Module):
    """Two classes on a pipeline's features: the second one certainly has an image in the ball.

    Args:
        view: Gives the features' graph.
        layer: The module whose input the features are; None takes the logits themselves.
        weight: (D,) float.
        bias: So that the second class begins half-way between the inner points and the planted one.
    """

    def __init__(
        self, view: nn.Module, layer: nn.Module | None, weight: Tensor, bias: Tensor
    ) -> None:
        super().__init__()
        self.view, self.weight, self.bias = view, weight, bias
        self._layer = [layer]  # in a list: it is the view's part already
        self.training = view.training

    @property
    def stochastic(self) -> bool:
        """As the view declares."""
        return is_stochastic(self.view)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """Logits of the two classes, (B, 2)."""
        features = features_of(self.view, self._layer[0], x, keys)
        score = features.to(self.weight.dtype) @ self.weight + self.bias
        return torch.stack([-score, score], 1) / 2


def features_of(view: nn.Module, layer: nn.Module | None, x: Tensor, keys: Tensor | None) -> Tensor:
    """What goes into `layer`, (B, D); without one, the logits."""
    if layer is None:
        return call(view, x, keys)
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        call(view, x, keys)
    finally:
        handle.remove()
    return seen[-1].flatten(1)


def _last_linear(view: nn.Module, x: Tensor, keys: Tensor) -> nn.Module | None:
    """The linear layer that gives the logits, if there is one and it gets one row per image."""
    seen: list[tuple[nn.Module, int]] = []
    handles = [
        m.register_forward_hook(lambda m, inputs, _: seen.append((m, len(inputs[0]))))
        for m in view.modules()
        if isinstance(m, nn.Linear)
    ]
    try:
        with torch.no_grad():
            call(view, x, keys)
    finally:
        for handle in handles:
            handle.remove()
    return seen[-1][0] if seen and seen[-1][1] == len(x) else None


def _planted(case: Case, image: Tensor, key: Tensor) -> Tensor:
    """A point at the edge of the ball: a corner for linf, else a random one at its full length."""
    eps, norm = case.cell.eps, case.cell.norm
    delta = random_in_ball(random.fold(key, "planted"), image, norm, eps)
    if norm == "linf":
        delta = delta.sign() * eps
    elif norm != "l0":
        length = norm_of(delta, norm).clamp_min(1e-12).to(delta.dtype)
        delta = project(delta * (eps / length).view(-1, 1, 1, 1), norm, eps)
    return (image + delta).clamp(0, 1)


@torch.no_grad()
def _head(
    case: Case, view: nn.Module, layer: nn.Module | None, image: Tensor, key: Tensor
) -> Head | None:
    """A head that separates inner points from the planted one; None if none does."""
    number = torch.arange(INNER, device=image.device)
    drawn = random.fold(key, "inner", 0, number).flatten()
    wide = image.expand(INNER, -1, -1, -1)
    inner = (wide + random_in_ball(drawn, wide, case.cell.norm, INSIDE * case.cell.eps)).clamp(0, 1)
    copies = DRAWS if is_stochastic(view) else 1
    edge = _planted(case, image, key).expand(copies, -1, -1, -1)
    points = torch.cat([image, inner, edge])
    drawn = random.fold(key, "draw", 0, torch.arange(len(points), device=key.device)).flatten()
    size = case.batch_size
    rows = [
        features_of(view, layer, points[i : i + size], drawn[i : i + size])
        for i in range(0, len(points), size)
    ]
    found = torch.cat(rows).double()
    below, above = found[: INNER + 1], found[INNER + 1 :]
    center = below.mean(0)
    spread = (below - center).T @ (below - center) / len(below)
    ridge = 1e-3 * spread.diagonal().mean().clamp_min(1e-12)
    eye = torch.eye(len(spread), dtype=spread.dtype, device=spread.device)
    weight = torch.linalg.solve(spread + ridge * eye, above.mean(0) - center)
    low, high = (below @ weight).amax(), (above @ weight).median()
    if not bool(high > low):
        return None
    scale = 2 / (high - low)  # the logits differ by ±1 at the two ends
    return Head(view, layer, (weight * scale), (-scale * (high + low) / 2))


def binarisation(case: Case) -> Iterator[Finding]:
    """For each sample a two-class problem on the pipeline's own features, and the cell's attack.

    A linear head separates 999 points inside of the ball from one at its edge, so that an
    adversarial example is known to exist. An attack that misses it would miss real ones, too.

    Args:
        case: A pipeline under its strongest white-box cell.

    Cost: for each of 12 samples 1200 forward passes and the attack.

    References:
        Zimmermann, Brendel, Tramèr, Carlini, "Increasing confidence in adversarial robustness
        evaluations", NeurIPS 2022.

    Deviations:
        The head is a linear discriminant in closed form, not logistic regression, and its threshold
        lies half-way; the samples are those of the evaluation, and a head that cannot separate is
        left out and counted.
    """
    check, parsed = "binarisation", parse_attack(case.cell.attack)
    if case.cell.targeted or case.cell.eps == 0:
        evidence = "two classes have no target to choose, and a budget of 0 no example to find"
        yield Finding(check, "pass", case.name, evidence)
        return
    loss = parsed.effective("loss") if "loss" in parsed.info.parameters else None
    if loss == "dlr":  # needs three classes
        parsed = replace(parsed, kwargs={**parsed.kwargs, "loss": "margin"})
    few = case.batch.select(slice(0, SAMPLES))
    view, pipeline = case.subject.attacked(case.cell), case.subject.pipeline(case.cell)
    keys = random.keys(case.cell.seed, few.index).to(few.x.device)
    layer = _last_linear(view, few.x[:1], keys[:1])
    place = {id(m): n for n, m in view.named_modules()}
    deployed = dict(pipeline.named_modules()).get(place.get(id(layer), "")) if layer else None
    hits, blind = [], []
    # One problem at a time: each sample has a head of its own, and attacks drop rows of a batch.
    for i in range(len(few)):
        one = few.select(slice(i, i + 1))
        head = _head(case, view, layer, one.x, keys[i : i + 1])
        if head is None:
            continue
        judged = Head(pipeline, deployed if layer else None, head.weight, head.bias)
        found = _try(case, parsed, head, one)
        hits.append(_fooled(judged, found, keys[i : i + 1], case.batch_size))
        number = torch.arange(BLIND, device=keys.device)
        drawn = random.fold(keys[i : i + 1], "blind try", 0, number).flatten()
        wide = one.x.expand(BLIND, -1, -1, -1)
        tries = (wide + random_in_ball(drawn, wide, case.cell.norm, case.cell.eps)).clamp(0, 1)
        with torch.no_grad():
            blind.append(bool((call(judged, tries, drawn).argmax(1) == 1).any()))
    yield _verdict(case, check, hits, blind, len(few))


def _try(case: Case, parsed: Any, head: Head, one: Any) -> Tensor:
    zero = replace(one, y=torch.zeros_like(one.y))
    try:
        return case.find(parsed, zero, view=head).x_adv
    except FeintError:  # no gradient: nothing is found, which is what the test is for
        return one.x


@torch.no_grad()
def _fooled(judged: Head, found: Tensor, key: Tensor, batch_size: int) -> bool:
    draws = DRAWS if is_stochastic(judged) else 1
    drawn = random.fold(key, "binary judge", 0, torch.arange(draws, device=key.device)).flatten()
    logits = call(judged, found.expand(draws, -1, -1, -1), drawn)
    return bool((logits.argmax(1) == 1).double().mean() > 0.5)


def _verdict(case: Case, check: str, hits: list[bool], blind: list[bool], tried: int) -> Finding:
    if not hits:
        evidence = f"0 of {tried} heads separate the planted example from the inner points"
        return Finding(check, "warn", case.name, evidence)
    found, luck = rate([float(h) for h in hits]), rate([float(b) for b in blind])
    status: Status = "pass"
    if found.value < FOUND:
        status = "fail"
    elif luck.value > EASY:
        status = "warn"
    return Finding(
        check,
        status,
        case.name,
        f"the attack finds {found} of {len(hits)} adversarial examples that certainly exist, "
        f"{BLIND} random points {luck} (fail below {100 * FOUND:.0f} %; warn if random points find "
        f"more than {100 * EASY:.0f} %); {tried - len(hits)} heads did not separate",
    )
