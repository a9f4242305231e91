"""Intervals through marks, and texts at the right edge of a picture that has a row for each class, target or method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from conservtl.report.text.intervals import MeanInterval
from conservtl.report.text.metrics import Metric, signed

__all__ = ["CUT_OFF", "change_column", "error_bar", "right_column"]

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


def right_column(axes: Any, texts: Sequence[str], bold: Sequence[bool], offset: int) -> None:
    """Write a text beside each row k, at height k; it ends ``offset`` points to the right of the axes."""
    for place, (text, strong) in enumerate(zip(texts, bold, strict=True)):
        axes.annotate(
            text,
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(offset, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            weight="bold" if strong else "normal",
        )


def change_column(axes: Any, changes: Sequence[float], metric: Metric, bold: Sequence[bool], offset: int) -> None:
    """Write a change, in the shown unit, at the right end of each row, and the unit above them."""
    right_column(axes, [signed(change, metric.digits) for change in changes], bold, offset)
    unit = "points" if metric.share else "difference"
    axes.annotate(unit, (1, 1), xycoords="axes fraction", xytext=(offset, 8), textcoords="offset points", ha="right")
