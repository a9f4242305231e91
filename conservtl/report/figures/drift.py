"""Distance of each layer from its source values, in the order of the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from conservtl.errors import counted
from conservtl.report.figures.canvas import GREY, INK, SOURCE, TARGET, Picture, bare, draw, shorten
from conservtl.report.text.metrics import number
from conservtl.report.text.summary import read_plan

__all__ = ["drift_by_layer"]

_ROWS = 24  # number of layers up to which each gets a row and a number
_TICKS = 70  # number of names that fit under upright bars
_NAME = 26  # characters of a name under an upright bar


@dataclass(frozen=True)
class Bar:
    """One layer: its drift in per cent (None if fresh) and its state."""

    layer: str
    drift: float | None
    state: Literal["trained", "frozen", "fresh"]


def drift_by_layer(report: Mapping[str, Any]) -> Picture | None:
    """Draw one bar a layer, input side first, frozen and fresh layers marked; None if no drift was measured."""
    bars = _bars(report)
    moved = [bar for bar in bars if bar.drift is not None]
    if not moved:
        return None
    most = max(moved, key=lambda bar: bar.drift or 0)
    alt = f"Drift by layer, {counted(len(bars), 'layer')}; {most.layer} moved most, by {most.drift:.2g} %."
    if len(bars) <= _ROWS:
        svg = draw("drift", alt, 0.27 * len(bars) + 0.75, lambda figure: _horizontal(figure.subplots(), bars))
    else:
        longest = max(len(shorten(bar.layer, _NAME)) for bar in bars)
        svg = draw("drift", alt, 2.9 + 0.065 * longest, lambda figure: _upright(figure.subplots(), bars))
    marks = {"frozen": "frozen throughout", "fresh": "new, without a source value"}
    states = {bar.state for bar in bars}
    notes = "".join(f" “{state}”: {text}." for state, text in marks.items() if state in states)
    side = "at the top" if len(bars) <= _ROWS else "on the left"
    caption = f"Distance from the source weights over their norm; input side {side}.{notes}"
    return Picture("How far each layer moved", caption, svg)


def _bars(report: Mapping[str, Any]) -> list[Bar]:
    drift = {str(layer): number(value) for layer, value in (report.get("drift") or {}).items()}
    plan = read_plan(report)
    if plan is None:
        return [Bar(layer, 100 * value, "trained") for layer, value in drift.items() if value is not None]
    trained = set(plan.trained)
    bars = []
    for layer, rows in plan.by_layer():
        value = drift.pop(layer, None)
        if all(row.origin == "fresh" for row in rows):
            bars.append(Bar(layer, None, "fresh"))
        elif value is not None:
            still = not any(row.name in trained for row in rows)
            bars.append(Bar(layer, 100 * value, "frozen" if still else "trained"))
    # Layers that are not in the plan.
    return bars + [Bar(layer, 100 * value, "trained") for layer, value in drift.items() if value is not None]


def _horizontal(axes: Any, bars: Sequence[Bar]) -> None:
    widths = [bar.drift or 0 for bar in bars]
    longest = max(widths) or 1
    colours = [GREY if bar.state == "frozen" else TARGET for bar in bars]
    axes.barh(range(len(bars)), widths, height=0.66, color=colours)
    for row, bar in enumerate(bars):
        text = bar.state if bar.drift is None or (bar.state == "frozen" and bar.drift == 0) else _short(bar.drift)
        if bar.state == "frozen" and bar.drift:
            text += "  frozen"
        axes.annotate(
            text,
            (bar.drift or 0, row),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=SOURCE if bar.state == "fresh" else INK if bar.state == "trained" else GREY,
            style="normal" if bar.state == "trained" else "italic",
        )
    axes.set_yticks(range(len(bars)), [shorten(bar.layer, 36) for bar in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.1 * longest)
    axes.set_xlabel("drift ‖w − w₀‖ / ‖w₀‖ (%)")
    axes.set_ylabel("layer")
    bare(axes, grid="x")


def _upright(axes: Any, bars: Sequence[Bar]) -> None:
    heights = [bar.drift or 0 for bar in bars]
    longest = max(heights) or 1
    colours = [GREY if bar.state == "frozen" else TARGET for bar in bars]
    axes.bar(range(len(bars)), heights, width=0.72, color=colours)
    for state, colour, marker in (("frozen", GREY, "s"), ("fresh", SOURCE, "D")):
        at = [place for place, bar in enumerate(bars) if bar.state == state]
        if at:
            above = [(bars[place].drift or 0) + 0.02 * longest for place in at]
            axes.plot(at, above, marker, color=colour, markersize=4, linestyle="none", label=state)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0, handletextpad=0.2)
    every = -(-len(bars) // _TICKS)
    places = range(0, len(bars), every)
    names = [shorten(bars[place].layer, _NAME) for place in places]
    size = min(9.0, 620 / len(places))
    axes.set_xticks(places, names, rotation=90, rotation_mode="anchor", ha="right", va="center", size=size)
    axes.set_xlim(-0.8, len(bars) - 0.2)
    axes.set_ylim(0, 1.08 * longest)
    axes.set_ylabel("drift ‖w − w₀‖ / ‖w₀‖ (%)")
    step = "" if every == 1 else f", every {every}th named"
    axes.set_xlabel(f"layer{step}")
    bare(axes, grid="y")


def _short(value: float) -> str:
    if value == 0:
        return "0 %"
    return f"{value:.1f} %" if value >= 0.1 else f"{value:.1g} %"
