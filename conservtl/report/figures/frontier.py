"""The frontier: what a method brings the target, against what it leaves of the source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from conservtl.report.figures.canvas import Picture, bare, draw, shorten
from conservtl.report.figures.plane import PlanePoint, paint_plane, window
from conservtl.report.text.variants import ORIGIN, Variant, variants

__all__ = ["frontier", "shots_text"]

_NAME = 34


def frontier(table: Mapping[str, Any], name: str) -> Picture | None:
    """One mark a method, with its interval in both directions; of the target alone where the source has no data.

    Args:
        table: rows at one number of shots.
        name: prefix of ids, unique on the page.
    """
    rows = variants(table)
    if not rows:
        return None
    where = shots_text(table["shots"])
    marks = _marks(rows)
    if not marks:
        svg = draw(name, f"Target accuracy of {len(rows)} methods, {where}.", 0.27 * len(rows) + 0.9, _dots(rows))
        caption = "Grey: baselines, the best of them black. Arrows at the edge: beyond it."
        return Picture(f"Target accuracy, {where}", f"{caption} {_bars(rows)}", svg)

    def paint(figure: Any) -> None:
        paint_plane(figure, figure.subplots(), marks)

    alt = f"Target accuracy against source accuracy kept, one mark for each of {len(marks)} methods, {where}."
    caption = (
        "Up and to the right is better. Grey: baselines, the best of them black; open diamond: the source as it is. "
        f"Thin lines: equal harmonic mean (%). {_bars(rows)} Arrows at the edge: beyond it, value written."
    )
    return Picture(f"What the target gains, what the source keeps, {where}", caption, draw(name, alt, 4.8, paint))


def shots_text(shots: int) -> str:
    """A number of shots in words."""
    return f"{shots} {'shot' if shots == 1 else 'shots'} a class"


def _bars(rows: Sequence[Variant]) -> str:
    counts = sorted({row.target.count for row in rows})
    if counts == [1]:
        return "One run each, so there are no intervals."
    runs = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"Bars: 95 % intervals of the mean over {runs} runs."


def _marks(rows: Sequence[Variant]) -> list[PlanePoint]:
    """The best of one's own first: it chooses first where its name goes."""
    order = sorted(rows, key=lambda row: (row.baseline, not row.best, row.name != ORIGIN, -row.score.mean))
    return [
        PlanePoint(
            shorten(row.name, _NAME),
            row.source,
            row.target,
            row.colour,
            row.ink,
            row.shape,
            strong=not row.baseline,
            keep=row.best,
            hollow=row.name == ORIGIN,
        )
        for row in order
        if row.source is not None
    ]


def _dots(rows: Sequence[Variant]) -> Any:
    order = sorted(rows, key=lambda row: -row.target.mean)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        seen = window([row.target for row in order], [row.target for row in order if row.best])
        for place, row in enumerate(order):
            x = seen.edge(row.target.mean)
            beyond = x != row.target.mean
            if row.target.certain and not beyond:
                axes.errorbar([x], [place], xerr=row.target.bars, fmt="none", ecolor=row.colour, elinewidth=1.5)
            face = "white" if row.name == ORIGIN else row.colour
            shape = (3, 0, 90) if beyond else row.shape
            axes.plot([x], [place], marker=shape, markersize=7, color=face, markeredgecolor=row.colour, zorder=3)
            axes.annotate(
                row.target.text(),
                (1, place),
                xycoords=("axes fraction", "data"),
                xytext=(36, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                weight="normal" if row.baseline else "bold",
            )
        axes.set_yticks(range(len(order)), [shorten(row.name, _NAME) for row in order])
        for label, row in zip(axes.get_yticklabels(), order, strict=True):
            label.set(color=row.ink, weight="normal" if row.baseline else "bold")
        axes.set_ylim(len(order) - 0.4, -0.6)
        axes.set_xlim(seen.low, seen.high)
        axes.set_xlabel("target accuracy (%)")
        bare(axes, grid="x")

    return paint
