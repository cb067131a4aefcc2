"""A finding: what an automatic check saw, in words and numbers, beside the result it is about."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

__all__ = ["Finding", "Status"]

Status = Literal["pass", "warn", "fail"]


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

    def as_dict(self) -> dict[str, str]:
        """Plain data."""
        return asdict(self)
