"""The trials of a search, and pictures of them: over each field, over time, and the front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conservtl.report.figures.canvas import GREY, PALE, SOURCE, TARGET, Picture, bare, draw, shorten
from conservtl.report.figures.plane import PlanePoint, Window, paint_plane, window
from conservtl.report.text.intervals import Span, harmonic
from conservtl.report.text.metrics import number

__all__ = ["SCORES", "Try", "front", "over_fields", "over_time", "tries"]

SCORES = {"target": "target accuracy", "harmonic": "harmonic mean", "both": "harmonic mean"}
"""What the heights are, by objective."""

_COLUMNS = 3
_SINGLE = "Each dot is one trial, so there are no intervals."


@dataclass(frozen=True)
class Try:
    """One trial: accuracies and score in per cent, None where there is none."""

    number: int
    state: str
    score: float | None
    target: float | None
    source: float | None
    params: Mapping[str, Any]
    seconds: float | None
    why: str | None
    best: bool

    @property
    def complete(self) -> bool:
        """Whether it went to its end."""
        return self.state == "complete" and self.score is not None


def tries(result: Mapping[str, Any]) -> list[Try]:
    """Every trial, in order of its number."""
    best, found = set(result.get("best") or []), []
    for trial in result["trials"]:
        values = [value for each in trial.get("values") or [] if (value := number(each)) is not None]
        two = result["objective"] == "both"
        score = harmonic(*values) if two and len(values) == 2 else values[0] if values and not two else None
        target, source = (number(trial.get(domain)) for domain in ("target", "source"))
        if two and len(values) == 2:
            target, source = values
        found.append(
            Try(
                number=int(trial["number"]),
                state=str(trial["state"]),
                score=None if score is None else 100 * score,
                target=None if target is None else 100 * target,
                source=None if source is None else 100 * source,
                params=trial.get("params") or {},
                seconds=number(trial.get("seconds")),
                why=trial.get("why"),
                best=trial["number"] in best,
            )
        )
    return sorted(found, key=lambda each: each.number)


def over_fields(result: Mapping[str, Any], trials: Sequence[Try]) -> Picture | None:
    """The score against each field; None where no trial has one."""
    fields = result["fields"]
    scored = [trial for trial in trials if trial.score is not None]
    if not scored or not fields:
        return None
    seen = _seen(scored)
    columns = min(_COLUMNS, len(fields))
    rows = -(-len(fields) // columns)
    height = 2.5 * rows + any(_upright(field) for field in fields.values())

    def paint(figure: Any) -> None:
        panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
        for panel in panels.flat[len(fields) :]:
            panel.set_visible(False)
        for axes, (name, field) in zip(panels.flat, fields.items(), strict=False):
            _field(axes, name, field, [trial for trial in scored if name in trial.params], seen)
        for panel in panels[:, 0]:
            panel.set_ylabel(f"{SCORES[result['objective']]} (%)")

    given_up = any(not trial.complete for trial in scored)
    ringed = "those on the Pareto front" if result["objective"] == "both" else "the best"
    caption = f"{_SINGLE} Ringed: {ringed}.{' Grey crosses: given up early.' if given_up else ''}"
    if any(trial.score < seen.cut for trial in scored if trial.score is not None):
        caption += " Dots at the lower edge lie below it."
    alt = f"{SCORES[result['objective']]} against each of {len(fields)} fields."
    return Picture("What each field does", caption, draw("fields", alt, height, paint))


def over_time(result: Mapping[str, Any], trials: Sequence[Try]) -> Picture | None:
    """The best score so far; None before two trials are complete."""
    scored = [trial for trial in trials if trial.score is not None]
    done = [trial for trial in scored if trial.complete]
    if len(done) < 2:
        return None
    seen = _seen(scored)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        best = [max(trial.score or 0 for trial in done[: place + 1]) for place in range(len(done))]
        places = [trial.number for trial in done]
        end = max(trial.number for trial in trials)
        axes.step([*places, end], [seen.edge(value) for value in [*best, best[-1]]], color=SOURCE, where="post")
        _dots(axes, [(trial.number, trial) for trial in scored], seen)
        axes.annotate(
            f"best so far {best[-1]:.1f}",
            (end, seen.edge(best[-1])),
            xytext=(10, 0),
            textcoords="offset points",
            color="#B34700",
            weight="bold",
            va="center",
            annotation_clip=False,
        )
        _frame(axes, seen)
        axes.set_xlabel("trial")
        axes.set_ylabel(f"{SCORES[result['objective']]} (%)")
        axes.xaxis.get_major_locator().set_params(integer=True)

    alt = f"Best {SCORES[result['objective']]} over {len(trials)} trials."
    caption = f"Where the line still rises at the end, more trials may bring more. {_SINGLE}"
    return Picture("The search", caption, draw("search", alt, 2.7, paint))


def front(trials: Sequence[Try]) -> Picture | None:
    """Target and source of every trial, those on the Pareto front joined; None where no trial has both."""
    placed = [trial for trial in trials if trial.complete and trial.target is not None and trial.source is not None]
    if not placed:
        return None
    best = sorted((trial for trial in placed if trial.best), key=lambda trial: trial.source or 0)

    def paint(figure: Any) -> None:
        others = [_mark(trial) for trial in placed if not trial.best]
        paint_plane(figure, figure.subplots(), others, [([_mark(trial) for trial in best], TARGET, ":")])

    caption = (
        "Up and to the right is better. Blue, with their numbers: trials that none beats in both at once. "
        f"Thin lines: equal harmonic mean (%). {_SINGLE} Arrows at the edge: beyond it."
    )
    alt = f"Target against source accuracy of {len(placed)} trials, {len(best)} on the Pareto front."
    return Picture("What the target gains, what the source keeps", caption, draw("front", alt, 4.6, paint))


def _mark(trial: Try) -> PlanePoint:
    source, target = (Span(value, value, value, 1) for value in (trial.source or 0.0, trial.target or 0.0))
    colour = TARGET if trial.best else GREY
    return PlanePoint(f"#{trial.number}" if trial.best else "", source, target, colour, colour, keep=trial.best)


def _seen(trials: Sequence[Try]) -> Window:
    spans = [Span(trial.score, trial.score, trial.score, 1) for trial in trials if trial.score is not None]
    return window(spans)


def _field(axes: Any, name: str, field: Mapping[str, Any], trials: Sequence[Try], seen: Window) -> None:
    choices = field.get("choices")
    if choices is None:
        places = [(float(trial.params[name]), trial) for trial in trials]
        axes.set_xlim(*_limits(field))
        if field.get("log"):
            _log_ticks(axes, float(field["low"]), float(field["high"]))
    else:
        order = [str(choice) for choice in choices]
        style = {"rotation": 90} if _upright(field) else {}
        axes.set_xticks(range(len(order)), [shorten(choice, 16) for choice in order], **style)
        axes.set_xlim(-0.5, len(order) - 0.5)
        # A little apart, so that trials with one value are told from each other.
        places = [
            (order.index(str(trial.params[name])) + 0.12 * ((trial.number * 0.618) % 1 - 0.5) * 4, trial)
            for trial in trials
            if str(trial.params[name]) in order
        ]
    _dots(axes, places, seen)
    _frame(axes, seen)
    axes.set_xlabel(f"{shorten(name, 30)}{' (log scale)' if field.get('log') else ''}")


def _upright(field: Mapping[str, Any]) -> bool:
    """Whether the names of the choices have no room beside each other."""
    return sum(min(len(str(choice)), 16) + 2 for choice in field.get("choices") or []) > 30


def _log_ticks(axes: Any, low: float, high: float) -> None:
    """Powers of ten in plain digits, four or so of them; the ends where there are too few."""
    powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    ticks = [10.0**power for power in powers[:: -(-len(powers) // 4) or 1]]
    axes.set_xscale("log")
    axes.set_xticks(ticks if len(ticks) > 1 else [low, high], minor=False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()


def _limits(field: Mapping[str, Any]) -> tuple[float, float]:
    low, high = float(field["low"]), float(field["high"])
    if field.get("log"):
        room = (high / low) ** 0.04
        return low / room, high * room
    room = 0.04 * (high - low)
    return low - room, high + room


def _dots(axes: Any, places: Sequence[tuple[float, Try]], seen: Window) -> None:
    for x, trial in places:
        y = seen.edge(trial.score or 0.0)
        if trial.complete:
            axes.plot([x], [y], "o", color=TARGET, alpha=0.65, markersize=5, markeredgewidth=0)
        else:
            axes.plot([x], [y], "x", color=GREY, markersize=5)
        if trial.best:
            axes.plot([x], [y], "o", markersize=10, markerfacecolor="none", markeredgecolor=SOURCE, markeredgewidth=1.8)


def _frame(axes: Any, seen: Window) -> None:
    axes.set_ylim(seen.low, seen.high)
    axes.yaxis.get_major_locator().set_params(nbins=6)
    bare(axes, grid="y")
    axes.spines["bottom"].set_visible(True)
    axes.spines["bottom"].set_color(PALE)
