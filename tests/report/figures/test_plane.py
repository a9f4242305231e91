"""The target-source plane: a value far below does not squash the others, and names do not overlap."""

from itertools import combinations

import numpy as np
import pytest
from matplotlib.figure import Figure

from conservtl.report.figures.frontier import _marks
from conservtl.report.figures.plane import PlanePoint, paint_plane, window_of
from conservtl.report.text.intervals import MeanInterval
from conservtl.report.text.metrics import ACCURACY, Metric, headline
from conservtl.report.text.variants import variants


def spans(*means, half=0.5):
    return [MeanInterval(mean, mean - half, mean + half, 5) for mean in means]


class TestWindow:
    def test_one_value_far_below_is_cut_off(self):
        """From scratch at 30 % leaves the methods between 93 and 97 % most of the axis."""
        seen = window_of(spans(30, 93, 95, 96, 97), ACCURACY)
        assert seen.cut == 93
        assert seen.low > 88
        assert seen.low < seen.edge(30) < 93 < seen.high

    def test_values_to_scale_stand_where_they_are(self):
        seen = window_of(spans(80, 85, 90, 95), ACCURACY)
        assert seen.cut == 80
        assert [seen.edge(mean) for mean in (80, 95)] == [80, 95]
        assert seen.low <= 79.5
        assert seen.high >= 95.5

    def test_what_must_be_to_scale_is(self):
        assert window_of(spans(30, 93, 95, 96), ACCURACY, to_scale=spans(30)).cut == 30

    def test_most_values_are_to_scale(self):
        """One good method does not push all others off the axis."""
        assert window_of(spans(30, 31, 32, 97), ACCURACY).cut == 30

    def test_wide_intervals_do_not_squash_the_means(self):
        """Two runs have intervals of tens of points."""
        seen = window_of([MeanInterval(mean, mean - 40, 100, 2) for mean in (94.0, 95.0, 97.0)], ACCURACY)
        assert seen.low > 85

    def test_equal_values_and_one_alone_have_an_axis(self):
        for means in ((100, 100), (0,), (50,)):
            seen = window_of(spans(*means, half=0), ACCURACY)
            assert seen.low < min(means) < seen.high or seen.low < means[0] <= seen.high


def test_no_name_in_the_frontier_covers_another(results):
    """Seventeen methods, several alike, one with a long name: as matplotlib measures them."""
    for shots in (1, 5):
        figure = Figure(figsize=(9.6, 4.8), layout="constrained")
        axes = figure.subplots()
        marks = _marks(variants(results["compare"](shots=(shots,))["tables"][0]))
        paint_plane(figure, axes, marks)
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) >= len(marks) == 17
        # A pixel of what the fonts' side bearings add.
        overlaps = [
            (axes.texts[i].get_text(), axes.texts[j].get_text())
            for (i, a), (j, b) in combinations(enumerate(boxes), 2)
            if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
        ]
        assert overlaps == []
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_in_errors_every_mark_is_where_it_is_in_accuracies(results, errors):
    """Zero error is at the upper right, as 100 % accuracy is; the ticks have the error's values."""
    result = results["compare"]()
    places, ticks = [], []
    for each in (result, errors(result)):
        figure = Figure(figsize=(9.6, 4.8), dpi=72)
        axes = figure.subplots()
        metric = headline(each)
        paint_plane(figure, axes, _marks(variants(each["tables"][0], metric)), metric=metric)
        marks = [line for line in axes.lines if len(line.get_xdata()) == 1]
        at = [
            axes.transAxes.inverted().transform(line.get_transform().transform(line.get_xydata()[0])) for line in marks
        ]
        places.append(np.array(at))
        ticks.append([label.get_text() for label in axes.get_xticklabels()])
    assert len(places[0]) == 17
    np.testing.assert_allclose(*places, atol=1e-6)
    assert "97" in ticks[0]
    assert "3" in ticks[1]


@pytest.mark.parametrize(("better", "share"), [("higher", True), ("lower", True), ("lower", False), ("higher", False)])
def test_lines_of_equal_score_have_that_score(better, share):
    """In the metric's own values at every point, whichever direction is better."""
    metric = Metric("m", "m", better, share=share)
    scale = 1.0 if share else 0.01
    points = [(scale * a, scale * b) for a, b in ((80, 90), (85, 97), (95, 82))]
    marks = [PlanePoint("", *(MeanInterval(v, v, v, 1) for v in point), "black") for point in points]
    figure = Figure(figsize=(9.6, 4.8), dpi=72)
    axes = figure.subplots()
    paint_plane(figure, axes, marks, metric=metric)
    lines = [line for line in axes.lines if len(line.get_xdata()) > 2]
    assert lines
    sign = -1 if better == "lower" else 1
    labels = [float(text.get_text().split()[0]) for text in axes.texts]
    assert labels
    scores = [{round(metric.combined(sign * x, sign * y), 6) for x, y in line.get_xydata()} for line in lines]
    assert all(len(score) == 1 for score in scores)
    assert set(labels) <= {score for (score,) in map(tuple, scores)}
