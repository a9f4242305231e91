"""Names beside their marks, so placed that none covers another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

__all__ = ["Box", "Label", "annotate", "place", "spread"]

_TURNS = [math.pi * k / 8 for k in (0, 8, 2, 14, 6, 10, 4, 12, 1, 15, 7, 9, 3, 13, 5, 11)]
_STEP = 5.0  # between the distances that are tried
_HIT = 9.0  # one point of a line under a name is as bad as this much more distance
_LEADER = 11.0  # a name that stands farther off is tied to its mark

Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A rectangle, sides along the axes."""

    left: float
    bottom: float
    right: float
    top: float

    def meets(self, other: Box) -> bool:
        """Whether they share an area."""
        return (
            self.left < other.right and other.left < self.right and self.bottom < other.top and other.bottom < self.top
        )

    def within(self, other: Box) -> bool:
        """Whether it lies in the other."""
        return (
            other.left <= self.left
            and self.right <= other.right
            and other.bottom <= self.bottom
            and self.top <= other.top
        )

    def holds(self, point: Point) -> bool:
        """Whether a point lies in it."""
        return self.left <= point[0] <= self.right and self.bottom <= point[1] <= self.top

    def nearest(self, point: Point) -> Point:
        """Its point nearest to another."""
        return min(max(point[0], self.left), self.right), min(max(point[1], self.bottom), self.top)


@dataclass(frozen=True)
class Label:
    """A name for a mark, in the axes' own coordinates."""

    text: str
    at: Point
    colour: str
    weight: str = "normal"


def place(
    marks: Sequence[Point], sizes: Sequence[Point], area: Box, lines: Sequence[Point] = (), radius: float = 6.0
) -> list[Box]:
    """Where each name goes: near its mark, over no other name and no mark, rather not over a line.

    The first names choose first. Where an area is too full for all of them, the last overlap.

    Args:
        marks: places of the marks, in pixels.
        sizes: width and height of each name.
        area: where names may stand.
        lines: points on lines that should stay readable.
        radius: of a mark.
    """
    dots = [Box(x - radius, y - radius, x + radius, y + radius) for x, y in marks]
    placed: list[Box] = []
    for mark, (width, height) in zip(marks, sizes, strict=True):
        best, cost = None, math.inf
        far = math.hypot(area.right - area.left, area.top - area.bottom)
        for ring in range(int(far / _STEP)):
            distance = radius + 2 + ring * _STEP
            if distance >= cost:
                break
            for rank, turn in enumerate(_TURNS):
                box = _beside(mark, distance, turn, width, height)
                if not box.within(area) or any(box.meets(other) for other in (*placed, *dots)):
                    continue
                tie = _between(mark, box.nearest(mark)) if distance > _LEADER else ()
                crossed = sum(other.holds(point) for other in placed for point in tie)
                hits = sum(box.holds(point) for point in lines) + crossed
                if (found := distance + 0.2 * rank + _HIT * hits) < cost:
                    best, cost = box, found
        placed.append(best or _beside(mark, radius + 2, 0.0, width, height))
    return placed


def annotate(figure: Any, axes: Any, labels: Sequence[Label], lines: Iterable[Sequence[Point]] = ()) -> None:
    """Write names beside marks, once everything else stands in the axes.

    Args:
        figure: the figure; it is laid out here, and nothing may be added to it afterwards.
        axes: where the marks are.
        labels: names, the most important first.
        lines: what should stay readable, each as its corners, in the axes' coordinates.
    """
    figure.draw_without_rendering()
    texts = [axes.text(*label.at, label.text, color=label.colour, weight=label.weight) for label in labels]
    for text in texts:
        text.set_in_layout(False)
    sizes = [(found.width, found.height) for found in (text.get_window_extent() for text in texts)]
    frame, pixel = axes.get_window_extent(), figure.dpi / 72
    area = Box(frame.x0 + 2, frame.y0 + 2, frame.x1 - 2, frame.y1 - 2)
    at = [tuple(axes.transData.transform(label.at)) for label in labels]
    corners = [[tuple(axes.transData.transform(corner)) for corner in line] for line in lines]
    points = [point for line in corners for a, b in pairwise(line) for point in _between(a, b)]
    seen = [point for point in points if area.holds(point)]
    boxes = place(at, sizes, area, seen, 6 * pixel)
    back = axes.transData.inverted()
    for label, text, mark, box in zip(labels, texts, at, boxes, strict=True):
        text.set_position(back.transform((box.left, (box.bottom + box.top) / 2)))
        text.set_verticalalignment("center_baseline")
        end = box.nearest(mark)
        if math.dist(mark, end) > _LEADER * pixel:
            (line,) = axes.plot(
                *zip(label.at, back.transform(end), strict=True), color=label.colour, linewidth=0.7, zorder=1
            )
            line.set_in_layout(False)


def spread(heights: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """Heights moved as little as it takes to stand at least ``least`` apart, between two ends where they fit.

    Example:
        >>> spread([1.0, 1.0, 5.0], 2.0, 0.0, 10.0)
        [0.0, 2.0, 5.0]
    """
    order = sorted(range(len(heights)), key=heights.__getitem__)
    # Blocks of names that touch: each as its members' wished places, less their places in the block.
    blocks: list[list[float]] = []
    for place_, index in enumerate(order):
        blocks.append([heights[index] - least * place_])
        while len(blocks) > 1 and _mean(blocks[-2]) >= _mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    moved = [_mean(block) for block in blocks for _ in block]
    top = high - least * (len(order) - 1)
    out = [0.0] * len(order)
    for place_, (index, value) in enumerate(zip(order, moved, strict=True)):
        out[index] = max(low, min(value, top)) + least * place_
    return out


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _beside(mark: Point, distance: float, turn: float, width: float, height: float) -> Box:
    """A box whose nearest point is about so far off, in that direction."""
    across, up = math.cos(turn), math.sin(turn)
    left = mark[0] + distance * across - width * (1 - across) / 2
    bottom = mark[1] + distance * up - height * (1 - up) / 2
    return Box(left, bottom, left + width, bottom + height)


def _between(a: Point, b: Point) -> list[Point]:
    """Points on a line, a few pixels apart."""
    steps = max(1, min(200, int(math.dist(a, b) / 6)))
    return [(a[0] + (b[0] - a[0]) * k / steps, a[1] + (b[1] - a[1]) * k / steps) for k in range(steps + 1)]
