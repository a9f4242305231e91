"""What happened in a run: one sentence, one page, one JSON file."""

from __future__ import annotations

from conservtl.report.files import write_json
from conservtl.report.page import write_html
from conservtl.report.summary import sentence

__all__ = ["sentence", "write_html", "write_json"]
