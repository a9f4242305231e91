"""Intervals of means, with an arrow where the axis cuts one off."""

from __future__ import annotations

from typing import Any

from conservtl.report.text.intervals import MeanInterval

__all__ = ["CUT_OFF", "error_bar"]

CUT_OFF = "An arrow ends a bar that goes beyond the axis."
"""Sentence for captions, behind the one that says what bars are."""

_TIPS = (4, 5, 7, 6)  # matplotlib's carets, whose tips stand at the point: left, right, down, up
_NEAR = 1e-6  # share of an axis within which an end counts as inside


def error_bar(axes: Any, x: float, y: float, span: MeanInterval, *, upright: bool = False, **style: Any) -> None:
    """Draw an interval through a point, as far as the axis goes; nothing if the mean has no interval.

    Args:
        axes: matplotlib's, with the limits of the interval's axis.
        x: place of the point.
        y: place of the point.
        span: the interval.
        upright: whether it is of y; else of x.
        style: of the line: ``color``, which the arrows have too, width, alpha.
    """
    if not span.certain:
        return
    limits = axes.get_ylim() if upright else axes.get_xlim()
    ends = max(span.low, limits[0]), min(span.high, limits[1])
    points = [(x, end) if upright else (end, y) for end in ends]
    axes.plot(*zip(*points, strict=True), "-", solid_capstyle="butt", **style)
    beyond = (limits[0] - span.low, span.high - limits[1])
    for point, tip, far in zip(points, _TIPS[2 * upright :], beyond, strict=False):
        if far > _NEAR * (limits[1] - limits[0]):
            axes.plot(*point, marker=tip, markersize=6, markeredgewidth=0, color=style["color"], clip_on=False)
