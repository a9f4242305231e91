"""Reports of runs and studies: sentences, pages, JSON files."""

from __future__ import annotations

from conservtl.report.pages.comparison_page import write_compare
from conservtl.report.pages.range_test_page import check_picture, range_test_sentence, write_range_test
from conservtl.report.pages.run_page import write_html
from conservtl.report.pages.sweep_page import write_sweep
from conservtl.report.pages.tuning_page import write_tune
from conservtl.report.run_report import RunReport
from conservtl.report.text.report_json import write_json
from conservtl.report.text.summary import NO_SOURCE_HEAD, left_out_notes, sentence
from conservtl.report.text.tensorboard import write_tensorboard

__all__ = [
    "NO_SOURCE_HEAD",
    "RunReport",
    "check_picture",
    "left_out_notes",
    "range_test_sentence",
    "sentence",
    "write_compare",
    "write_html",
    "write_json",
    "write_range_test",
    "write_sweep",
    "write_tensorboard",
    "write_tune",
]
