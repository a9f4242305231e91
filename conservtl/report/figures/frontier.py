"""The frontier: the target's gain against what the source keeps, one mark a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from conservtl.errors import counted
from conservtl.report.figures.canvas import Picture, bare, draw, shorten
from conservtl.report.figures.marks import CUT_OFF, error_bar, right_column
from conservtl.report.figures.plane import PlanePoint, metric_axis, paint_plane, window_of
from conservtl.report.text.examples import shots_of
from conservtl.report.text.metrics import ACCURACY, Metric
from conservtl.report.text.variants import VariantResult, variants

__all__ = ["frontier"]

_NAME = 34  # characters of a method's name


def frontier(table: Mapping[str, Any], name: str, metric: Metric = ACCURACY, *, classes: bool = True) -> Picture | None:
    """Draw one mark a method with its interval in both directions; of the target alone if the source has no data."""
    rows, where = variants(table, metric), shots_of(table, classes=classes)
    if not rows:
        return None
    marks = _marks(rows)
    title = f"{metric.name} of {counted(len(rows), 'method')}, {where}."
    if not marks:
        svg = draw(
            name, f"Target {title}", 0.27 * len(rows) + 0.9, lambda figure: _dots(figure.subplots(), rows, metric)
        )
        caption = f"Grey: baselines, the best of them black. Arrows at the edge: beyond it. {_intervals(rows)}"
        return Picture(f"Target {metric.name}, {where}", caption, svg)
    caption = (
        "Up and to the right is better. Grey: baselines, the best of them black; open diamond: the source as it is. "
        f"Thin lines: equal {metric.with_unit(metric.combination)}. {_intervals(rows)} "
        "Arrows at the edge: beyond it, value written."
    )
    svg = draw(
        name,
        f"Target against source {title}",
        4.8,
        lambda figure: paint_plane(figure, figure.subplots(), marks, metric=metric),
    )
    return Picture(f"What the target gains, what the source keeps, {where}", caption, svg)


def _intervals(rows: Sequence[VariantResult]) -> str:
    counts = sorted({row.target.count for row in rows})
    if counts == [1]:
        return "One run each, so there are no intervals."
    runs = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"Bars: 95 % intervals of the mean over {runs} runs. {CUT_OFF}"


def _marks(rows: Sequence[VariantResult]) -> list[PlanePoint]:
    """Return the marks, the best method first: its name is placed first."""
    order = sorted(rows, key=lambda row: (row.baseline, not row.best, not row.untrained, -row.rank))
    return [
        PlanePoint(
            shorten(row.name, _NAME),
            row.source,
            row.target,
            row.colour,
            row.ink,
            row.shape,
            strong=not row.baseline,
            to_scale=row.best,
            hollow=row.untrained,
        )
        for row in order
        if row.source is not None
    ]


def _dots(axes: Any, rows: Sequence[VariantResult], metric: Metric) -> None:
    """Draw one row a method, the best first."""
    order = sorted(rows, key=lambda row: -metric.rank(row.target.mean))
    spans = [row.target.mirrored() if metric.better == "lower" else row.target for row in order]
    axis = window_of(spans, metric, [span for span, row in zip(spans, order, strict=True) if row.best])
    axes.set_xlim(axis.low, axis.high)
    for place, (row, span) in enumerate(zip(order, spans, strict=True)):
        x = axis.edge(span.mean)
        beyond = x != span.mean
        if not beyond:
            error_bar(axes, x, place, span, color=row.colour, linewidth=1.5)
        face = "white" if row.untrained else row.colour
        shape = (3, 0, 90) if beyond else row.shape
        axes.plot([x], [place], marker=shape, markersize=7, color=face, markeredgecolor=row.colour, zorder=3)
    right_column(axes, [row.target.text() for row in order], [not row.baseline for row in order], 36)
    axes.set_yticks(range(len(order)), [shorten(row.name, _NAME) for row in order])
    for label, row in zip(axes.get_yticklabels(), order, strict=True):
        label.set(color=row.ink, weight="normal" if row.baseline else "bold")
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xlabel(metric.with_unit(f"target {metric.name}"))
    metric_axis(axes.xaxis, metric)
    bare(axes, grid="x")
