"""A finding: what an automatic check saw, in words and numbers, beside the result it is about."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from feint.evaluation.checklist import CHECKS

__all__ = ["NOT_RUN", "Finding", "Status"]

Status = Literal["pass", "warn", "fail"]

NOT_RUN = "not run: budget"
"""How the evidence of a check begins that the budget of the checks did not allow."""


@dataclass(frozen=True)
class Finding:
    """One check of one subject.

    `fail` means that a number of this run cannot be trusted until the cause is gone; `warn` that it
    should be read with the evidence in mind.
    """

    check: str
    """Name of the check, such as `"zero-gradient"`."""
    status: Status
    subject: str
    """What was checked: a pipeline or a cell, in words."""
    evidence: str
    """What was measured, with numbers and the threshold."""
    threshold: str = ""
    """When the check warns and fails; from `feint.evaluation.checklist` unless given."""
    source: str = ""
    """Where the check is from, by the letters of `feint.evaluation.checklist.SOURCES`."""

    def __post_init__(self) -> None:
        known = CHECKS.get(self.check)
        if known is not None and not self.threshold:
            object.__setattr__(self, "threshold", known.threshold)
        if known is not None and not self.source:
            object.__setattr__(self, "source", known.source)

    @property
    def made(self) -> bool:
        """Whether the check was made; its budget may not have allowed it."""
        return not self.evidence.startswith(NOT_RUN)

    def as_dict(self) -> dict[str, str]:
        """Plain data."""
        return asdict(self)
