"""Each target before and after, for the best method and the best baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conservtl.errors import counted
from conservtl.report.figures.canvas import GREY, INK, PALE, Picture, bare, draw, legend_above, shorten
from conservtl.report.figures.marks import CUT_OFF, change_column, error_bar
from conservtl.report.text.intervals import MeanInterval
from conservtl.report.text.metrics import ACCURACY, Metric
from conservtl.report.text.variants import VariantResult, best_baseline, best_method, variants

__all__ = ["SHOWN", "by_target"]

SHOWN = 20
"""Number of targets in a picture; of more, those that differ most."""


@dataclass(frozen=True)
class Target:
    """One target: the metric before and after each method (the best method first), in the shown unit."""

    name: str
    before: MeanInterval
    after: tuple[MeanInterval, ...]

    @property
    def difference(self) -> float:
        """Difference of the method from the baseline; of a method alone, its change."""
        other = self.after[1] if len(self.after) > 1 else self.before
        return self.after[0].mean - other.mean


def by_target(table: Mapping[str, Any], metric: Metric = ACCURACY) -> Picture | None:
    """Draw one row a target; None if there are fewer than two."""
    rows = variants(table, metric)
    shown = [row for row in (best_method(rows), best_baseline(rows)) if row is not None]
    targets = _targets(shown)
    if len(targets) < 2:
        return None
    chosen = sorted(targets, key=lambda target: -abs(target.difference))[:SHOWN]
    chosen = sorted(chosen, key=lambda target: -metric.rank(target.difference))
    names = " and ".join(row.name for row in shown)
    alt = f"{metric.name} of each target before and after {names}."
    svg = draw(
        "targets", alt, 0.36 * len(chosen) + 1.0, lambda figure: _paint(figure.subplots(), chosen, shown, metric)
    )
    return Picture("Target by target", _caption(targets, chosen, shown), svg)


def _targets(shown: Sequence[VariantResult]) -> list[Target]:
    if not shown:
        return []
    return [
        Target(name, before, tuple(row.per_target[name][1] for row in shown))
        for name, (before, _) in shown[0].per_target.items()
        if all(name in row.per_target for row in shown)
    ]


def _limits(targets: Sequence[Target], metric: Metric) -> tuple[float, float]:
    """Return the range of the axis: all means, and intervals up to half the means' range beyond."""
    spans = [span for target in targets for span in (target.before, *target.after)]
    means = [span.mean for span in spans]
    reach = 0.5 * (max(means) - min(means))
    if metric.share:
        low = max(min(span.low for span in spans), min(means) - reach) - 2
        return max(low, -2), 101.5 if metric.better == "higher" else min(101.5, max(means) + reach + 2)
    pad = 0.1 * reach or 0.5
    low = max(min(span.low for span in spans), min(means) - reach)
    return low - pad, min(max(span.high for span in spans), max(means) + reach) + pad


def _paint(axes: Any, targets: Sequence[Target], shown: Sequence[VariantResult], metric: Metric) -> None:
    low, high = _limits(targets, metric)
    axes.set_xlim(low, high)
    places = range(len(targets))
    # Faint rows lead the eye from the name to the number.
    axes.hlines(places, low, high, color=PALE, linewidth=0.5, zorder=0.5)
    before = [target.before.mean for target in targets]
    axes.plot(before, places, "D", markersize=5.5, color="white", markeredgecolor=INK, label="before", zorder=3)
    for side, row in enumerate(shown):
        up = 0.0 if len(shown) == 1 else (-0.17, 0.17)[side]
        for place, target in zip(places, targets, strict=True):
            span = target.after[side]
            axes.plot([target.before.mean, span.mean], [place, place + up], color=row.colour, alpha=0.25, linewidth=2)
            error_bar(axes, span.mean, place + up, span, color=row.colour, linewidth=1.2)
        after = [target.after[side].mean for target in targets]
        heights = [place + up for place in places]
        axes.plot(after, heights, row.shape, markersize=6.5, color=row.colour, label=shorten(row.name, 40), zorder=3.5)
    gains = [target.difference for target in targets]
    change_column(axes, gains, metric, [metric.rank(gain) > 0.5 * 10**-metric.digits for gain in gains], 40)
    axes.set_yticks(places, [shorten(target.name, 24) for target in targets])
    axes.set_ylim(len(targets) - 0.4, -0.6)
    axes.set_xlabel(metric.with_unit(f"target {metric.name}"))
    legend_above(axes, 3, handletextpad=0.2, columnspacing=1.4)
    axes.xaxis.get_major_locator().set_params(nbins=7, steps=[1, 2, 5, 10])
    bare(axes, grid="x")
    axes.spines["bottom"].set_color(GREY)


def _caption(targets: Sequence[Target], chosen: Sequence[Target], shown: Sequence[VariantResult]) -> str:
    parts = []
    if len(shown) > 1:
        parts.append(f"At the right: {shown[0].name} minus {shown[1].name}.")
    else:
        parts.append(f"At the right: the change by {shown[0].name}.")
    if any(span.certain for target in chosen for span in target.after):
        parts.append(f"Bars: 95 % intervals of the mean over seeds. {CUT_OFF}")
    else:
        parts.append("Means over seeds.")
    if len(targets) > len(chosen):
        parts.append(f"Of {counted(len(targets), 'target')}, the {len(chosen)} that differ most.")
    return " ".join(parts)
