"""Target and source as two lines, told apart by colour, marker and stroke."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conservtl.report.figures.canvas import INK, SOURCE, TARGET, bare
from conservtl.report.text.metrics import Metric

__all__ = ["DOMAINS", "Points", "draw_lines"]

Points = list[tuple[float, float]]

DOMAINS = ("target", "source")

_LEAST_SPAN = 0.05  # of a share, that the axis spans at least: a smaller change must not fill the picture
_LOOKS = {"target": (TARGET, "o", "-"), "source": (SOURCE, "s", "--")}


def draw_lines(axes: Any, lines: Mapping[str, Points], metric: Metric, kept: float | None) -> None:
    """Draw the lines of both domains, in the shown unit, with a name at the right end and a ring at ``kept``."""
    values = [value for points in lines.values() for _, value in points]
    least = metric.scaled(_LEAST_SPAN) if metric.share else _LEAST_SPAN * max(map(abs, values))
    span = max(max(values) - min(values), least) or 1.0
    middle = (max(values) + min(values)) / 2
    low, high = middle - 0.58 * span, middle + 0.58 * span
    if metric.share and high > 100 >= max(values):
        low, high = min(low, 100 - 1.1 * span), 100 + 0.04 * span
    if min(values) >= 0:
        low = max(low, -0.04 * span)
    axes.set_ylim(low, high)
    ends = {domain: points[-1][1] for domain, points in lines.items()}
    close = len(ends) > 1 and max(ends.values()) - min(ends.values()) < 0.075 * (high - low)
    upper = max(ends, key=lambda domain: ends[domain])
    last = max(points[-1][0] for points in lines.values())
    for domain, points in lines.items():
        colour, marker, style = _LOOKS[domain]
        places, heights = zip(*points, strict=True)
        every = max(1, len(points) // 25)  # a marker a point would hide a long curve
        axes.plot(places, heights, style, color=colour, marker=marker, markevery=every, clip_on=False)
        axes.annotate(
            f"{domain} {metric.show_scaled(points[-1][1])}",
            (last, points[-1][1]),
            xytext=(10, 0),
            textcoords="offset points",
            color=colour,
            # Close ends: one name above its line and one below, so that they cannot cover each other.
            va="center" if not close else "bottom" if domain == upper else "top",
            weight="bold",
            annotation_clip=False,
        )
    for points in lines.values():
        if kept is not None and (mark := dict(points).get(kept)) is not None:
            axes.plot([kept], [mark], "o", markersize=11, markerfacecolor="none", markeredgecolor=INK, clip_on=False)
    axes.set_ylabel(metric.label)
    axes.yaxis.get_major_locator().set_params(nbins=7)
    bare(axes, grid="y")
