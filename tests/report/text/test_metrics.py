"""Metrics: names, directions, and one score for two domains."""

import pytest

from conservtl.experiments.studies.judge import Judge
from conservtl.report.text.metrics import ACCURACY, Metric, Pair, headline, metric_named, metrics_of
from conservtl.tasks.base import Headline

WER = Metric("wer", "word error rate", "lower", share=True)
DISTANCE = Metric("distance", "distance", "lower")


def report(metric=None, **values):
    sides = {"before": {"target": values}, "after": {"target": values}}
    return sides | ({"metric": metric} if metric else {})


def test_the_score_for_both_domains():
    """The harmonic mean, 2 * 50 * 100 / 150; the mean if lower is better."""
    assert ACCURACY.combined(50, 100) == pytest.approx(66.6667, abs=1e-3)
    assert WER.combined(50, 0) == 25
    assert DISTANCE.combined(0.5, 0.1) == pytest.approx(0.3)
    assert ACCURACY.combined(0, 0) == 0


@pytest.mark.parametrize(("better", "share"), [("higher", True), ("lower", True), ("lower", False), ("higher", False)])
@pytest.mark.parametrize("values", [(0.2, 0.9), (0.0, 1.0), (0.5, 0.5)])
def test_pages_and_studies_score_both_domains_alike(better, share, values):
    """A page draws lines of equal score; the study chose its best by the same score."""
    task = Headline("m", better=better, share=share)
    metric = headline({"metric": task.as_json()})
    assert metric.combined(*map(metric.scaled, values)) == pytest.approx(metric.scaled(Judge(task).both(*values)))


def test_the_stated_metric_comes_first_with_its_own_name_and_direction():
    stated = {"key": "loss", "name": "mean squared error", "better": "lower", "share": False}
    given = report(stated, accuracy=0.5, loss=0.2, pitch=1.0)
    assert [metric.name for metric in metrics_of(given, "target")] == ["mean squared error", "accuracy", "pitch"]
    assert headline(given) == Metric("loss", "mean squared error", "lower")


def test_without_a_stated_metric_the_target_decides():
    assert headline(report(loss=0.2, wer=0.3)) == WER
    assert headline({}) == ACCURACY


def test_a_metric_of_unknown_direction_is_not_judged():
    metric = metric_named("some_score")
    assert (metric.name, metric.better) == ("some score", None)
    assert metric.verdict(Pair(0.1, 0.9)) == "unknown"
    assert metric.change(Pair(0.1, 0.9)) == "+0.800"
    assert metric.direction == "Some score"


@pytest.mark.parametrize(("metric", "verdict"), [(ACCURACY, "better"), (WER, "worse"), (DISTANCE, "worse")])
def test_the_direction_decides_the_verdict(metric, verdict):
    assert metric.verdict(Pair(0.1, 0.2)) == verdict
