"""Checks that an evaluation runs on itself: is the number trustworthy, and if not, why.

`declare` and `check_pipeline` look at the pipelines, `check_cell` at one cell's rows,
`check_across` at the rows of several, and `plan` lists the small experiments that try the strongest
attack again, for `budget` to choose from; costly ones come on request. `check` makes all. Every
check yields a `Finding` whether it passes or not, with its numbers, its threshold and its source;
`feint.evaluation.checklist` lists them all.

References:
    Carlini et al., "On evaluating adversarial robustness", 2019; Pintor et al., "Indicators of
    attack failure", NeurIPS 2022; Croce & Hein, AutoAttack's `checks`, 2020.
"""

from feint.evaluation.health.across import check_across
from feint.evaluation.health.cells import check_cell
from feint.evaluation.health.declare import Undeclared, declare
from feint.evaluation.health.gradients import check_gradient
from feint.evaluation.health.pipelines import check_pipeline
from feint.evaluation.health.run import PROBE, SAMPLES, check

__all__ = [
    "PROBE",
    "SAMPLES",
    "Undeclared",
    "check",
    "check_across",
    "check_cell",
    "check_gradient",
    "check_pipeline",
    "declare",
]
