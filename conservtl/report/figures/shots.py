"""Error against the number of shots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from conservtl.report.figures.canvas import PALE, Picture, bare, draw, shorten
from conservtl.report.figures.labels import legend_beside
from conservtl.report.text.intervals import Span
from conservtl.report.text.variants import ORIGIN, Variant, variants

__all__ = ["NAMED", "error_by_shots"]

NAMED = 6
"""Variants of one's own that are drawn in full; the others, and most baselines, are thin lines without a name."""

_NAME = 30
_HEIGHT = 2.9  # inches of a panel
_LINEAR = 0.5  # per cent: below, the axis of errors is linear, for 0 % has no place on a logarithmic one
_TICKS = (0, 0.5, 1, 2, 5, 10, 20, 50, 100)

Curve = list[tuple[int, Span, Variant]]


def error_by_shots(tables: Sequence[Mapping[str, Any]], main: Mapping[str, Any]) -> Picture | None:
    """Target and source error over the number of shots; None where there is only one number.

    Args:
        tables: one for each number of shots, fewest first.
        main: the one of them that says which variants are the best.
    """
    if len(tables) < 2:
        return None
    panels = {domain: curves for domain in ("target", "source") if (curves := _curves(tables, domain))}
    if not panels:
        return None
    shots = [table["shots"] for table in tables]
    named = _named(main)
    rest = {curve[-1][2].name for curves in panels.values() for curve in curves} - named

    def paint(figure: Any) -> None:
        for axes, (domain, curves) in zip(
            figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True
        ):
            _panel(axes, curves, shots, named)
            axes.set_ylabel(f"{domain} error (%, log scale)")
            axes.set_xlabel("labelled examples a class (log scale)")

    alt = f"Error of {' and '.join(panels)} against the number of shots, {len(named)} methods."
    caption = "Lower is better. Grey and black: baselines. Bars: 95 % intervals of the mean."
    if rest:
        caption += f" Thin lines: the {len(rest)} others, which stand in the tables, as far as they are in range."
    return Picture("What each further example brings", caption, draw("shots", alt, _HEIGHT * len(panels), paint))


def _curves(tables: Sequence[Mapping[str, Any]], domain: str) -> list[Curve]:
    """Each variant's errors, in the order of the table."""
    found: dict[str, Curve] = {}
    for table in tables:
        for row in variants(table):
            accuracy = row.target if domain == "target" else row.source
            if accuracy is not None:
                error = Span(100 - accuracy.mean, 100 - accuracy.high, 100 - accuracy.low, accuracy.count)
                found.setdefault(row.name, []).append((table["shots"], error, row))
    return list(found.values())


def _named(table: Mapping[str, Any]) -> set[str]:
    rows = sorted(variants(table), key=lambda row: -row.score.mean)
    own = [row.name for row in rows if not row.baseline][:NAMED]
    return {*own, *(row.name for row in rows if row.best or row.name == ORIGIN)}


def _panel(axes: Any, curves: Sequence[Curve], shots: Sequence[int], named: set[str]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=_LINEAR, linscale=0.4)
    for curve in curves:
        if curve[-1][2].name not in named:
            axes.plot([n for n, _, _ in curve], [e.mean for _, e, _ in curve], color=PALE, linewidth=1.0, zorder=1)
    chosen = [curve for curve in curves if curve[-1][2].name in named]
    lines = [
        _line(axes, curve, 1 + 0.06 * (place / max(1, len(chosen) - 1) - 0.5)) for place, curve in enumerate(chosen)
    ]
    means = [error.mean for curve in chosen for _, error, _ in curve]
    low = max((tick for tick in _TICKS if tick <= min(means)), default=0)
    high = min((tick for tick in _TICKS if tick >= max(means)), default=100)
    axes.set_ylim(low or -0.05, high)
    axes.set_yticks([tick for tick in _TICKS if low <= tick <= high], minor=False)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xticks(shots, [str(number) for number in shots])
    axes.minorticks_off()
    axes.set_xlim(shots[0] / 1.12, shots[-1] * 1.12)
    bare(axes, grid="y")
    axes.spines["bottom"].set_visible(True)
    legend_beside(axes, lines)


def _line(axes: Any, curve: Curve, aside: float) -> tuple[Any, str, str]:
    """Draw a method's line, moved a little so that error bars do not cover each other; return its legend entry."""
    row = curve[-1][2]
    places = [number * aside for number, _, _ in curve]
    means = [error.mean for _, error, _ in curve]
    style: dict[str, Any] = {"linewidth": 1.2, "zorder": 2} if row.baseline else {"linewidth": 1.8, "zorder": 2.5}
    face = "white" if row.name == ORIGIN else row.colour
    style |= {"marker": row.shape, "color": row.colour, "markerfacecolor": face, "clip_on": False}
    (line,) = axes.plot(places, means, label=shorten(row.name, _NAME), **style)
    for x, (_, error, _) in zip(places, curve, strict=True):
        if error.certain:
            axes.errorbar([x], [error.mean], yerr=error.bars, fmt="none", ecolor=row.colour, alpha=0.45)
    return line, row.ink, "normal" if row.baseline else "bold"
