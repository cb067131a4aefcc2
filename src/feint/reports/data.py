"""What every report is made from: an evaluation, where it came from, and what was published."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from feint.core.errors import RangeError
from feint.evaluation import Cell, CellResult, Evaluation, Finding, Rate, Verdict
from feint.evaluation.results import by_deployment

if TYPE_CHECKING:
    from feint.reports.attached import Attached

__all__ = [
    "Claim",
    "Deployment",
    "Gradients",
    "Images",
    "ReportData",
    "Seen",
    "Threat",
    "Views",
    "threats",
]

Images = Callable[[CellResult, Sequence[int]], tuple[Tensor, Tensor]]
"""Clean and adversarial images, (k, C, H, W) each, of a cell's rows at the given positions."""
Gradients = Callable[[CellResult, Sequence[int]], Tensor | None]
"""Input gradients at the clean images, (k, C, H, W), of the view that the cell's attacker has; none
if no gradient reaches the input."""
Views = Callable[[CellResult, Sequence[int]], "Seen"]
"""What a cell's judged pipeline makes of the adversarial images of rows."""
Deployment = tuple[str, str, int, str]
"""What is deployed: model, defense, votes, how votes are combined."""
Threat = tuple[str, float, bool]
"""Norm, eps, targeted."""


@dataclass(frozen=True)
class Seen:
    """What a judged pipeline sees and thinks of images.

    Attributes:
        defended: (k, C, H, W) what the model gets behind the defense, on the judge's first draw;
            None where there is no defense, or one that does not give images.
        probability: (k, K) mean class probabilities over the judge's first draws.
    """

    defended: Tensor | None
    probability: Tensor


@dataclass(frozen=True)
class Claim:
    """A published number, put beside the cells that it is about.

    Convention:
        `value` is a share in [0, 1]. S0's "defense success rate" is a share *of the bare model's
        clean accuracy*: give it with `of_clean=True`, and reports show it as the accuracy that it
        would mean for the clean accuracy measured here, and say so.

    Args:
        value: The published number, in [0, 1].
        source: Where it stands, in words: "ACE, Table 3 (ResNet-18)".
        model: Model that it is about; empty for any.
        defense: Defense that it is about; empty for any.
        scenario: Scenario that it is about.
        attack: Attack that it is about, as its cell spells it; empty for any.
        of_clean: Whether the number is a share of clean accuracy.
        cell: The one cell that it is about; the four above then do not count.

    Raises:
        RangeError: If `value` lies outside [0, 1].
    """

    value: float
    source: str
    model: str = ""
    defense: str = ""
    scenario: str = "gray-box"
    attack: str = ""
    of_clean: bool = False
    cell: Cell | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.value <= 1:
            raise RangeError(
                f"claim {self.value} of {self.source!r}; expected a share in [0, 1]: "
                "divide a percentage by 100"
            )

    def about(self, result: CellResult) -> bool:
        """Whether the claim is about this cell."""
        cell = result.cell
        if self.cell is not None:
            return cell == self.cell
        return cell.scenario == self.scenario and all(
            not mine or mine == its
            for mine, its in (
                (self.model, cell.model),
                (self.defense, cell.defense),
                (self.attack, cell.attack),
            )
        )

    def accuracy(self, clean: Rate | None) -> float | None:
        """The claim as an accuracy; none if it is a share of a clean accuracy nobody measured."""
        if not self.of_clean:
            return self.value
        return None if clean is None else self.value * clean.value

    def words(self) -> str:
        """The number as it was published, and its source."""
        what = " of clean accuracy" if self.of_clean else ""
        return f"{100 * self.value:.1f} %{what}, {self.source}"


@dataclass(frozen=True)
class ReportData:
    """Everything that a report shows; only the first three are needed.

    Args:
        results: Cells of the table.
        findings: What the evaluation found about itself.
        verdict: What follows from both.
        metadata: Plain data of the run (settings, versions, device); shown whole, in order.
        claims: Published numbers.
        curve: More cells, at other budgets, for accuracy against eps; not in the table.
        images: Gives images of chosen rows; without it the report has no pictures.
        gradients: Gives input gradients of chosen rows; without it there are no heat maps.
        views: Gives what judged pipelines see and think of chosen rows' images.
        diagnosis: Where gradients and perturbations go, if that was looked at.
        class_names: Names of the classes, in order; numbers are shown where there are none.
        command: The exact command that makes the run again.
        run: The run's directory, as text.
        html: Where the HTML page is, as text.
        title: Title of the page.

    Example:
        >>> from feint.evaluation.verdict import conclude
        >>> ReportData([], [], conclude([], [])).verdict.withheld
        True
    """

    results: Sequence[CellResult]
    findings: Sequence[Finding]
    verdict: Verdict
    metadata: Mapping[str, object] = field(default_factory=dict)
    claims: Sequence[Claim] = ()
    curve: Sequence[CellResult] = ()
    images: Images | None = None
    gradients: Gradients | None = None
    views: Views | None = None
    diagnosis: Attached | None = None
    class_names: Sequence[str] = ()
    command: str = ""
    run: str = ""
    html: str = ""
    title: str = "Feint evaluation"

    @classmethod
    def of(cls, evaluation: Evaluation, **others: object) -> ReportData:
        """The report of an evaluation held in memory; `others` are the remaining fields."""
        return cls(evaluation.results, evaluation.findings, evaluation.verdict, **others)  # type: ignore[arg-type]

    def pipelines(self) -> dict[Deployment, list[CellResult]]:
        """The table's cells by what is deployed, in order of appearance."""
        return by_deployment(self.results)

    def clean(self, result: CellResult) -> CellResult | None:
        """The cell without attacker of the same deployed pipeline."""
        (key,) = by_deployment([result])
        group = self.pipelines().get(key, [])
        return next((r for r in group if r.cell.scenario == "none"), None)

    def reference(self, result: CellResult) -> CellResult | None:
        """The bare model's cell without attacker, of which S0's rates are shares.

        The pipeline's own where the bare model was not judged.
        """
        model = result.cell.model
        bare = self.pipelines().get((model, "none", 1, "mean_probability"), [])
        return next((r for r in bare if r.cell.scenario == "none"), None) or self.clean(result)

    def claim(self, result: CellResult) -> Claim | None:
        """The first claim about a cell."""
        return next((c for c in self.claims if c.about(result)), None)

    def worth(self, claim: Claim, result: CellResult) -> float | None:
        """What a claim about a cell means as an accuracy here; none if that cannot be said."""
        clean = self.reference(result)
        return claim.accuracy(None if clean is None else clean.accuracy)

    def class_name(self, label: int) -> str:
        """A class in words."""
        return self.class_names[label] if 0 <= label < len(self.class_names) else f"class {label}"


def threats(results: Sequence[CellResult]) -> list[Threat]:
    """The threat models of attacked cells, in order of appearance."""
    return list(
        dict.fromkeys(
            (r.cell.norm, r.cell.eps, r.cell.targeted) for r in results if r.cell.attack != "none"
        )
    )
