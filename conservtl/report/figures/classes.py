"""The headline metric of each class, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conservtl.errors import counted
from conservtl.report.figures.canvas import INK, PALE, SOURCE, TARGET, Picture, bare, draw, legend_above, shorten
from conservtl.report.figures.marks import change_column
from conservtl.report.text.metrics import Metric, headline, number

__all__ = ["SHOWN", "class_chart"]

SHOWN = 20
"""Number of classes in a picture; of more, those that changed most."""

_COLOURS = {"target": TARGET, "source": SOURCE}


@dataclass(frozen=True)
class Class:
    """One class: the metric in the shown unit, and the number of test examples."""

    label: str
    before: float
    after: float
    count: int | None

    @property
    def change(self) -> float:
        """Difference in the shown unit."""
        return self.after - self.before


def class_chart(report: Mapping[str, Any]) -> Picture | None:
    """Draw a line from before to after for each class of target and source; None if the report has no classes."""
    metric = headline(report)
    per_class = report.get("per_class") or {}
    panels = {domain: _classes(per_class.get(domain) or {}, metric) for domain in _COLOURS}
    panels = {domain: classes for domain, classes in panels.items() if classes}
    if not panels:
        return None
    shown = {domain: _most_changed(classes) for domain, classes in panels.items()}
    rows = max(len(classes) for classes in shown.values())
    low, high = _limits(
        [value for classes in shown.values() for each in classes for value in (each.before, each.after)], metric
    )

    def paint(figure: Any) -> None:
        for axes, (domain, classes) in zip(
            figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True
        ):
            _dumbbells(axes, domain, classes, rows, metric)
            axes.set_xlim(low, high)
            # Faint rows lead the eye from the name to the number.
            axes.hlines(range(len(classes)), low, high, color=PALE, linewidth=0.5, zorder=0.5)

    alt = f"{metric.name} by class before and after, for {' and '.join(shown)}."
    svg = draw("classes", alt, 0.27 * rows + 1.1, paint)
    return Picture("Class by class", _caption(panels), svg)


def _limits(values: Sequence[float], metric: Metric) -> tuple[float, float]:
    """Return one range for both domains, so that a gain and a loss are compared at a glance."""
    low, high = min(values), max(values)
    if not metric.share:
        pad = 0.05 * (high - low) or 0.5
        return low - pad, high + pad
    if metric.better == "lower":
        return -2, max(10 * -(-high // 10) + 3, 53)
    return min(10 * (low // 10) - 3, 47), 102


def _classes(domain: Mapping[str, Any], metric: Metric) -> list[Class]:
    labels = domain.get("labels") or []
    before, after = domain.get("before") or [], domain.get("after") or []
    counts = domain.get("counts") or [None] * len(labels)
    classes = []
    for label, first, second, count in zip(labels, before, after, counts, strict=True):
        start, end = number(first), number(second)
        # Not measured without test examples.
        if start is not None and end is not None and count != 0:
            classes.append(Class(str(label), metric.scaled(start), metric.scaled(end), count))
    return classes


def _most_changed(classes: Sequence[Class]) -> list[Class]:
    if len(classes) <= SHOWN:
        return list(classes)
    chosen = sorted(classes, key=lambda each: -abs(each.change))[:SHOWN]
    return sorted(chosen, key=lambda each: -each.change)


def _dumbbells(axes: Any, domain: str, classes: Sequence[Class], rows: int, metric: Metric) -> None:
    """Draw one row a class: a ring before, a dot after."""
    colour = _COLOURS[domain]
    places = range(len(classes))
    before, after = [each.before for each in classes], [each.after for each in classes]
    axes.hlines(places, before, after, color=colour, alpha=0.35, linewidth=3)
    axes.plot(before, places, "o", color="white", markeredgecolor=INK, markeredgewidth=1.2, label="before")
    axes.plot(after, places, "o", color=colour, markersize=7, label="after", zorder=1.9)
    changes = [each.change for each in classes]
    change_column(axes, changes, metric, [metric.rank(change) < -0.5 * 10**-metric.digits for change in changes], 36)
    axes.set_yticks(places, [_name(each, classes) for each in classes])
    axes.set_ylim(rows - 0.4, -0.6)
    axes.xaxis.get_major_locator().set_params(nbins=5, steps=[1, 2, 5, 10], integer=metric.share)
    axes.set_xlabel(metric.label)
    axes.set_ylabel(f"{domain} class", labelpad=8)
    legend_above(axes, 2, handletextpad=0.2, columnspacing=1.2)
    bare(axes, grid="x")


def _name(each: Class, classes: Sequence[Class]) -> str:
    name = shorten(each.label, 24)
    alike = len({other.count for other in classes}) == 1
    return name if alike or each.count is None else f"{name} ({each.count})"


def _caption(panels: Mapping[str, Sequence[Class]]) -> str:
    parts, brackets = ["Open ring: before; full dot: after."], False
    for domain, classes in panels.items():
        if len(classes) > SHOWN:
            parts.append(f"Of {len(classes):,} {domain} classes, the {SHOWN} that changed most are shown.")
        counts = {each.count for each in classes if each.count is not None}
        if len(counts) == 1:
            parts.append(f"{counted(next(iter(counts)), 'test example')} a {domain} class.")
        brackets = brackets or len(counts) > 1
    if brackets:
        parts.append("In brackets: test examples of the class.")
    return " ".join(parts)
