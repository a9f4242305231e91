"""Each target before and after, for the best of one's own and the best baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conservtl.report.figures.canvas import GREY, INK, PALE, Picture, bare, draw, shorten
from conservtl.report.text.intervals import Span, signed
from conservtl.report.text.variants import Variant, best_baseline, best_own, variants

__all__ = ["SHOWN", "by_target"]

SHOWN = 20
"""Targets a picture has room for; beyond that, those that differ most."""


@dataclass(frozen=True)
class Target:
    """One target: accuracy before, and after each method (own first), in per cent."""

    name: str
    before: Span
    after: tuple[Span, ...]

    @property
    def difference(self) -> float:
        """Between the methods; of one alone, what it changed."""
        other = self.after[1] if len(self.after) > 1 else self.before
        return self.after[0].mean - other.mean


def by_target(table: Mapping[str, Any]) -> Picture | None:
    """A row a target; None where there is only one, or nothing to show."""
    rows = variants(table)
    shown = [row for row in (best_own(rows), best_baseline(rows)) if row is not None]
    targets = _targets(shown)
    if len(targets) < 2:
        return None
    chosen = sorted(targets, key=lambda each: -abs(each.difference))[:SHOWN]
    chosen = sorted(chosen, key=lambda each: -each.difference)

    def paint(figure: Any) -> None:
        _paint(figure.subplots(), chosen, shown)

    names = " and ".join(row.name for row in shown)
    svg = draw("targets", f"Accuracy of each target before and after {names}.", 0.36 * len(chosen) + 1.0, paint)
    return Picture("Target by target", _caption(targets, chosen, shown), svg)


def _targets(shown: Sequence[Variant]) -> list[Target]:
    if not shown:
        return []
    found = []
    for name, (before, _) in shown[0].per_target.items():
        if all(name in row.per_target for row in shown):
            found.append(Target(name, before, tuple(row.per_target[name][1] for row in shown)))
    return found


def _paint(axes: Any, targets: Sequence[Target], shown: Sequence[Variant]) -> None:
    ends = [end for each in targets for span in (each.before, *each.after) for end in (span.mean, span.low)]
    means = [span.mean for each in targets for span in (each.before, *each.after)]
    low = max(min(ends), min(means) - 0.5 * (max(means) - min(means))) - 2
    axes.set_xlim(max(low, -2), 101.5)
    places = range(len(targets))
    # Faint rows lead the eye from the name to the number.
    axes.hlines(places, max(low, -2), 101.5, color=PALE, linewidth=0.5, zorder=0.5)
    before = [each.before.mean for each in targets]
    axes.plot(before, places, "D", markersize=5.5, color="white", markeredgecolor=INK, label="before", zorder=3)
    for side, row in enumerate(shown):
        up = 0.0 if len(shown) == 1 else (-0.17, 0.17)[side]
        for place, each in zip(places, targets, strict=True):
            span = each.after[side]
            axes.plot([each.before.mean, span.mean], [place, place + up], color=row.colour, alpha=0.25, linewidth=2)
            if span.certain:
                axes.errorbar([span.mean], [place + up], xerr=span.bars, fmt="none", ecolor=row.colour, elinewidth=1.2)
        after = [each.after[side].mean for each in targets]
        heights = [place + up for place in places]
        axes.plot(after, heights, row.shape, markersize=6.5, color=row.colour, label=shorten(row.name, 40), zorder=3.5)
    for place, each in zip(places, targets, strict=True):
        axes.annotate(
            signed(each.difference),
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(40, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            weight="bold" if each.difference > 0.05 else "normal",
        )
    axes.annotate("points", (1, 1), xycoords="axes fraction", xytext=(40, 8), textcoords="offset points", ha="right")
    axes.set_yticks(places, [shorten(each.name, 24) for each in targets])
    axes.set_ylim(len(targets) - 0.4, -0.6)
    axes.set_xlabel("target accuracy (%)")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0, handletextpad=0.2, columnspacing=1.4)
    axes.xaxis.get_major_locator().set_params(nbins=7, steps=[1, 2, 5, 10])
    bare(axes, grid="x")
    axes.spines["bottom"].set_color(GREY)


def _caption(targets: Sequence[Target], chosen: Sequence[Target], shown: Sequence[Variant]) -> str:
    parts = []
    if len(shown) > 1:
        parts.append(f"At the right: {shown[0].name} less {shown[1].name}.")
    else:
        parts.append(f"At the right: what {shown[0].name} changed.")
    if any(span.certain for each in chosen for span in each.after):
        parts.append("Bars: 95 % intervals of the mean over seeds.")
    else:
        parts.append("Means over seeds.")
    if len(targets) > len(chosen):
        parts.append(f"Of {len(targets):,} targets, the {len(chosen)} that differ most.")
    return " ".join(parts)
