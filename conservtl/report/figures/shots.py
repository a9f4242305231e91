"""Error against the number of shots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from conservtl.errors import counted
from conservtl.report.figures.canvas import PALE, Picture, bare, draw, shorten
from conservtl.report.figures.labels import legend_beside
from conservtl.report.figures.marks import CUT_OFF, error_bar
from conservtl.report.text.intervals import MeanInterval
from conservtl.report.text.metrics import ACCURACY, Metric
from conservtl.report.text.variants import VariantResult, variants

__all__ = ["NAMED", "error_by_shots"]

NAMED = 6
"""Number of methods drawn with a name; other methods, and most baselines, are thin lines."""

_NAME = 30  # characters of a method's name
_HEIGHT = 2.9  # inches of a panel
_LINEAR = 0.5  # per cent: below it the axis of errors is linear, because a logarithmic one has no 0
_TICKS = (0, 0.5, 1, 2, 5, 10, 20, 50, 100)

Curve = list[tuple[float, MeanInterval, VariantResult]]


def error_by_shots(
    tables: Sequence[Mapping[str, Any]], main: Mapping[str, Any], metric: Metric = ACCURACY, *, classes: bool = True
) -> Picture | None:
    """Draw target and source error over the number of shots; None if there is one number of shots only.

    The error is 100 % minus the metric if that is a share of which higher is better; else the metric itself. The table
    ``main`` decides which variants get a name.
    """
    if len(tables) < 2:
        return None
    panels = {domain: curves for domain in ("target", "source") if (curves := _curves(tables, domain, metric))}
    if not panels:
        return None
    shots = [_place(table) for table in tables]
    named = _named(main, metric)
    rest = {curve[-1][2].name for curves in panels.values() for curve in curves} - named
    error = "error" if _complement(metric) else metric.name

    def paint(figure: Any) -> None:
        for axes, (domain, curves) in zip(
            figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True
        ):
            _panel(axes, curves, shots, named, metric)
            axes.set_ylabel(f"{domain} {error} (%, log scale)" if metric.share else f"{domain} {error}")
            axes.set_xlabel(f"labelled examples{' a class' if classes else ''} (log scale)")

    alt = f"{error} of {' and '.join(panels)} against the number of shots, {counted(len(named), 'method')}."
    better = "Lower" if metric.share else str(metric.better).capitalize()
    caption = f"{better} is better. Grey and black: baselines. Bars: 95 % intervals of the mean. {CUT_OFF}"
    if rest:
        others = f"the {len(rest)} others" if len(rest) > 1 else "the other method"
        caption += f" Thin lines: {others}, as far as in range; the tables have all."
    return Picture("What each further example brings", caption, draw("shots", alt, _HEIGHT * len(panels), paint))


def _place(table: Mapping[str, Any]) -> float:
    """Return the number of shots; their mean over the classes where they have different numbers."""
    return float(table["shots"] if isinstance(table["shots"], int) else table["taken"]["mean"])


def _complement(metric: Metric) -> bool:
    """Whether the error is 100 % minus the metric."""
    return metric.share and metric.better != "lower"


def _curves(tables: Sequence[Mapping[str, Any]], domain: str, metric: Metric) -> list[Curve]:
    """Return each variant's errors, in the order of the table."""
    curves: dict[str, Curve] = {}
    for table in tables:
        for row in variants(table, metric):
            span = row.target if domain == "target" else row.source
            if span is not None:
                span = span.mirrored(100.0) if _complement(metric) else span
                curves.setdefault(row.name, []).append((_place(table), span, row))
    return list(curves.values())


def _named(table: Mapping[str, Any], metric: Metric) -> set[str]:
    """Return the names of the best methods, of the best baseline and of the source model."""
    rows = sorted(variants(table, metric), key=lambda row: -row.rank)
    methods = [row.name for row in rows if not row.baseline][:NAMED]
    return {*methods, *(row.name for row in rows if row.best or row.untrained)}


def _panel(axes: Any, curves: Sequence[Curve], shots: Sequence[float], named: set[str], metric: Metric) -> None:
    axes.set_xscale("log")
    if metric.share:
        axes.set_yscale("symlog", linthresh=_LINEAR, linscale=0.4)
    for curve in curves:
        if curve[-1][2].name not in named:
            axes.plot([n for n, _, _ in curve], [s.mean for _, s, _ in curve], color=PALE, linewidth=1.0, zorder=1)
    chosen = [curve for curve in curves if curve[-1][2].name in named]
    means = [span.mean for curve in chosen for _, span, _ in curve]
    if metric.share:
        low = max((tick for tick in _TICKS if tick <= min(means)), default=0)
        high = min((tick for tick in _TICKS if tick >= max(means)), default=100)
        axes.set_ylim(low or -0.05, high)
        axes.set_yticks([tick for tick in _TICKS if low <= tick <= high], minor=False)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        pad = 0.1 * (max(means) - min(means)) or 0.5
        axes.set_ylim(min(means) - pad, max(means) + pad)
    lines = [
        _line(axes, curve, 1 + 0.06 * (place / max(1, len(chosen) - 1) - 0.5)) for place, curve in enumerate(chosen)
    ]
    axes.set_xticks(shots, [f"{number:.4g}" for number in shots])
    axes.minorticks_off()
    axes.set_xlim(shots[0] / 1.12, shots[-1] * 1.12)
    bare(axes, grid="y")
    legend_beside(axes, lines)


def _line(axes: Any, curve: Curve, aside: float) -> tuple[Any, str, str]:
    """Draw a method's line, moved a little so that error bars do not cover each other; return its legend entry."""
    row = curve[-1][2]
    places = [number * aside for number, _, _ in curve]
    means = [span.mean for _, span, _ in curve]
    style: dict[str, Any] = {"linewidth": 1.2, "zorder": 2} if row.baseline else {"linewidth": 1.8, "zorder": 2.5}
    face = "white" if row.untrained else row.colour
    style |= {"marker": row.shape, "color": row.colour, "markerfacecolor": face, "clip_on": False}
    (line,) = axes.plot(places, means, label=shorten(row.name, _NAME), **style)
    for x, (_, span, _) in zip(places, curve, strict=True):
        error_bar(axes, x, span.mean, span, upright=True, color=row.colour, linewidth=1.5, alpha=0.45)
    return line, row.ink, "normal" if row.baseline else "bold"
