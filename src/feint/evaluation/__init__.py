"""Evaluation: pipelines, scenarios, the loop, the judge, metrics, and checks of itself."""

from feint.evaluation.adaptive import Candidate, candidates
from feint.evaluation.breaks import Break, known_break
from feint.evaluation.budgets import rms_budget
from feint.evaluation.cell import Cell
from feint.evaluation.curves import curve, curve_from_distances, security_curve, worst_curve
from feint.evaluation.effort import effort_curve, effort_to, fallen_by
from feint.evaluation.evaluate import Evaluation, evaluate, execute, expand, finish
from feint.evaluation.findings import Finding
from feint.evaluation.judge import Judgement, judge
from feint.evaluation.matrix import Matrix, matrix_cells, transfer_matrix
from feint.evaluation.metrics import Rate, rate
from feint.evaluation.paired import Paired, compare, paired
from feint.evaluation.papers import paper_metrics, summary
from feint.evaluation.pipeline import Pipeline
from feint.evaluation.properties import Properties, properties
from feint.evaluation.results import CellResult
from feint.evaluation.rungs import Rung, ladder, rung_cells
from feint.evaluation.scenarios import SCENARIOS, Scenario
from feint.evaluation.semi_brute_force import Campaign, semi_brute_force
from feint.evaluation.shard import Batch, Subject
from feint.evaluation.verdict import Verdict

__all__ = [
    "SCENARIOS",
    "Batch",
    "Break",
    "Campaign",
    "Candidate",
    "Cell",
    "CellResult",
    "Evaluation",
    "Finding",
    "Judgement",
    "Matrix",
    "Paired",
    "Pipeline",
    "Properties",
    "Rate",
    "Rung",
    "Scenario",
    "Subject",
    "Verdict",
    "candidates",
    "compare",
    "curve",
    "curve_from_distances",
    "effort_curve",
    "effort_to",
    "evaluate",
    "execute",
    "expand",
    "fallen_by",
    "finish",
    "judge",
    "known_break",
    "ladder",
    "matrix_cells",
    "paired",
    "paper_metrics",
    "properties",
    "rate",
    "rms_budget",
    "rung_cells",
    "security_curve",
    "semi_brute_force",
    "summary",
    "transfer_matrix",
    "worst_curve",
]
