"""The checks that an evaluation runs on itself: what each asks, its threshold and its source.

`CHECKS` describes every check that gives a `Finding`; `QUESTIONS` are the 39 questions that an
honest evaluation must answer, and the checks (or parts of a run) that answer each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "CHECKS",
    "COSTLY",
    "ELSEWHERE",
    "QUESTIONS",
    "SOURCES",
    "Check",
    "coverage_table",
    "table",
]

Cost = Literal["quick", "costly"]

SOURCES = {
    "C": "Carlini et al., On evaluating adversarial robustness, 2019",
    "T": "Tramèr et al., On adaptive attacks to adversarial example defenses, 2020",
    "P": "Pintor et al., Indicators of attack failure, NeurIPS 2022",
    "A": "AutoAttack's flags (Croce & Hein, 2020; flags_doc.md)",
    "Z": "Zimmermann et al., Increasing confidence in adversarial robustness evaluations, 2022",
    "G": "Gao et al., On the limitations of stochastic pre-processing defenses, 2022",
    "At": "Athalye et al., Obfuscated gradients, ICML 2018",
    "D": "Carlini's issues on DEEPSEC, 2019",
    "F": "this package",
}
"""Where a check comes from, by the letters that the table uses."""


@dataclass(frozen=True)
class Check:
    """One check."""

    asks: str
    """What is looked at."""
    threshold: str
    """When it warns and when it fails."""
    source: str
    """Letters of `SOURCES`."""
    numbers: tuple[int, ...]
    """The questions that it answers."""
    cost: Cost = "quick"
    strength: bool = False
    """About the attackers alone: if it fails, a bound can only be too high."""


def _check(
    asks: str,
    threshold: str,
    source: str,
    *numbers: int,
    cost: Cost = "quick",
    strength: bool = False,
) -> Check:
    return Check(asks, threshold, source, numbers, cost, strength)


CHECKS: dict[str, Check] = {
    # --- the pipeline ---------------------------------------------------------------------------
    "input-and-mode": _check(
        "images in [0, 1], floating, finite; no batch normalisation or dropout in training mode",
        "fail on any",
        "A, C", 1,
    ),
    "outputs-are-logits": _check(
        "outputs in [0, 1] that sum to 1 are probabilities, and a softmax hides gradients",
        "fail if all lie in [0, 1] and every sum is within 1e-3 of 1",
        "A", 1, strength=True,
    ),
    "declared-randomness": _check(
        "declared against measured: the same keys, other keys",
        "fail if logits differ by more than 1e-4 of the largest where they must not; warn if "
        "declared randomness does not show",
        "A", 2,
    ),
    "undeclared-randomness": _check(
        "five forward passes of a model that takes keys and does not declare itself random",
        "warn above 1e-4 of the largest logit",
        "A", 2,
    ),
    "unkeyed-randomness": _check(
        "five forward passes of a model that takes no keys",
        "warn above 1e-4 of the largest logit; judged by the random protocol",
        "A, F", 2,
    ),
    "batch-independence": _check(
        "each sample alone and at another place in the batch against its batch",
        "fail above 1e-3 of the largest logit",
        "F", 2, 3,
    ),
    "static-state": _check(
        "parameters and buffers before and after a forward pass",
        "fail if one changes",
        "A", 4,
    ),
    "static-process": _check(
        "global random states, and gradients asked for inside of the forward pass",
        "warn on either",
        "A", 4,
    ),
    "differentiable-parts": _check(
        "every module's input gradient in the attacker's view, and what stands in for the others",
        "warn if a part of the view passes none, or one that is not finite",
        "P, C", 5,
    ),
    "stand-in-fidelity": _check(
        "how far each part without a derivative moves from its stand-in, and how much of a change "
        "of 8/255 the stand-in foretells",
        "warn if the cosine is below 0.1",
        "C", 8,
    ),
    # --- the attacker's view --------------------------------------------------------------------
    "view-is-exact": _check(
        "logits of what is attacked, with autograd on, and of what is judged",
        "fail if they differ at all",
        "D", 24,
    ),
    "zero-gradient": _check(
        "share of zero or non-finite input gradients, and the module where they are lost",
        "warn on any zero, fail above 10 % or on any non-finite",
        "A, P", 5, 9, strength=True,
    ),
    "loss-is-alive": _check(
        "the same for the loss that the attack climbs",
        "warn above 10 % zero, fail above 50 %",
        "A, T", 9, 15, strength=True,
    ),
    "gradient-is-useful": _check(
        "a small step along the view's gradient against a random one, judged by the deployed "
        "pipeline",
        "warn below 80 % of samples, fail below 65 %",
        "C, At", 8, 21, strength=True,
    ),
    "gradient-foretells": _check(
        "the change of the deployed pipeline's loss along random directions, as the view's "
        "gradient foretells it and as it happens",
        "correlation: warn below 0.3 by a standard error, fail if by two and below 0.1; size: "
        "warn beyond 10 times, fail beyond 100",
        "C, F", 8, strength=True,
    ),
    "stable-loss": _check(
        "relative change of the loss under random moves of 1e-3",
        "warn above 10 %",
        "P", 10,
    ),
    "eot-signal": _check(
        "cosine between two independent estimates of a random pipeline's gradient",
        "warn below 0.1 if more than 5 % of the samples stand",
        "F", 27,
    ),
    # --- one cell -------------------------------------------------------------------------------
    "attack-moves": _check(
        "share of images that the attack changed",
        "fail if half of what it could have changed stayed; a minimal attack: warn if all stayed",
        "C", 9, strength=True,
    ),
    "budget-and-box": _check(
        "the perturbation measured again in float64, and the box [0, 1]",
        "fail above eps · (1 + 1e-6) or outside of the box",
        "A, D", 16,
    ),
    "survives-8-bit": _check(
        "accuracy after rounding the found images to 8 bits, which a PNG file keeps",
        "warn if it rises by more than 5 points",
        "F", 6,
    ),
    "silent-success": _check(
        "samples on which the attack saw a success and returned none",
        "warn on any, fail above 2 %",
        "P", 11, strength=True,
    ),
    "single-draw-luck": _check(
        "first success seen by the attacker against the mean over held-out draws",
        "warn if it is larger by more than 10 points",
        "F", 28,
    ),
    "transfer-failure": _check(
        "samples on which the attacked surrogate fell and the deployed pipeline did not",
        "warn above half of the former, unless an attacker who knows the pipeline was tried",
        "P", 14,
    ),
    "loss-has-settled": _check(
        "how much the loss still rose in the last tenth of the steps",
        "warn if more than half of the standing samples gained over 5 % of their rise",
        "P, C", 12,
    ),
    "successes-have-settled": _check(
        "first successes against steps, with right-censoring",
        "warn if the last tenth of the steps still broke more than 2 % of all samples",
        "F", 33,
    ),
    "votes": _check(
        "majority of n of the judged draws against a single one",
        "warn if votes would raise the accuracy by more than 10 points: attack them as deployed",
        "F", 30,
    ),
    "judged-on-fresh-draws": _check(
        "draws of the judge for a random pipeline, and a coin of known probability judged alike",
        "fail if a random pipeline was judged on one draw or the coin misses its probability",
        "F", 28,
    ),
    "threat-model-card": _check(
        "goal, knowledge, norm, budget, randomness and queries of each attacker, in words",
        "warn if the budget is zero",
        "C", 36,
    ),
    # --- cells against each other ---------------------------------------------------------------
    "clean-accuracy": _check(
        "accuracy without an attacker, with and without the defense, paired by sample",
        "warn if it was not measured, or if its interval reaches chance",
        "C", 7,
    ),
    "undefended-falls": _check(
        "the same attack on the bare model",
        "warn if it takes less than 10 points from it",
        "C", 32,
    ),
    "white-box-is-strongest": _check(
        "samples that attackers without gradients or without knowledge broke and the white box "
        "did not",
        "warn on any, fail above 2 %",
        "C, A, At", 20, 23, strength=True,
    ),
    "knowledge-helps": _check(
        "accuracy under an attacker who knows more against one who knows less, paired by sample",
        "warn if it is clearly higher",
        "C, T", 23,
    ),
    "monotone-in-eps": _check(
        "accuracy against the budget",
        "warn if a larger budget clearly leaves more",
        "C, At", 22,
    ),
    "worst-case-per-sample": _check(
        "the verdict's bound against every cell of its threat model",
        "fail if a cell is below the bound by more than its interval",
        "D", 34,
    ),
    "same-samples": _check(
        "cells that are compared were judged on the same samples",
        "fail if not",
        "F", 35,
    ),
    "invariance": _check(
        "what a random defense costs without an attacker against what it seems to gain",
        "warn if the model hardly notices its draws and it gains more than 10 points all the same",
        "G", 29,
    ),
    # --- small experiments ----------------------------------------------------------------------
    "random-does-not-win": _check(
        "20 random points of the ball, half of them corners",
        "warn if they break any sample that still stands, fail above 2 %",
        "At, C", 21, strength=True,
    ),
    "iterative-beats-single": _check(
        "one step of the whole budget against the iterative attack",
        "warn above 2 % of the samples (at least 2), fail above 5 %",
        "C, At", 19, strength=True,
    ),
    "zero-budget": _check(
        "the attack at eps = 0",
        "fail if it changes an image, or the judge says otherwise than for the clean ones",
        "C", 22, 39,
    ),
    "large-budget-breaks": _check(
        "the attack with the whole box as its budget, against handing in another image",
        "fail if it leaves more standing, beyond chance",
        "C, At, P", 22, strength=True,
    ),
    "more-steps-do-not-help": _check(
        "twice the steps on what still stands",
        "warn above 2 % of the samples, fail above 5 %",
        "C", 13, strength=True,
    ),
    "gradients-along-the-path": _check(
        "zero and non-finite gradients on the way, on what still stands",
        "warn above 10 % zero, fail above 50 % zero or on any non-finite",
        "A, P", 9, strength=True,
    ),
    "attack-batch-invariance": _check(
        "the attack on samples one by one and in a batch",
        "fail if the images differ in more than 1 % of their values, in float64, too",
        "F", 17,
    ),
    "logit-shift": _check(
        "the attack on the pipeline with a constant added to all logits",
        "fail if more than one of eight samples is broken on one and not on the other",
        "F", 18, strength=True,
    ),
    "logit-scale": _check(
        "the attack on the pipeline with logits brought to a spread of one, on what still stands",
        "warn above 2 % of the samples (at least 2), fail above 5 %",
        "F", 18, 15, strength=True,
    ),
    # --- on request -----------------------------------------------------------------------------
    "more-restarts-do-not-help": _check(
        "two more starts on what still stands",
        "warn above 2 % of the samples (at least 2), fail above 5 %",
        "C", 13, cost="costly", strength=True,
    ),
    "more-draws-do-not-help": _check(
        "twice the draws per gradient on what still stands",
        "warn above 2 % of the samples (at least 2), fail above 5 %",
        "C", 13, cost="costly", strength=True,
    ),
    "loss-disagreement": _check(
        "the same attack with cross-entropy, margin and DLR on what still stands",
        "warn above 2 % of the samples (at least 2), fail above 5 %",
        "T, A", 15, cost="costly", strength=True,
    ),
    "black-box-does-not-win": _check(
        "1000 queries of Square on what still stands",
        "warn above 0.2 % of the samples, fail above 2 %",
        "C, A", 20, cost="costly", strength=True,
    ),
    "frozen-randomness": _check(
        "one fixed draw, known to the attacker",
        "warn if it takes 20 points more than the attack over draws",
        "C", 25, cost="costly",
    ),
    "equal-budget": _check(
        "m times the steps with one draw each against the steps with m draws",
        "warn above 2 % of the samples (at least 2), fail above 5 %",
        "G", 26, cost="costly", strength=True,
    ),
    "stand-in-on-undefended": _check(
        "the bare model attacked with gradients that pass through the stand-in",
        "warn if fewer than half of the samples fall, fail if fewer than a tenth",
        "C", 8, cost="costly", strength=True,
    ),
    "binarisation": _check(
        "two-class heads on the pipeline's features with an adversarial example that is known to "
        "exist: does the attack find it, and a random search not",
        "fail if it finds fewer than 95 %, warn if the random search finds more than half",
        "Z", 31, cost="costly", strength=True,
    ),
    "known-broken-controls": _check(
        "the same attack on a bundled classifier, bare and behind JPEG, bit depth and Rand, which "
        "must fall, and on an adversarially trained one, which must not",
        "fail above 5 % (bare) or 15 % (behind a defense), or if more than two samples fall that "
        "AutoAttack leaves",
        "C, F", 32, cost="costly",
    ),
    "rerun-agrees": _check(
        "the attack and the judge again, against the stored rows",
        "warn if more than one of 16 samples is judged otherwise, fail above a quarter",
        "C, F", 37, 39, cost="costly",
    ),
    # --- the checks themselves ------------------------------------------------------------------
    "cost-of-checks": _check(
        "passes of the checks that ask a pipeline again, beside those of the cells that they judge",
        "warn above 1.5 times the budget of the checks",
        "F",
    ),
    # --- made by a stored run -------------------------------------------------------------------
    "one-environment": _check(
        "packages and machine of every unit of a stored run",
        "warn if there is more than one",
        "C", 37,
    ),
}  # fmt: skip


COSTLY = tuple(name for name, check in CHECKS.items() if check.cost == "costly")
"""Checks that run on request only."""

QUESTIONS = {
    1: "Are inputs, mode and outputs what attacks expect?",
    2: "Is all randomness known, and free of batch-mates and places?",
    3: "Is every sample independent of its batch?",
    4: "Does the pipeline stay the same while it is asked?",
    5: "Which parts pass no gradient, and what stands in for them?",
    6: "Do the results survive 8 bits?",
    7: "What does the defense cost without an attacker?",
    8: "Is the stand-in a good one, and does it attack the undefended model?",
    9: "Are gradients there, at the start and along the path?",
    10: "Is the loss stable around the images?",
    11: "Does the attack return what it found?",
    12: "Had the attack finished?",
    13: "Do more steps, restarts or draws help?",
    14: "Does what fools a surrogate fool the pipeline?",
    15: "Do the losses agree?",
    16: "Are budget and box kept?",
    17: "Does the attack treat samples one by one?",
    18: "Is the attack blind to shift and scale of the logits?",
    19: "Is iterating at least as strong as a single step?",
    20: "Is the white box at least as strong as the black box?",
    21: "Does the gradient beat random search?",
    22: "More budget, less accuracy: from none to all of it?",
    23: "Adaptive at least as strong as gray-box, and that as transfer?",
    24: "Is what was attacked what is judged?",
    25: "Is randomness the reason, if it fails?",
    26: "Would the same passes have been better spent on steps?",
    27: "Do the draws resolve the gradient?",
    28: "Is a random pipeline judged on fresh draws, with an interval?",
    29: "Invariance to the transforms against the gain",
    30: "What would votes change?",
    31: "Does the attack find what certainly exists?",
    32: "Do known-broken controls fall, and does the honest one stand?",
    33: "Successes against rounds, with right-censoring",
    34: "Worst case per sample within one threat model?",
    35: "Are two defenses compared on the same samples?",
    36: "Is there a threat-model card?",
    37: "Can the run be repeated from what is stored?",
    38: "Is the verdict an upper bound in words?",
    39: "Are the examples stored, and judged alike elsewhere?",
}
"""The 39 questions of an honest evaluation."""

ELSEWHERE = {
    30: "`feint evaluate --votes N` deploys and attacks votes; every cell stores its draws' counts",
    33: "the recorder keeps each sample's first success",
    34: "`feint.evaluation.verdict`, rule 1",
    35: "`feint.evaluation.metrics.mcnemar`",
    37: "`run.json`: settings, seeds, versions, device, git state, checksums, command",
    38: "`feint.evaluation.verdict`, rules 2 and 3; tested",
    39: "`examples/*.safetensors` in the run's folder",
}
"""Parts of a run, beside the checks, that answer a question."""


def _rows(rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def table(cost: Cost) -> str:
    """The checks of one cost as a Markdown table."""
    head = [("check", "what is looked at", "when it fires", "from"), ("---",) * 4]
    body = [
        (f"`{name}`", c.asks, c.threshold, c.source) for name, c in CHECKS.items() if c.cost == cost
    ]
    return _rows([*head, *body])


def coverage_table() -> str:
    """The 39 questions and what answers each, as a Markdown table."""
    body = []
    for number, question in QUESTIONS.items():
        names = [
            f"`{name}`" + (" (on request)" if c.cost == "costly" else "")
            for name, c in CHECKS.items()
            if number in c.numbers
        ]
        other = [ELSEWHERE[number]] if number in ELSEWHERE else []
        body.append((str(number), question, "; ".join([*names, *other])))
    return _rows([("", "question", "answered by"), ("---",) * 3, *body])
