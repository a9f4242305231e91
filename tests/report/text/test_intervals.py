"""Means and intervals as they are written."""

import pytest

from conservtl.report.text.intervals import difference_span, metric_span, time_span
from conservtl.report.text.metrics import ACCURACY, signed


def test_no_end_of_a_share_lies_where_no_share_can():
    """Student's interval of two runs is often wider than what can be."""
    span = metric_span({"mean": 0.96, "low": 0.71, "high": 1.21, "count": 2})
    assert (span.text(), span.ends()) == ("96.0", "71.0–100.0")
    assert metric_span({"mean": 0.1, "low": -0.3, "high": 0.5, "count": 2}).low == 0
    assert time_span({"mean": 2.0, "low": -26.0, "high": 31.0, "count": 2}).low == 0


def test_a_difference_keeps_its_sign():
    span = difference_span({"mean": -0.004, "low": -0.012, "high": 0.003, "count": 20})
    assert (span.signed(), span.signed_ends()) == ("−0.4", "−1.2 to +0.3")
    assert [signed(value) for value in (0.04, -0.04, 0.06)] == ["±0.0", "±0.0", "+0.1"]


def test_one_value_has_no_interval():
    for value in (0.5, *({"mean": 0.5, "low": 0.5, "high": 0.5, "count": count} for count in (1, 3))):
        span = metric_span(value)
        assert (span.text(), span.ends(), span.certain) == ("50.0", "", False)


@pytest.mark.parametrize("value", [None, float("nan"), {"mean": None, "low": 0, "high": 1, "count": 2}])
def test_what_was_not_measured_is_none(value):
    assert metric_span(value) is None


def test_the_ends_are_in_the_unit_of_the_mean():
    span = metric_span({"mean": 0.5, "low": 0.4, "high": 0.7, "count": 3})
    assert (span.low, span.high) == (pytest.approx(40), pytest.approx(70))


def test_the_harmonic_mean_of_nothing_is_nothing():
    assert ACCURACY.combined(0, 0) == 0
    assert ACCURACY.combined(100, 50) == pytest.approx(200 / 3)
