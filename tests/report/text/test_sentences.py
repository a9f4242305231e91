"""Sentences and rows where a figure is missing or large."""

import pytest

from conservtl.data.shots import taken_text
from conservtl.report.figures.by_target import _targets
from conservtl.report.figures.classes import _limits
from conservtl.report.figures.frontier import frontier
from conservtl.report.figures.shots import error_by_shots
from conservtl.report.figures.trials import front
from conservtl.report.text.metrics import ACCURACY, Metric
from conservtl.report.text.summary import _drift, _parameters, _source
from conservtl.report.text.tables import agreement_rows
from conservtl.report.text.variants import variants

ERRORS = Metric("wer", "word error rate", better="lower", share=False)
UNMEASURED = {"shots": 5, "rows": [{"variant": "a", "target": None, "source": None}]}


@pytest.mark.parametrize(
    ("parameters", "text"),
    [(999_999, "999,999"), (1_500_000, "1.5 million"), (125_000_000, "125 million"), (7_200_000_000, "7.2 billion")],
)
def test_parameters_are_counted_in_words(parameters, text):
    assert _parameters(parameters) == f"{text} parameters"


def test_a_source_that_was_not_measured_before():
    report = {"before": {"source": {}}, "after": {"source": {"accuracy": 0.9}}}
    assert _source(report) == "source accuracy 90.0 % after (not measured before)"


@pytest.mark.parametrize("drift", [None, {}, {"stem": None}])
def test_a_source_without_labels_and_without_drift(drift):
    assert _drift({"drift": drift}) == "the source has no labels of its own to measure"


def test_agreement_that_was_measured_once():
    report = {"agreement": {"before": {}, "after": {"agreement": 0.75, "kl": 0.2}}}
    assert [row[1:] for row in agreement_rows(report)] == [("–", "75.0 %", ""), ("–", "0.200", "")]


def test_shots_that_are_not_known():
    assert taken_text({}) == ""


def test_what_was_not_measured_is_not_drawn():
    assert variants(UNMEASURED) == []
    assert frontier(UNMEASURED, "plane", ACCURACY, classes=True) is None
    assert error_by_shots([UNMEASURED, UNMEASURED | {"shots": 9}], UNMEASURED, ACCURACY, classes=True) is None
    assert front([]) is None
    assert _targets([]) == []


@pytest.mark.parametrize(
    ("values", "metric", "limits"),
    [
        ([1.0, 3.0], ERRORS, (0.9, 3.1)),
        ([2.0, 2.0], ERRORS, (1.5, 2.5)),
        ([62.0, 91.0], ACCURACY, (47, 102)),
        ([12.0, 91.0], ACCURACY, (7, 102)),
    ],
)
def test_both_domains_have_one_range(values, metric, limits):
    assert _limits(values, metric) == pytest.approx(limits)
