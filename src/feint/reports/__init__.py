"""Reports of an evaluation: the table in a terminal, one HTML file, figures, Markdown.

Everything is made from a `ReportData`. `feint.reports.html` and `feint.reports.figures` are left to
be imported where they are used: they load jinja2 and matplotlib.
"""

from feint.reports.data import Claim, ReportData
from feint.reports.markdown import markdown
from feint.reports.stored import from_run
from feint.reports.terminal import render, table

__all__ = ["Claim", "ReportData", "from_run", "markdown", "render", "table"]
