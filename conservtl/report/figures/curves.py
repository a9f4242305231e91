"""Target and source as two lines: over epochs, and on the way from the starting to the trained weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from conservtl.report.figures.canvas import DOMAIN_LOOKS, GREY, INK, Picture, bare, draw
from conservtl.report.text.metrics import Metric, headline, number, pair
from conservtl.report.text.summary import read_plan

__all__ = ["draw_lines", "learning_curves", "weight_path"]

Points = list[tuple[float, float]]
_LEAST_SPAN = 0.05  # of a share, that the axis spans at least: a smaller change must not fill the picture


def learning_curves(report: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> Picture | None:
    """Draw target and source over epochs, with the training loss beneath; None without history."""
    metric = headline(report)
    lines = {domain: _points(report, history, domain, metric) for domain in DOMAIN_LOOKS}
    lines = {domain: points for domain, points in lines.items() if points}
    losses = [(float(entry["epoch"]), loss) for entry in history if (loss := number(entry.get("loss"))) is not None]
    if not history or not lines:
        return None
    phases = _phases(history)
    named = _names_fit(phases)
    kept = _kept(report, history, metric)

    def paint(figure: Any) -> None:
        ratios = [3, 1] if losses else [1]
        panels = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        draw_lines(panels[0], lines, metric, kept)
        if losses:
            _losses(panels[1], losses)
        for panel in panels:
            for _, start, _ in phases[1:]:
                panel.axvline(start, color=GREY, linewidth=1, linestyle=(0, (2, 3)))
        _label_phases(panels[0], phases, named=named)
        figure.align_ylabels(panels)
        panels[-1].set_xlabel("epochs trained (0: before)")
        panels[-1].xaxis.get_major_locator().set_params(integer=True)

    alt = f"Learning curves: {metric.name} of {' and '.join(lines)} over {round(phases[-1][2])} epochs."
    back = _kept_point(report)
    caption = _caption(metric, ring=kept is not None, borders=len(phases) > 1, named=named)
    if back is not None and back < 1:
        caption += f" Then the weights were moved back to t\u00a0=\u00a0{back:g} of the path below."
    svg = draw("curves", alt, 4.2 if losses else 3.2, paint)
    return Picture("Over the epochs", caption, svg)


def _points(report: Mapping[str, Any], history: Sequence[Mapping[str, Any]], domain: str, metric: Metric) -> Points:
    before = pair(report, domain, metric.key).before
    points = {} if before is None else {0.0: metric.scaled(before)}
    for entry in history:
        value = number((entry.get(domain) or {}).get(metric.key))
        if value is not None:
            points[float(entry["epoch"])] = metric.scaled(value)
    # The value before training is no curve by itself.
    return sorted(points.items()) if any(epoch > 0 for epoch in points) else []


def _losses(axes: Any, losses: Points) -> None:
    epochs, heights = zip(*losses, strict=True)
    style = {"marker": "o"} if len(losses) == 1 else {}
    axes.plot(epochs, heights, color=GREY, linewidth=1.5, **style)
    axes.set_ylim(bottom=min(0.0, *heights))
    axes.set_ylabel("training loss")
    bare(axes, grid="y")


def _phases(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """Return name, first and last epoch of each phase."""
    phases, start = [], 0.0
    for name, entries in groupby(history, lambda entry: str(entry.get("phase") or "all")):
        end = float(list(entries)[-1]["epoch"])
        phases.append((name, start, end))
        start = end
    return phases


def _names_fit(phases: Sequence[tuple[str, float, float]]) -> bool:
    """Whether every name is narrower than its phase, at about 95 characters across; else phases are numbered."""
    return all(len(name) + 2 <= 95 * (end - start) / phases[-1][2] for name, start, end in phases)


def _label_phases(axes: Any, phases: Sequence[tuple[str, float, float]], *, named: bool) -> None:
    if len(phases) < 2:
        return
    for index, (name, start, end) in enumerate(phases, 1):
        axes.annotate(
            name if named else str(index),
            ((start + end) / 2, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            color=GREY,
        )


def _kept(report: Mapping[str, Any], history: Sequence[Mapping[str, Any]], metric: Metric) -> float | None:
    """Return the epoch whose weights were kept; None if it is the last one or unknown."""
    after = (report.get("after") or {}).get("target") or {}
    evaluated = [entry for entry in history if number((entry.get("target") or {}).get(metric.key)) is not None]
    same = [entry for entry in evaluated if all(entry["target"].get(key) == after[key] for key in after)]
    if not after or not same or same[-1] is evaluated[-1]:
        return None
    return float(same[0]["epoch"])


def _caption(metric: Metric, *, ring: bool, borders: bool, named: bool) -> str:
    parts = [f"{metric.direction} at the evaluated epochs; 0: before training."]
    if ring:
        parts.append("Ring: the epoch that was kept.")
    if borders:
        parts.append(f"Dotted lines: phase borders{'' if named else ', numbered as in the table of phases'}.")
    return " ".join(parts)


def weight_path(report: Mapping[str, Any]) -> Picture | None:
    """Draw target and source along the path; None if it was not measured."""
    entries = report.get("path") or []
    metric = headline(report)
    lines = {domain: _path_points(entries, domain, metric) for domain in DOMAIN_LOOKS}
    lines = {domain: points for domain, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    kept = _kept_point(report)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        draw_lines(axes, lines, metric, kept)
        axes.set_xlabel("t (0: starting weights, 1: trained weights)")
        axes.set_xticks([number / 10 for number in range(11)])
        axes.set_xlim(-0.02, 1.02)

    alt = f"Path: {metric.name} of {' and '.join(lines)} between the starting point and the trained weights."
    return Picture(
        "From the starting to the trained weights", _path_caption(report, metric, kept), draw("path", alt, 3.2, paint)
    )


def _kept_point(report: Mapping[str, Any]) -> float | None:
    """Return the position on the path of the weights that were kept; None if it is unknown or off the path."""
    return next((float(entry["t"]) for entry in report.get("path") or [] if entry.get("kept")), None)


def _path_points(entries: Any, domain: str, metric: Metric) -> Points:
    values = [(float(entry["t"]), number((entry.get(domain) or {}).get(metric.key))) for entry in entries]
    return sorted((t, metric.scaled(value)) for t, value in values if value is not None)


def _path_caption(report: Mapping[str, Any], metric: Metric, kept: float | None) -> str:
    examples = report.get("path_examples") or {}
    counts = " and ".join(f"{examples[domain]:,} {domain}" for domain in DOMAIN_LOOKS if domain in examples)
    on = f", on {counts} test examples" if counts else ""
    between = "(1 − t) × the starting weights + t × the trained ones"
    parts = [f"{metric.direction} of {between}{on}, without further training."]
    if kept is not None:
        parts.append(f"Rings: the weights that were kept, t\u00a0=\u00a0{kept:g}.")
    plan = read_plan(report)
    if plan is not None and plan.fresh:
        parts.append("New parameters keep their trained values; only the others start at the source.")
    return " ".join(parts)


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
        colour, marker, style = DOMAIN_LOOKS[domain]
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
