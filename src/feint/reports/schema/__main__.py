"""Write `evaluate.schema.json` anew, after the classes have changed."""

from pathlib import Path

from feint.reports.schema import dumped

Path(__file__).with_name("evaluate.schema.json").write_text(dumped(), encoding="utf-8")
