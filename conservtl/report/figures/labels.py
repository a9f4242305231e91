"""Names of marks and lines in a picture, placed so that none covers another name or a mark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

__all__ = ["Box", "Label", "annotate", "legend_beside", "place"]

_DIRECTIONS = [math.pi * k / 8 for k in (0, 8, 2, 14, 6, 10, 4, 12, 1, 15, 7, 9, 3, 13, 5, 11)]
"""Angles from the mark to its name, the preferred ones first."""
_STEP = 5.0  # pixels between the distances that are tried
_CROSSING = 9.0  # pixels of distance that one covered point of a line is worth
_LEADER = 11.0  # a name farther from its mark than this is tied to it by a line

Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A rectangle with sides along the axes."""

    left: float
    bottom: float
    right: float
    top: float

    def meets(self, other: Box) -> bool:
        """Whether the two share an area."""
        return (
            self.left < other.right and other.left < self.right and self.bottom < other.top and other.bottom < self.top
        )

    def within(self, other: Box) -> bool:
        """Whether this box lies inside the other."""
        return (
            other.left <= self.left
            and self.right <= other.right
            and other.bottom <= self.bottom
            and self.top <= other.top
        )

    def holds(self, point: Point) -> bool:
        """Whether the point lies inside."""
        return self.left <= point[0] <= self.right and self.bottom <= point[1] <= self.top

    def nearest(self, point: Point) -> Point:
        """Return the point of the box that is nearest to ``point``."""
        return min(max(point[0], self.left), self.right), min(max(point[1], self.bottom), self.top)


@dataclass(frozen=True)
class Label:
    """A name for a mark, in data coordinates."""

    text: str
    at: Point
    colour: str
    weight: str = "normal"


def place(
    marks: Sequence[Point], sizes: Sequence[Point], area: Box, lines: Sequence[Point] = (), radius: float = 6.0
) -> list[Box]:
    """Place names near their marks, over no other name and no mark, and if possible over no line; all in pixels.

    Names, of a width and height each, are placed in the order given, each at the cheapest free position in the area. If
    there is none, the name overlaps. ``lines`` are points on lines that should stay readable.
    """
    dots = [Box(x - radius, y - radius, x + radius, y + radius) for x, y in marks]
    placed: list[Box] = []
    for mark, (width, height) in zip(marks, sizes, strict=True):
        best, lowest = None, math.inf
        farthest = math.hypot(area.right - area.left, area.top - area.bottom)
        for ring in range(int(farthest / _STEP)):
            distance = radius + 2 + ring * _STEP
            if distance >= lowest:
                break
            for rank, direction in enumerate(_DIRECTIONS):
                box = _beside(mark, distance, direction, width, height)
                if not box.within(area) or any(box.meets(other) for other in (*placed, *dots)):
                    continue
                leader = _between(mark, box.nearest(mark)) if distance > _LEADER else ()
                crossed = sum(other.holds(point) for other in placed for point in leader)
                covered = sum(box.holds(point) for point in lines) + crossed
                if (cost := distance + 0.2 * rank + _CROSSING * covered) < lowest:
                    best, lowest = box, cost
        placed.append(best or _beside(mark, radius + 2, 0.0, width, height))
    return placed


def annotate(figure: Any, axes: Any, labels: Sequence[Label], lines: Iterable[Sequence[Point]] = ()) -> None:
    """Write names beside their marks.

    The figure is laid out here: add nothing to it afterwards. The most important name comes first; lines, as their
    corners in data coordinates, should stay readable.
    """
    figure.draw_without_rendering()
    texts = [axes.text(*label.at, label.text, color=label.colour, weight=label.weight) for label in labels]
    for text in texts:
        text.set_in_layout(False)
    sizes = [(extent.width, extent.height) for extent in (text.get_window_extent() for text in texts)]
    frame, pixel = axes.get_window_extent(), figure.dpi / 72
    area = Box(frame.x0 + 2, frame.y0 + 2, frame.x1 - 2, frame.y1 - 2)
    marks = [tuple(axes.transData.transform(label.at)) for label in labels]
    corners = [[tuple(axes.transData.transform(corner)) for corner in line] for line in lines]
    points = [point for line in corners for a, b in pairwise(line) for point in _between(a, b)]
    boxes = place(marks, sizes, area, [point for point in points if area.holds(point)], 6 * pixel)
    to_data = axes.transData.inverted()
    for label, text, mark, box in zip(labels, texts, marks, boxes, strict=True):
        text.set_position(to_data.transform((box.left, (box.bottom + box.top) / 2)))
        text.set_verticalalignment("center_baseline")
        end = box.nearest(mark)
        if math.dist(mark, end) > _LEADER * pixel:
            ends = zip(label.at, to_data.transform(end), strict=True)
            (leader,) = axes.plot(*ends, color=label.colour, linewidth=0.7, zorder=1)
            leader.set_in_layout(False)


def legend_beside(axes: Any, lines: Sequence[tuple[Any, str, str]]) -> None:
    """Write the names of lines to the right of the axes, in the order of the lines' right ends.

    Each line comes with its colour and weight of text; the name is the line's label.
    """
    ordered = sorted(lines, key=lambda entry: -float(entry[0].get_ydata()[-1]))
    legend = axes.legend(
        handles=[line for line, _, _ in ordered], loc="center left", bbox_to_anchor=(1.01, 0.5), borderaxespad=0
    )
    for text, (_, colour, weight) in zip(legend.get_texts(), ordered, strict=True):
        text.set(color=colour, weight=weight)


def _beside(mark: Point, distance: float, direction: float, width: float, height: float) -> Box:
    """Return a box of this size whose nearest point has this distance and direction from the mark."""
    across, up = math.cos(direction), math.sin(direction)
    left = mark[0] + distance * across - width * (1 - across) / 2
    bottom = mark[1] + distance * up - height * (1 - up) / 2
    return Box(left, bottom, left + width, bottom + height)


def _between(a: Point, b: Point) -> list[Point]:
    """Return points on the line from ``a`` to ``b``, about 6 pixels apart."""
    steps = max(1, min(200, int(math.dist(a, b) / 6)))
    return [(a[0] + (b[0] - a[0]) * k / steps, a[1] + (b[1] - a[1]) * k / steps) for k in range(steps + 1)]
