"""Evaluation: pipelines, scenarios, the loop, the judge, metrics, and checks of itself."""

from feint.evaluation.cell import Cell
from feint.evaluation.curves import curve, curve_from_distances, security_curve
from feint.evaluation.evaluate import Evaluation, evaluate, execute, expand, finish
from feint.evaluation.findings import Finding
from feint.evaluation.judge import Judgement, judge
from feint.evaluation.metrics import Rate, rate
from feint.evaluation.papers import paper_metrics, summary
from feint.evaluation.pipeline import Pipeline
from feint.evaluation.properties import Properties, properties
from feint.evaluation.results import CellResult
from feint.evaluation.scenarios import SCENARIOS, Scenario
from feint.evaluation.shard import Batch, Subject
from feint.evaluation.verdict import Verdict

__all__ = [
    "SCENARIOS",
    "Batch",
    "Cell",
    "CellResult",
    "Evaluation",
    "Finding",
    "Judgement",
    "Pipeline",
    "Properties",
    "Rate",
    "Scenario",
    "Subject",
    "Verdict",
    "curve",
    "curve_from_distances",
    "evaluate",
    "execute",
    "expand",
    "finish",
    "judge",
    "paper_metrics",
    "properties",
    "rate",
    "security_curve",
    "summary",
]
