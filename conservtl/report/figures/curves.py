"""Learning curves: target and source over epochs, the starting point included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from conservtl.report.figures.canvas import GREY, Picture, bare, draw
from conservtl.report.figures.lines import DOMAINS, Points, draw_lines
from conservtl.report.figures.weight_path import kept_point
from conservtl.report.text.metrics import Metric, headline, number, pair

__all__ = ["learning_curves"]


def learning_curves(report: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> Picture | None:
    """Draw target and source over epochs, with the training loss beneath; None without history."""
    metric = headline(report)
    lines = {domain: _points(report, history, domain, metric) for domain in DOMAINS}
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
    back = kept_point(report)
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
    axes.spines["bottom"].set_visible(True)


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
