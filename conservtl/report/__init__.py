"""What happened in a run, or in many: sentences, pages, files that are whole."""

from __future__ import annotations

from conservtl.report.compare import write_compare
from conservtl.report.files import write_json
from conservtl.report.page import write_html
from conservtl.report.range_test import check_picture, range_test_sentence, write_range_test
from conservtl.report.summary import sentence
from conservtl.report.sweep import write_sweep
from conservtl.report.tensorboard import write_tensorboard
from conservtl.report.tune import write_tune

__all__ = [
    "check_picture",
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
