"""The plane of source accuracy kept and target accuracy, in which every method is a point."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from conservtl.report.figures.canvas import GREY, INK, PALE, bare
from conservtl.report.figures.labels import Label, annotate
from conservtl.report.text.intervals import Span, harmonic

__all__ = ["PlanePoint", "Window", "paint_plane", "window"]

_ROOM = 0.6  # of the means' own range, that intervals may add on each side
_LEAST = 4.0  # points an axis spans at least: less is noise
_GAP = 1.5  # a gap this many times as wide as all that lies above it is not drawn to scale


@dataclass(frozen=True)
class PlanePoint:
    """One point of the plane.

    Args:
        name: written beside it; empty: nothing is.
        source: in per cent.
        target: in per cent.
        colour: of the mark.
        ink: of the name.
        shape: matplotlib's marker.
        strong: whether it is what is asked about, not what that is held against.
        keep: whether it must be drawn to scale.
        hollow: whether it is drawn as an outline.
    """

    name: str
    source: Span
    target: Span
    colour: str
    ink: str = INK
    shape: str = "o"
    strong: bool = False
    keep: bool = False
    hollow: bool = False


@dataclass(frozen=True)
class Window:
    """What an axis shows: values from ``low`` to ``high``; what lies below ``cut`` stands at its edge."""

    low: float
    high: float
    cut: float

    def edge(self, value: float) -> float:
        """Where a value stands."""
        return value if value >= self.cut else self.low + 0.03 * (self.high - self.low)


def window(spans: Sequence[Span], keep: Sequence[Span] = (), bottom: float = 0.0, top: float = 100.0) -> Window:
    """What an axis shows, so that one value far below does not squash the rest.

    Args:
        spans: everything on the axis.
        keep: what must be drawn to scale.
        bottom: no value lies below.
        top: no value lies above.
    """
    means = sorted(span.mean for span in spans)
    kept = min((span.mean for span in keep), default=means[-1])
    cut = means[0]
    for below, above in pairwise(means):
        half = sum(mean >= above for mean in means) * 2 >= len(means)
        if half and above <= kept and above - below > max(_LEAST, _GAP * (means[-1] - above)):
            cut = above
    shown = [span for span in spans if span.mean >= cut]
    reach = max(_LEAST, means[-1] - cut)
    low = max(cut - _ROOM * reach, min(span.low for span in shown))
    high = min(means[-1] + _ROOM * reach, max(span.high for span in shown))
    pad = 0.06 * max(_LEAST, high - low)
    if cut > means[0]:
        pad *= 2.5  # room for what stands at the edge
    return Window(max(low - pad, bottom - 0.02 * reach), min(high + pad, top + 0.02 * reach), cut)


def paint_plane(
    figure: Any, axes: Any, marks: Sequence[PlanePoint], paths: Iterable[tuple[Sequence[PlanePoint], str, str]] = ()
) -> None:
    """Draw marks with their intervals, lines of equal harmonic mean, and names.

    Args:
        figure: the figure, laid out at the end.
        axes: matplotlib's.
        marks: most important first.
        paths: marks joined in order, with a colour and a stroke.
    """
    paths = list(paths)
    every = [*marks, *(mark for path, _, _ in paths for mark in path)]
    keep = [mark for mark in every if mark.keep]
    across = window([mark.source for mark in every], [mark.source for mark in keep])
    up = window([mark.target for mark in every], [mark.target for mark in keep])
    axes.set_xlim(across.low, across.high)
    axes.set_ylim(up.low, up.high)
    _equal(axes, across, up)
    lines = []
    for path, colour, stroke in paths:
        corners = [(across.edge(mark.source.mean), up.edge(mark.target.mean)) for mark in path]
        axes.plot(*zip(*corners, strict=True), stroke, color=colour, linewidth=2)
        lines.append(corners)
    for mark in reversed(every):
        lines += _mark(axes, mark, across, up)
    axes.set_xlabel("source accuracy kept (%)")
    axes.set_ylabel("target accuracy (%)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(nbins=7, steps=[1, 2, 5, 10])
    bare(axes, grid="y")
    axes.grid(visible=False)
    axes.spines["left"].set_visible(True)
    axes.spines[["left", "bottom"]].set_color(GREY)
    annotate(figure, axes, [_label(mark, across, up) for mark in every if mark.name], lines)


def _mark(axes: Any, mark: PlanePoint, across: Window, up: Window) -> list[list[tuple[float, float]]]:
    """Draw one mark; returns its error bars as lines."""
    x, y = across.edge(mark.source.mean), up.edge(mark.target.mean)
    size = 8 if mark.strong else 7 if mark.name else 4.5
    if x != mark.source.mean or y != mark.target.mean:
        # Beyond the edge: an arrow says where.
        shape = (3, 0, 90) if y == mark.target.mean else (3, 0, 180) if x == mark.source.mean else (3, 0, 135)
        axes.plot([x], [y], marker=shape, markersize=size + 1, color=mark.colour, linestyle="none")
        return []
    bars = {"fmt": "none", "ecolor": mark.colour, "elinewidth": 1.2, "alpha": 0.55 if mark.strong else 0.4}
    axes.errorbar(
        [x],
        [y],
        xerr=mark.source.bars if mark.source.certain else None,
        yerr=mark.target.bars if mark.target.certain else None,
        **bars,
    )
    face = "white" if mark.hollow else mark.colour
    axes.plot([x], [y], mark.shape, markersize=size, color=face, markeredgecolor=mark.colour, clip_on=False, zorder=3)
    return [
        [(max(across.low, mark.source.low), y), (min(across.high, mark.source.high), y)],
        [(x, max(up.low, mark.target.low)), (x, min(up.high, mark.target.high))],
    ]


def _label(mark: PlanePoint, across: Window, up: Window) -> Label:
    beyond = [
        f"{name} {span.text()} %"
        for name, span, axis in (("source", mark.source, across), ("target", mark.target, up))
        if span.mean < axis.cut
    ]
    text = f"{mark.name} ({', '.join(beyond)})" if beyond else mark.name
    at = (across.edge(mark.source.mean), up.edge(mark.target.mean))
    return Label(text, at, mark.ink, "bold" if mark.strong else "normal")


def _equal(axes: Any, across: Window, up: Window) -> None:
    """Faint lines of equal harmonic mean, named where they leave on the right."""
    low, high = harmonic(max(0.0, across.low), max(0.0, up.low)), harmonic(across.high, up.high)
    step = next((s for s in (0.5, 1, 2, 5, 10, 20) if (high - low) / s <= 7), 20)
    first = int(low // step) + 1
    levels = [level for k in range(first, int(high / step) + 1) if (level := step * k) < 100]
    named = False
    for level in levels:
        xs = [across.low + (across.high - across.low) * k / 60 for k in range(61)]
        points = [(x, level * x / (2 * x - level)) for x in xs if 2 * x > 1.01 * level]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), color=PALE, linewidth=0.9, zorder=0.5)
        if up.low <= points[-1][1] <= up.high:
            text = f"{level:g}" if named else f"{level:g} harmonic mean"
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
