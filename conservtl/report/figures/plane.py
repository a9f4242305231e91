"""The plane of source and target metric, in which every method is a point; up and to the right is better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from conservtl.report.figures.canvas import GREY, INK, PALE, bare
from conservtl.report.figures.labels import Label, annotate
from conservtl.report.figures.marks import error_bar
from conservtl.report.text.intervals import MeanInterval
from conservtl.report.text.metrics import ACCURACY, Metric, true_minus

__all__ = ["PlanePoint", "Window", "metric_axis", "paint_plane", "window_of"]

_MARGIN = 0.6  # of the means' own range, that intervals may add on each side
_LEAST_SPAN = 4.0  # percentage points that an axis spans at least: less is noise
_LEAST_SHARE = 0.05  # of the largest value, that an axis of a metric without bounds spans at least
_GAP = 1.5  # a gap this many times as wide as the range above it is cut out


@dataclass(frozen=True)
class PlanePoint:
    """One point of the plane.

    Args:
        name: written beside it; empty: no name.
        source: in the shown unit.
        target: in the shown unit.
        colour: of the mark.
        ink: of the name.
        shape: matplotlib's marker.
        strong: whether it is a method in question, and not a baseline.
        to_scale: whether it must not be cut off at the edge.
        hollow: whether it is drawn as an outline.
    """

    name: str
    source: MeanInterval
    target: MeanInterval
    colour: str
    ink: str = INK
    shape: str = "o"
    strong: bool = False
    to_scale: bool = False
    hollow: bool = False


@dataclass(frozen=True)
class Window:
    """Range of an axis from ``low`` to ``high``; values below ``cut`` are drawn at its edge."""

    low: float
    high: float
    cut: float

    def edge(self, value: float) -> float:
        """Return where a value is drawn."""
        return value if value >= self.cut else self.low + 0.03 * (self.high - self.low)


def window_of(spans: Sequence[MeanInterval], metric: Metric, to_scale: Sequence[MeanInterval] = ()) -> Window:
    """Return the range of an axis of this metric, so that one value far below does not squash the others.

    Higher is better on the axis: values are mirrored if lower is better (see ``metric_axis``). Those of ``to_scale``
    must not be cut off.
    """
    bottom, top = metric.bounds
    if metric.better == "lower":
        bottom, top = -top, -bottom
    least = _LEAST_SPAN if metric.share else _LEAST_SHARE * max(abs(span.mean) for span in spans) or 1.0
    means = sorted(span.mean for span in spans)
    lowest = min((span.mean for span in to_scale), default=means[-1])
    cut = means[0]
    for below, above in pairwise(means):
        half = sum(mean >= above for mean in means) * 2 >= len(means)
        if half and above <= lowest and above - below > max(least, _GAP * (means[-1] - above)):
            cut = above
    shown = [span for span in spans if span.mean >= cut]
    reach = max(least, means[-1] - cut)
    low = max(cut - _MARGIN * reach, min(span.low for span in shown))
    high = min(means[-1] + _MARGIN * reach, max(span.high for span in shown))
    pad = 0.06 * max(least, high - low)
    if cut > means[0]:
        pad *= 2.5  # room for the marks at the edge
    return Window(max(low - pad, bottom - 0.02 * reach), min(high + pad, top + 0.02 * reach), cut)


def metric_axis(axis: Any, metric: Metric) -> None:
    """Label an axis on which a metric is negated if lower is better, so that up and to the right is better."""
    if metric.better == "lower":
        axis.set_major_formatter(lambda value, _: true_minus(f"{-value:.6g}" if value else "0"))


def paint_plane(
    figure: Any,
    axes: Any,
    marks: Sequence[PlanePoint],
    paths: Iterable[tuple[Sequence[PlanePoint], str, str]] = (),
    metric: Metric = ACCURACY,
) -> None:
    """Draw marks with their intervals, lines of equal combined score, and names.

    The most important mark comes first. Marks of a path are joined in order, with a colour and a stroke.
    """
    paths = [([_upward(mark, metric) for mark in path], colour, stroke) for path, colour, stroke in paths]
    every = [*(_upward(mark, metric) for mark in marks), *(mark for path, _, _ in paths for mark in path)]
    across = window_of([mark.source for mark in every], metric, [mark.source for mark in every if mark.to_scale])
    up = window_of([mark.target for mark in every], metric, [mark.target for mark in every if mark.to_scale])
    axes.set_xlim(across.low, across.high)
    axes.set_ylim(up.low, up.high)
    _equal_scores(axes, across, up, metric)
    lines = []
    for path, colour, stroke in paths:
        corners = [(across.edge(mark.source.mean), up.edge(mark.target.mean)) for mark in path]
        axes.plot(*zip(*corners, strict=True), stroke, color=colour, linewidth=2)
        lines.append(corners)
    for mark in reversed(every):
        lines += _mark(axes, mark, across, up)
    kept = "" if metric.better == "lower" else " kept"
    axes.set_xlabel(metric.with_unit(f"source {metric.name}{kept}"))
    axes.set_ylabel(metric.with_unit(f"target {metric.name}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(nbins=7, steps=[1, 2, 5, 10])
        metric_axis(axis, metric)
    bare(axes, grid="y")
    axes.grid(visible=False)
    axes.spines["left"].set_visible(True)
    axes.spines[["left", "bottom"]].set_color(GREY)
    annotate(figure, axes, [_label(mark, across, up, metric) for mark in every if mark.name], lines)


def _upward(mark: PlanePoint, metric: Metric) -> PlanePoint:
    """Return the mark with negated values if lower is better."""
    if metric.better != "lower":
        return mark
    return replace(mark, source=mark.source.mirrored(), target=mark.target.mirrored())


def _mark(axes: Any, mark: PlanePoint, across: Window, up: Window) -> list[list[tuple[float, float]]]:
    """Draw one mark; return its error bars as lines."""
    x, y = across.edge(mark.source.mean), up.edge(mark.target.mean)
    size = 8 if mark.strong else 7 if mark.name else 4.5
    if x != mark.source.mean or y != mark.target.mean:
        # Beyond the edge: a triangle points to where the mark would be.
        shape = (3, 0, 90) if y == mark.target.mean else (3, 0, 180) if x == mark.source.mean else (3, 0, 135)
        axes.plot([x], [y], marker=shape, markersize=size + 1, color=mark.colour, linestyle="none")
        return []
    style: dict[str, Any] = {"color": mark.colour, "linewidth": 1.2, "alpha": 0.55 if mark.strong else 0.4}
    error_bar(axes, x, y, mark.source, **style)
    error_bar(axes, x, y, mark.target, upright=True, **style)
    face = "white" if mark.hollow else mark.colour
    axes.plot([x], [y], mark.shape, markersize=size, color=face, markeredgecolor=mark.colour, clip_on=False, zorder=3)
    return [
        [(max(across.low, mark.source.low), y), (min(across.high, mark.source.high), y)],
        [(x, max(up.low, mark.target.low)), (x, min(up.high, mark.target.high))],
    ]


def _label(mark: PlanePoint, across: Window, up: Window, metric: Metric) -> Label:
    """Return the mark's name, with the values that lie beyond the edge."""
    beyond = [
        f"{name} {metric.show_scaled(-span.mean if metric.better == 'lower' else span.mean)}"
        for name, span, axis in (("source", mark.source, across), ("target", mark.target, up))
        if span.mean < axis.cut
    ]
    text = f"{mark.name} ({', '.join(beyond)})" if beyond else mark.name
    at = (across.edge(mark.source.mean), up.edge(mark.target.mean))
    return Label(text, at, mark.ink, "bold" if mark.strong else "normal")


def _equal_scores(axes: Any, across: Window, up: Window, metric: Metric) -> None:
    """Draw faint lines of equal combined score, labelled at the right edge."""
    lower = metric.better == "lower"

    def height(level: float, x: float) -> float | None:
        if lower:
            return 2 * level - x
        return level * x / (2 * x - level) if 2 * x > 1.01 * level else None

    corners = [(across.low, up.low), (across.high, up.high)]
    least, most = (metric.combined(x, y) if lower else metric.combined(max(0.0, x), max(0.0, y)) for x, y in corners)
    named = False
    for level in _levels(least, most, metric):
        xs = [across.low + (across.high - across.low) * k / 60 for k in range(61)]
        points = [(x, y) for x in xs if (y := height(level, x)) is not None]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), color=PALE, linewidth=0.9, zorder=0.5)
        if up.low <= points[-1][1] <= up.high:
            value = true_minus(f"{-level if lower and level else level:.6g}")
            text = value if named else f"{value} {metric.combination}"
            named = True
            axes.annotate(
                text,
                points[-1],
                xytext=(4, 0),
                textcoords="offset points",
                color=GREY,
                size=8,
                va="center",
                annotation_clip=False,
            )


def _levels(low: float, high: float, metric: Metric) -> list[float]:
    """Return at most seven round numbers between two scores."""
    steps = [digit * 10.0**power for power in range(-6, 7) for digit in (1, 2, 5)]
    least = 0.5 if metric.share else 0.0
    step = next((step for step in steps if step >= least and (high - low) / step <= 7), steps[-1])
    levels = [step * k for k in range(math.floor(low / step) + 1, math.floor(high / step) + 1)]
    return [level for level in levels if not metric.share or level < 100]
