"""Intervals in figures: a line as far as the axis goes, and an arrow at an end that the axis cuts off."""

import pytest
from matplotlib.figure import Figure
from matplotlib.markers import CARETDOWN, CARETLEFT, CARETRIGHT, CARETUP

from conservtl.report.figures.marks import error_bar
from conservtl.report.text.intervals import MeanInterval


@pytest.mark.parametrize("upright", [False, True], ids=["of x", "of y"])
@pytest.mark.parametrize(
    ("low", "high", "line", "arrows"),
    [
        (92.0, 98.0, (92, 98), {}),
        (90.0, 100.0, (90, 100), {}),
        (80.0, 98.0, (90, 98), {90: (CARETLEFT, CARETDOWN)}),
        (92.0, 120.0, (92, 100), {100: (CARETRIGHT, CARETUP)}),
        (-5.0, 120.0, (90, 100), {90: (CARETLEFT, CARETDOWN), 100: (CARETRIGHT, CARETUP)}),
    ],
)
def test_an_end_beyond_the_axis_is_an_arrow_at_its_edge(upright, low, high, line, arrows):
    axes = Figure().subplots()
    (axes.set_ylim if upright else axes.set_xlim)(90, 100)
    error_bar(axes, 95.0, 95.0, MeanInterval(95.0, low, high, 5), upright=upright, color="black")
    bar, *marks = axes.lines
    along = [mark.get_ydata() if upright else mark.get_xdata() for mark in (bar, *marks)]
    assert tuple(along[0]) == line
    assert {place[0]: mark.get_marker() for place, mark in zip(along[1:], marks, strict=True)} == {
        place: shapes[upright] for place, shapes in arrows.items()
    }


def test_one_run_has_no_bar():
    axes = Figure().subplots()
    error_bar(axes, 0.5, 0.5, MeanInterval(0.5, 0.5, 0.5, 1), color="black")
    assert axes.lines[:] == []
