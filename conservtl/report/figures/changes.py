"""The column of changes at the right edge of a picture that has a row for each class or target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from conservtl.report.text.metrics import Metric, signed

__all__ = ["change_column"]


def change_column(axes: Any, changes: Sequence[float], metric: Metric, bold: Sequence[bool], offset: int) -> None:
    """Write a change, in the shown unit, at the right end of each row, and the unit above them.

    Row k is at height k; ``offset`` is the distance of the column's right end from the axes, in points.
    """
    for place, (change, strong) in enumerate(zip(changes, bold, strict=True)):
        axes.annotate(
            signed(change, metric.digits),
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(offset, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            weight="bold" if strong else "normal",
        )
    unit = "points" if metric.share else "difference"
    axes.annotate(unit, (1, 1), xycoords="axes fraction", xytext=(offset, 8), textcoords="offset points", ha="right")
