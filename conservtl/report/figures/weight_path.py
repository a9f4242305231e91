"""Target and source on the straight line from the starting weights to the trained weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conservtl.report.figures.canvas import Picture, draw
from conservtl.report.figures.lines import DOMAINS, Points, draw_lines
from conservtl.report.text.metrics import Metric, headline, number
from conservtl.report.text.summary import read_plan

__all__ = ["kept_point", "weight_path"]


def weight_path(report: Mapping[str, Any]) -> Picture | None:
    """Draw target and source along the path; None if it was not measured."""
    entries = report.get("path") or []
    metric = headline(report)
    lines = {domain: _points(entries, domain, metric) for domain in DOMAINS}
    lines = {domain: points for domain, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    kept = kept_point(report)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        draw_lines(axes, lines, metric, kept)
        axes.set_xlabel("t (0: starting weights, 1: trained weights)")
        axes.set_xticks([number / 10 for number in range(11)])
        axes.set_xlim(-0.02, 1.02)

    alt = f"Path: {metric.name} of {' and '.join(lines)} between the starting point and the trained weights."
    return Picture(
        "From the starting to the trained weights", _caption(report, metric, kept), draw("path", alt, 3.2, paint)
    )


def kept_point(report: Mapping[str, Any]) -> float | None:
    """Return the position on the path of the weights that were kept; None if it is unknown or off the path."""
    return next((float(entry["t"]) for entry in report.get("path") or [] if entry.get("kept")), None)


def _points(entries: Any, domain: str, metric: Metric) -> Points:
    values = [(float(entry["t"]), number((entry.get(domain) or {}).get(metric.key))) for entry in entries]
    return sorted((t, metric.scaled(value)) for t, value in values if value is not None)


def _caption(report: Mapping[str, Any], metric: Metric, kept: float | None) -> str:
    examples = report.get("path_examples") or {}
    counts = " and ".join(f"{examples[domain]:,} {domain}" for domain in DOMAINS if domain in examples)
    on = f", on {counts} test examples" if counts else ""
    between = "(1 − t) × the starting weights + t × the trained ones"
    parts = [f"{metric.direction} of {between}{on}, without further training."]
    if kept is not None:
        parts.append(f"Rings: the weights that were kept, t\u00a0=\u00a0{kept:g}.")
    plan = read_plan(report)
    if plan is not None and plan.fresh:
        parts.append("New parameters keep their trained values; only the others start at the source.")
    return " ".join(parts)
