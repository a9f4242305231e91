"""Accuracy of each class, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conservtl.report.figures.canvas import INK, PALE, SOURCE, TARGET, Picture, bare, draw, shorten
from conservtl.report.text.intervals import signed
from conservtl.report.text.metrics import number

__all__ = ["SHOWN", "per_class"]

SHOWN = 20
"""Classes a picture has room for; beyond that, those that changed most."""

_COLOURS = {"target": TARGET, "source": SOURCE}


@dataclass(frozen=True)
class Class:
    """One class: accuracies in per cent, and how many test examples they rest on."""

    label: str
    before: float
    after: float
    count: int | None

    @property
    def change(self) -> float:
        """In percentage points."""
        return self.after - self.before


def per_class(report: Mapping[str, Any]) -> Picture | None:
    """A line from before to after for each class of target and source; None where there is none."""
    given = report.get("per_class") or {}
    panels = {domain: _classes(given.get(domain) or {}) for domain in _COLOURS}
    panels = {domain: classes for domain, classes in panels.items() if classes}
    if not panels:
        return None
    shown = {domain: _most_changed(classes) for domain, classes in panels.items()}
    rows = max(len(classes) for classes in shown.values())
    # One scale for both, so that a glance compares what was gained with what was lost.
    low = 10 * (min(min(each.before, each.after) for classes in shown.values() for each in classes) // 10) - 3
    low = min(low, 47)

    def paint(figure: Any) -> None:
        for axes, (domain, classes) in zip(
            figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True
        ):
            _dumbbells(axes, domain, classes, rows)
            axes.set_xlim(low, 102)
            # Faint rows lead the eye from the name to the number.
            axes.hlines(range(len(classes)), low, 102, color=PALE, linewidth=0.5, zorder=0.5)

    alt = f"Accuracy by class before and after, for {' and '.join(shown)}."
    svg = draw("classes", alt, 0.27 * rows + 1.1, paint)
    return Picture("Class by class", _caption(panels), svg)


def _classes(given: Mapping[str, Any]) -> list[Class]:
    labels = given.get("labels") or []
    before, after = given.get("before") or [], given.get("after") or []
    counts = given.get("counts") or [None] * len(labels)
    out = []
    for label, first, second, count in zip(labels, before, after, counts, strict=True):
        start, end = number(first), number(second)
        # A class without test examples has no accuracy.
        if start is not None and end is not None and count != 0:
            out.append(Class(str(label), 100 * start, 100 * end, count))
    return out


def _most_changed(classes: Sequence[Class]) -> list[Class]:
    if len(classes) <= SHOWN:
        return list(classes)
    chosen = sorted(classes, key=lambda each: -abs(each.change))[:SHOWN]
    return sorted(chosen, key=lambda each: -each.change)


def _dumbbells(axes: Any, domain: str, classes: Sequence[Class], rows: int) -> None:
    colour = _COLOURS[domain]
    places = range(len(classes))
    before, after = [each.before for each in classes], [each.after for each in classes]
    axes.hlines(places, before, after, color=colour, alpha=0.35, linewidth=3)
    axes.plot(before, places, "o", color="white", markeredgecolor=INK, markeredgewidth=1.2, label="before")
    axes.plot(after, places, "o", color=colour, markersize=7, label="after", zorder=1.9)
    for place, each in zip(places, classes, strict=True):
        axes.annotate(
            signed(each.change),
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(36, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            weight="bold" if each.change < -0.05 else "normal",
        )
    axes.set_yticks(places, [_name(each, classes) for each in classes])
    axes.set_ylim(rows - 0.4, -0.6)
    axes.xaxis.get_major_locator().set_params(nbins=5, steps=[1, 2, 5, 10], integer=True)
    axes.set_xlabel("accuracy (%)")
    head = {"xycoords": "axes fraction", "xytext": (36, 8), "textcoords": "offset points", "ha": "right"}
    axes.annotate("points", (1, 1), **head)
    axes.set_ylabel(f"{domain} class", labelpad=8)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=2,
        borderaxespad=0,
        handletextpad=0.2,
        columnspacing=1.2,
    )
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
            parts.append(f"{next(iter(counts)):,} test examples a {domain} class.")
        brackets = brackets or len(counts) > 1
    if brackets:
        parts.append("In brackets: test examples of the class.")
    return " ".join(parts)
