"""Names in pictures: none covers another, none covers a mark."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from conservtl.report.figures.labels import Box, legend_beside, place

AREA = Box(0, 0, 720, 330)
marks = st.tuples(st.floats(10, 710), st.floats(10, 320))


class TestPlace:
    @settings(max_examples=25, deadline=None)
    @given(st.lists(marks, min_size=1, max_size=12), st.lists(st.floats(20, 180), min_size=12, max_size=12))
    def test_no_name_covers_another_or_a_mark_or_leaves_the_picture(self, at, widths):
        sizes = [(width, 11.0) for width in widths[: len(at)]]
        boxes = place(at, sizes, AREA)
        assert not any(one.meets(other) for one, other in combinations(boxes, 2))
        assert all(box.within(AREA) for box in boxes)
        assert not any(box.holds(mark) for box in boxes for mark in at)
        assert [(round(b.right - b.left, 6), round(b.top - b.bottom, 6)) for b in boxes] == [
            (round(w, 6), h) for w, h in sizes
        ]

    def test_a_name_alone_stands_right_beside_its_mark(self):
        (box,) = place([(300, 100)], [(80, 11)], AREA)
        assert box.left == pytest.approx(308)
        assert box.bottom < 100 < box.top

    def test_a_name_makes_way_for_a_line(self):
        """An error bar to the right of the mark sends the name elsewhere."""
        bar = [(300 + 5 * step, 100.0) for step in range(30)]
        (box,) = place([(300, 100)], [(80, 11)], AREA, bar)
        assert not any(box.holds(point) for point in bar)

    def test_the_same_place_many_times(self):
        """Twelve methods with one result each keep a name of their own."""
        boxes = place([(360, 160)] * 12, [(120, 11)] * 12, AREA)
        assert not any(one.meets(other) for one, other in combinations(boxes, 2))


def test_a_legend_lists_lines_from_the_highest_end_to_the_lowest():
    axes = Figure().subplots()
    lines = [axes.plot([0, 1], [9, end], label=name)[0] for name, end in (("middle", 2), ("low", 1), ("high", 3))]
    legend_beside(axes, [(line, "#123456", "bold") for line in lines])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["high", "middle", "low"]
