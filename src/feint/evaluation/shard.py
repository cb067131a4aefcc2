"""The unit of work: one cell on one shard of samples, independent of every other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from feint.core import random
from feint.core.errors import ConfigError, DtypeError, ShapeError, UnknownNameError
from feint.core.norms import distance
from feint.core.quantise import quantise
from feint.defenses.base import Defense
from feint.evaluation.attackers import Attacked, Attacker, parse_attack
from feint.evaluation.cell import Cell, fingerprint
from feint.evaluation.choose import DRAWS, KEPT
from feint.evaluation.judge import VOTES, Judgement, judge
from feint.evaluation.metrics import distances
from feint.evaluation.pipeline import Pipeline
from feint.evaluation.png import png_round_trip
from feint.evaluation.scenarios import get_scenario
from feint.evaluation.semi_brute_force import differentiable_parts

__all__ = ["COLUMNS", "Batch", "Rows", "Subject", "attack_shard", "judge_shard"]

Rows = dict[str, NDArray[Any]]
"""Columns over samples; `COLUMNS` says what each means."""

COLUMNS = {
    "index": "index of the sample in its data set",
    "label": "true label",
    "target": "the attacker's target, −1 if untargeted",
    "draws": "draws that the judge took",
    "correct": "draws on which the judged pipeline was right",
    "correct_even": "share right on the even draws: here the worst attack is chosen",
    "correct_odd": "share right on the odd draws: here it is read",
    "correct_8bit": "draws right after rounding the image to 8 bits",
    "target_hits": "draws that gave the attacker's target",
    "prediction": "most frequent prediction",
    "rms": "√mean δ²",
    "abs_l2": "‖δ‖₂",
    "relative_l2": "‖δ‖₂ / ‖x‖₂",
    "linf": "max |δ|",
    "size": "the perturbation in the threat model's norm, float64",
    "size_8bit": "the same after rounding to 8 bits",
    "outside": "how far the image leaves [0, 1]",
    "unchanged": "whether the attack returned the image itself",
    "first_hit": "first step at which the attacker saw a success, −1 for never",
    "late_gain": "share of the loss's rise that came in the last tenth of the steps; NaN if the "
    "attack has no trace",
    "correct_png": "draws right after the 8-bit image went through a PNG file",
    **{f"vote_{n}": f"share of the majority votes of {n} draws that are right" for n in VOTES},
    "rounds": "the attack's step at its first success, or its last step",
    "queries": "forward passes up to the first success, or in all",
    "gradients": "backward passes up to the first success, or in all",
}
"""Columns from `correct_png` on are NaN in runs of versions that did not record them, and where
nothing is known: votes of more draws than were taken, an attack without a trace."""


@dataclass(frozen=True)
class Batch:
    """Samples of a shard; `target` only for targeted threats.

    Args:
        x: Images, (B, C, H, W), in [0, 1].
        y: True labels, (B,) int64.
        index: Indices in the data set, (B,) int64: they key every draw.
        target: The attacker's targets, (B,) int64.

    Raises:
        ShapeError: If there is not one label, index and target for each image.
        DtypeError: If labels, indices or targets are not int64.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    target: Tensor | None = None

    def __post_init__(self) -> None:
        if self.x.ndim != 4:
            raise ShapeError(f"x has shape {tuple(self.x.shape)}; expected (B, C, H, W)")
        for name in ("y", "index", "target"):
            value = getattr(self, name)
            if value is None:
                continue
            if value.dtype != torch.int64:
                raise DtypeError(f"{name} has dtype {value.dtype}; expected int64")
            if value.shape != (len(self.x),):
                raise ShapeError(
                    f"{name} has shape {tuple(value.shape)}; expected ({len(self.x)},), one per "
                    "image"
                )

    def select(self, rows: slice | Tensor) -> Batch:
        """Some of the samples."""
        target = None if self.target is None else self.target[rows]
        return Batch(self.x[rows], self.y[rows], self.index[rows], target)

    def goal(self, targeted: bool) -> Tensor:
        """What an attack gets as its `y`: targets if the threat is targeted.

        Raises:
            ConfigError: A targeted threat without targets.
        """
        if not targeted:
            return self.y
        if self.target is None:
            raise ConfigError("a targeted threat needs a target for every sample (column 'target')")
        return self.target

    def __len__(self) -> int:
        return len(self.x)


def _attack_context(cell: Cell) -> str:
    """What decides an attack beside its text: its version, and whether `stop` is set for it."""
    if cell.attack == "none":
        return ""
    attack, scenario = parse_attack(cell.attack), get_scenario(cell.scenario)
    stays = scenario.transferred and "stop" in attack.info.parameters and not attack.fixes("stop")
    return f"{attack.info.version}, never stops" if stays else str(attack.info.version)


@dataclass
class Subject:
    """The objects that a cell's specs name, and what identifies them.

    Args:
        model: The classifier.
        defense: What stands in front of it, or none.
        source: Another model, for transfer.
        versions: Registered versions of the defense's parts, as text.
        code: Digests of what weights and printed structure do not show (a user's source file), for
            `"model"` and `"source"`.
    """

    model: nn.Module
    defense: Defense | None = None
    source: nn.Module | None = None
    versions: str = ""
    code: Mapping[str, str] = field(default_factory=dict)
    _prints: dict[str, str] = field(default_factory=dict)

    def context(self, cell: Cell, data: str) -> dict[str, str]:
        """Fingerprints for a cell's address; computed once per subject."""
        if not self._prints:
            self._prints = {
                "model": fingerprint(self.model) + self.code.get("model", ""),
                "defense": fingerprint(self.defense) + self.versions,
                "source": fingerprint(self.source) + self.code.get("source", ""),
            }
        attack = _attack_context(cell)
        if self._chooses(cell):
            attack += f", chosen of {KEPT} on {DRAWS} draws"
        return {**self._prints, "data": data, "attack": attack}

    def pipeline(self, cell: Cell) -> Pipeline:
        """The deployed classifier."""
        return Pipeline(
            self.model,
            self.defense,
            votes=cell.votes,
            combine=cell.combine,  # type: ignore[arg-type]
        )

    def attacked(self, cell: Cell) -> nn.Module:
        """What the cell's attacker attacks, with the backward rule that the cell names.

        An attack that asks for no gradient gets the deployed pipeline itself.

        Raises:
            ConfigError: If a gradient attack meets a defense for which nothing stands in.
            UnknownNameError: If the defense does not declare the cell's backward rule.
        """
        which = get_scenario(cell.scenario).attacked
        if which == "parts":
            return self.pipeline(cell)
        if which == "pipeline":
            pipeline = self.pipeline(cell)
            if cell.attack != "none" and not parse_attack(cell.attack).needs_gradient:
                return pipeline
            if cell.backward != "default":
                return pipeline.view(cell.rules)
            try:
                return pipeline.view()
            except UnknownNameError as error:
                raise ConfigError(
                    f"defense {self.defense} is not differentiable and nothing stands in for it "
                    f"({error}); use gradient=spsa(64), or an attack on scores or decisions"
                ) from None
        if which == "source":
            if self.source is None:
                raise ConfigError("scenario 'transfer' needs a source model")
            return self.source
        # The pipeline that a cell without defense attacks: the two may share their examples.
        return Pipeline(self.model)

    def judged(self, cell: Cell) -> nn.Module:
        """What the cell's judge asks."""
        with_defense = get_scenario(cell.scenario).judged == "pipeline"
        return self.pipeline(cell) if with_defense else self.model

    def attacker(self, cell: Cell) -> Attacker:
        """The cell's attack on the cell's view; raises if the two do not fit."""
        scenario = get_scenario(cell.scenario)
        return Attacker(
            parse_attack(cell.attack),
            self.attacked(cell),
            cell.norm,
            cell.eps,
            cell.targeted,
            transferred=scenario.transferred,
            part=self._parts() if scenario.attacked == "parts" else None,
            asks=scenario.asks,
            choose=self._chooses(cell),
        )

    def _chooses(self, cell: Cell) -> bool:
        """Whether examples are chosen by their success on fresh draws: adaptive, and random."""
        traced = cell.attack != "none" and "trace" in parse_attack(cell.attack).info.parameters
        return cell.scenario == "adaptive" and traced and self.pipeline(cell).stochastic

    def _parts(self) -> Pipeline:
        """The model behind those parts of the defense that are differentiable."""
        kept = None if self.defense is None else differentiable_parts(self.defense)
        return Pipeline(self.model, kept).view()


def attack_shard(cell: Cell, subject: Subject, batch: Batch, batch_size: int) -> Attacked:
    """Adversarial examples of a shard; the images themselves where there is no attacker.

    Raises:
        ConfigError: A targeted cell without targets.
        ModelError: The attack returned NaN, or other than one image for each.
    """
    if cell.attack == "none":
        nothing = torch.full((len(batch),), -1)
        return Attacked(batch.x, 0, 0, nothing, torch.zeros(len(batch), dtype=torch.float64))
    goal = batch.goal(cell.targeted)
    keys = random.keys(cell.seed, batch.index)
    found = subject.attacker(cell).run(batch.x, goal, keys, batch_size)
    if parse_attack(cell.attack).info.goal == "minimal":
        # A nearest adversarial image that lies beyond the budget is no attack within it.
        over = distance(found.x_adv, batch.x, cell.norm) > cell.eps
        kept = torch.where(over.view(-1, 1, 1, 1), batch.x, found.x_adv)
        found = replace(found, x_adv=kept)
    # Kept examples come back contiguous, and a convolution's last bit may depend on the layout.
    return replace(found, x_adv=found.x_adv.contiguous())


def judge_shard(
    cell: Cell, subject: Subject, batch: Batch, found: Attacked, batch_size: int
) -> Rows:
    """Per-sample facts of a shard: judged as floats, in 8 bits and as PNG, measured in float64."""
    if found.x_adv.device != batch.x.device:  # a cache may have kept it elsewhere
        found = replace(found, x_adv=found.x_adv.to(batch.x.device))
    keys = random.keys(cell.seed, batch.index)
    pipeline = subject.judged(cell)

    def ask(x: Tensor) -> Judgement:
        return judge(pipeline, x, batch.y, keys, draws=cell.judge_draws, batch_size=batch_size)

    floats, rounded = ask(found.x_adv), quantise(found.x_adv)
    # An image that 8 bits hold already (a clean one) need not be asked twice.
    bytes_ = floats if torch.equal(rounded, found.x_adv) else ask(rounded)
    reread = png_round_trip(rounded)
    files = bytes_ if torch.equal(reread, rounded) else ask(reread)
    target = batch.goal(True) if cell.targeted else None
    outside = torch.maximum(-found.x_adv, found.x_adv - 1).flatten(1).amax(1).clamp_min(0)
    rows: Mapping[str, Tensor] = {
        "index": batch.index,
        "label": batch.y,
        "target": torch.full_like(batch.y, -1) if target is None else target,
        "draws": torch.full((len(batch),), floats.draws),
        "correct": floats.correct,
        "correct_even": floats.half(0),
        "correct_odd": floats.half(1),
        "correct_8bit": bytes_.correct,
        "target_hits": torch.zeros_like(floats.correct)
        if target is None
        else floats.hits(target.cpu()),
        "prediction": floats.majority(),
        "size": distance(found.x_adv, batch.x, cell.norm),
        "size_8bit": distance(rounded, batch.x, cell.norm),
        "outside": outside.double(),
        "unchanged": (found.x_adv == batch.x).flatten(1).all(1),
        "first_hit": found.first_hit,
        "late_gain": found.late_gain,
        "correct_png": files.correct.double(),
        **{f"vote_{n}": floats.vote(n) for n in VOTES},
        "rounds": _known(found.rounds, batch),
        "queries": _known(found.queries, batch),
        "gradients": _known(found.gradients, batch),
    }
    measured = {name: np.asarray(value.cpu()) for name, value in rows.items()}
    measured |= distances(found.x_adv, batch.x)
    return {name: measured[name] for name in COLUMNS}


def _known(value: Tensor | None, batch: Batch) -> Tensor:
    """What was counted, or NaN."""
    if value is None:
        return torch.full((len(batch),), torch.nan, dtype=torch.float64)
    return value.double()
