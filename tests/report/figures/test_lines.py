"""Target and source as two lines, named at their ends."""

import pytest
from matplotlib.figure import Figure

from conservtl.report.figures.curves import draw_lines
from conservtl.report.text.metrics import Metric


@pytest.mark.parametrize("ends", [(80.0, 80.0), (80.0, 80.5), (80.5, 80.0), (80.0, 82.5), (80.0, 84.0), (60.0, 95.0)])
def test_the_two_names_do_not_overlap(ends):
    figure = Figure(figsize=(9.6, 3.2), layout="constrained", dpi=72)
    axes = figure.subplots()
    lines = {name: [(0.0, 50.0), (10.0, end)] for name, end in zip(("target", "source"), ends, strict=True)}
    draw_lines(axes, lines, Metric("accuracy", "accuracy", share=True), None)
    figure.draw_without_rendering()
    first, second = (text.get_window_extent() for text in axes.texts)
    assert min(first.y1, second.y1) - max(first.y0, second.y0) <= 0.5
    names = [f"{name} {points[-1][1]:.1f} %" for name, points in lines.items()]
    assert [text.get_text() for text in axes.texts] == names
