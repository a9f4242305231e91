"""The metric over the number of layers transferred, from either side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from conservtl.report.figures.canvas import GREY, INK, Picture, bare, draw, shorten
from conservtl.report.figures.labels import legend_beside
from conservtl.report.text.intervals import MeanInterval, metric_span
from conservtl.report.text.metrics import headline

__all__ = ["FORMS", "Points", "by_depth", "curve"]

Points = dict[int, MeanInterval]
"""Number of layers -> the metric in the shown unit."""

FORMS = {"AnB": "held (AnB)", "AnB+": "fine-tuned (AnB+)", "BnB": "control, held (BnB)", "BnB+": "control (BnB+)"}

# Colours of Okabe and Ito's palette that no domain has.
_LOOKS: dict[str, dict[str, Any]] = {
    "AnB": {"color": "#009E73", "linestyle": "-", "marker": "o", "linewidth": 2.0},
    "AnB+": {"color": "#A0457B", "linestyle": "--", "marker": "s", "linewidth": 2.0},
    "BnB": {"color": GREY, "linestyle": "-", "marker": "", "linewidth": 1.1},
    "BnB+": {"color": GREY, "linestyle": ":", "marker": "", "linewidth": 1.3},
}
_HEIGHT = 3.3
_TICKS = 22  # number of ticks that fit under one panel


def curve(result: Mapping[str, Any], side: str, form: str, domain: str) -> Points:
    """Return the measured points of one curve."""
    metric, points = headline(result), {}
    for each in result.get("curves") or []:
        if each["side"] == side and each["form"] == form:
            for point in each["points"]:
                if (span := metric_span(point.get(domain), metric)) is not None:
                    points[int(point["n"])] = span
    return dict(sorted(points.items()))


def by_depth(result: Mapping[str, Any], domain: str) -> Picture | None:
    """Draw both sides in one picture; None if nothing was measured."""
    sides = {}
    for side in ("input", "output"):
        curves = {form: points for form in FORMS if (points := curve(result, side, form, domain))}
        if curves:
            sides[side] = curves
    if not sides:
        return None
    metric = headline(result)
    before = metric_span((result.get("before") or {}).get(domain), metric)
    layers = [str(layer) for layer in result["layers"]]
    longest = max(len(shorten(layer, 18)) for layer in layers)

    def paint(figure: Any) -> None:
        panels = figure.subplots(1, len(sides), sharey=True, squeeze=False)[0]
        for axes, (side, curves) in zip(panels, sides.items(), strict=True):
            lines = _panel(axes, curves, before)
            _ticks(axes, side, layers)
        panels[0].set_ylabel(metric.with_unit(f"{domain} {metric.name}"), labelpad=7)
        legend_beside(panels[-1], lines)

    names = {"target": "How far layers transfer", "source": "What is left of the source"}
    alt = f"{domain} {metric.name} over the number of layers transferred, from {' and '.join(sides)} side."
    svg = draw(f"depth-{domain}", alt, _HEIGHT + 0.055 * longest, paint)
    return Picture(names[domain], _caption(sides, domain), svg)


def _panel(axes: Any, curves: Mapping[str, Points], before: MeanInterval | None) -> list[tuple[Any, str, str]]:
    """Draw one side's curves; return the entries of a legend."""
    entries = []
    for form, points in curves.items():
        look = _LOOKS[form]
        places, spans = list(points), list(points.values())
        style = {"markevery": -(-len(places) // 15), "zorder": 2 if look["marker"] else 1.5, "clip_on": False}
        (line,) = axes.plot(places, [span.mean for span in spans], label=FORMS[form], **style, **look)
        control = look["color"] == GREY
        entries.append((line, "#6B6B6B" if control else look["color"], "normal" if control else "bold"))
        if any(span.certain for span in spans):
            ends = [span.low for span in spans], [span.high for span in spans]
            axes.fill_between(places, *ends, color=look["color"], alpha=0.16, linewidth=0)
    if before is not None:
        dashes = (0, (5, 4))
        line = axes.axhline(before.mean, color=INK, linewidth=0.9, linestyle=dashes, zorder=1, label="source as it is")
        entries.append((line, INK, "normal"))
    bare(axes, grid="y")
    return entries


def _ticks(axes: Any, side: str, layers: Sequence[str]) -> None:
    """Label each number of layers with the layer that it adds."""
    order = layers if side == "input" else list(reversed(layers))
    every = -(-len(layers) // _TICKS)
    places = range(0, len(layers) + 1, every)
    names = ["0" if n == 0 else f"{shorten(order[n - 1], 18)}  {n}" for n in places]
    axes.set_xticks(places, names, rotation=90, rotation_mode="anchor", ha="right", va="center", size=8.5)
    axes.set_xlim(-0.3, len(layers) + 0.3)
    axes.set_xlabel(f"layers transferred from the {side} side")


def _caption(sides: Mapping[str, Mapping[str, Points]], domain: str) -> str:
    spans = [span for curves in sides.values() for points in curves.values() for span in points.values()]
    bands = "Bands: 95 % intervals of the mean." if any(s.certain for s in spans) else "One run each: no intervals."
    controls = any(form.startswith("B") for curves in sides.values() for form in curves)
    text = (
        "Transferred layers start from the source; all others are initialised anew. "
        "Beside each number: the layer that it adds."
    )
    if controls:
        text += " Grey: controls, which start from a network trained on the target’s shots alone."
    if domain == "source":
        text += " Measured on the source’s test data."
    return f"{text} {bands}"
