"""The column of texts at the right edge of a picture that has a row for each class, target or method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from conservtl.report.text.metrics import Metric, signed

__all__ = ["change_column", "right_column"]


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
