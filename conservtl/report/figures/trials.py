"""The trials of a search: against each field, over time, and on the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conservtl.errors import counted
from conservtl.report.figures.canvas import GREY, SOURCE, TARGET, Picture, bare, draw, shorten
from conservtl.report.figures.plane import PlanePoint, Window, metric_axis, paint_plane, window_of
from conservtl.report.text.intervals import single
from conservtl.report.text.metrics import ACCURACY, Metric, headline, number

__all__ = ["SearchTrial", "against_fields", "front", "over_time", "score_name", "trials_of"]

_COLUMNS = 3
_SINGLE = "Each dot is one trial, so there are no intervals."


@dataclass(frozen=True)
class SearchTrial:
    """One trial: metric and score in the shown unit, None if not measured."""

    number: int
    state: str
    score: float | None
    target: float | None
    source: float | None
    params: Mapping[str, Any]
    seconds: float | None
    why: str | None
    best: bool
    metric: Metric

    @property
    def rank(self) -> float:
        """A key that is largest for the best trial."""
        return -math.inf if self.score is None else self.metric.rank(self.score)

    @property
    def complete(self) -> bool:
        """Whether it ran to its end."""
        return self.state == "complete" and self.score is not None


def score_name(result: Mapping[str, Any]) -> str:
    """Return the name of the score that trials are judged by."""
    metric = headline(result)
    return f"target {metric.name}" if result["objective"] == "target" else metric.combination


def trials_of(result: Mapping[str, Any]) -> list[SearchTrial]:
    """Return every trial, in order of its number."""
    metric, best, trials = headline(result), set(result.get("best") or []), []
    both = result["objective"] == "both"
    for trial in result["trials"]:
        values = [metric.scaled(value) for each in trial.get("values") or [] if (value := number(each)) is not None]
        target, source = (
            None if value is None else metric.scaled(value)
            for value in (number(trial.get(domain)) for domain in ("target", "source"))
        )
        score = values[0] if values and not both else None
        if both and len(values) == 2:
            target, source = values
            score = metric.combined(target, source)
        trials.append(
            SearchTrial(
                number=int(trial["number"]),
                state=str(trial["state"]),
                score=score,
                target=target,
                source=source,
                params=trial.get("params") or {},
                seconds=number(trial.get("seconds")),
                why=trial.get("why"),
                best=trial["number"] in best,
                metric=metric,
            )
        )
    return sorted(trials, key=lambda trial: trial.number)


def against_fields(result: Mapping[str, Any], trials: Sequence[SearchTrial]) -> Picture | None:
    """Draw the score against each field; None if no trial has a score."""
    fields, metric = result["fields"], headline(result)
    scored = [trial for trial in trials if trial.score is not None]
    if not scored or not fields:
        return None
    seen = _window(scored, metric)
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
            panel.set_ylabel(metric.with_unit(score_name(result)))
            metric_axis(panel.yaxis, metric)

    given_up = any(not trial.complete for trial in scored)
    ringed = "the trials on the Pareto front" if result["objective"] == "both" else "the best"
    caption = f"Up is better. {_SINGLE} Ringed: {ringed}.{' Grey crosses: stopped early.' if given_up else ''}"
    if any(trial.rank < seen.cut for trial in scored):
        caption += " Dots at the lower edge lie below it."
    alt = f"{score_name(result)} against each of {counted(len(fields), 'field')}."
    return Picture("What each field does", caption, draw("fields", alt, height, paint))


def over_time(result: Mapping[str, Any], trials: Sequence[SearchTrial]) -> Picture | None:
    """Draw the best score so far; None before two trials are complete."""
    metric = headline(result)
    scored = [trial for trial in trials if trial.score is not None]
    complete = [trial for trial in scored if trial.complete]
    if len(complete) < 2:
        return None
    seen = _window(scored, metric)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        best = [max(trial.rank for trial in complete[: place + 1]) for place in range(len(complete))]
        end = max(trial.number for trial in trials)
        places = [*(trial.number for trial in complete), end]
        axes.step(places, [seen.edge(value) for value in [*best, best[-1]]], color=SOURCE, where="post")
        _dots(axes, [(trial.number, trial) for trial in scored], seen)
        axes.annotate(
            f"best so far {single(metric.rank(best[-1]), metric).text()}",
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
        axes.set_ylabel(metric.with_unit(score_name(result)))
        metric_axis(axes.yaxis, metric)
        axes.xaxis.get_major_locator().set_params(integer=True)

    alt = f"Best {score_name(result)} over {counted(len(trials), 'trial')}."
    caption = f"Up is better: if the line still rises at the end, more trials may find better settings. {_SINGLE}"
    return Picture("The search", caption, draw("search", alt, 2.7, paint))


def front(trials: Sequence[SearchTrial], metric: Metric = ACCURACY) -> Picture | None:
    """Draw target and source of every trial, with the Pareto front joined; None if no trial has both."""
    measured = [trial for trial in trials if trial.complete and trial.target is not None and trial.source is not None]
    if not measured:
        return None
    best = sorted((trial for trial in measured if trial.best), key=lambda trial: trial.source or 0)

    def paint(figure: Any) -> None:
        others = [_mark(trial) for trial in measured if not trial.best]
        paint_plane(figure, figure.subplots(), others, [([_mark(trial) for trial in best], TARGET, ":")], metric)

    caption = (
        "Up and to the right is better. Blue, with their numbers: trials that no other beats in both domains. "
        f"Thin lines: equal {metric.with_unit(metric.combination)}. {_SINGLE} Arrows at the edge: beyond it."
    )
    alt = f"Target against source {metric.name} of {counted(len(measured), 'trial')}, {len(best)} on the Pareto front."
    return Picture("What the target gains, what the source keeps", caption, draw("front", alt, 4.6, paint))


def _mark(trial: SearchTrial) -> PlanePoint:
    source, target = (single(value or 0.0, trial.metric) for value in (trial.source, trial.target))
    colour = TARGET if trial.best else GREY
    return PlanePoint(f"#{trial.number}" if trial.best else "", source, target, colour, colour, to_scale=trial.best)


def _window(trials: Sequence[SearchTrial], metric: Metric) -> Window:
    """Return the range of an axis of scores, negated if lower is better."""
    return window_of([single(trial.rank, metric) for trial in trials], metric)


def _field(axes: Any, name: str, field: Mapping[str, Any], trials: Sequence[SearchTrial], seen: Window) -> None:
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
        # Moved apart a little, so that trials with the same choice do not cover each other.
        places = [
            (order.index(str(trial.params[name])) + 0.12 * ((trial.number * 0.618) % 1 - 0.5) * 4, trial)
            for trial in trials
            if str(trial.params[name]) in order
        ]
    _dots(axes, places, seen)
    _frame(axes, seen)
    axes.set_xlabel(f"{shorten(name, 30)}{' (log scale)' if field.get('log') else ''}")


def _upright(field: Mapping[str, Any]) -> bool:
    """Whether the choices' names must be vertical to fit."""
    return sum(min(len(str(choice)), 16) + 2 for choice in field.get("choices") or []) > 30


def _log_ticks(axes: Any, low: float, high: float) -> None:
    """Label about four powers of ten in plain digits; the ends of the range if it has fewer than two."""
    powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    ticks = [10.0**power for power in powers[:: -(-len(powers) // 4) or 1]]
    axes.set_xscale("log")
    axes.set_xticks(ticks if len(ticks) > 1 else [low, high], minor=False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()


def _limits(field: Mapping[str, Any]) -> tuple[float, float]:
    low, high = float(field["low"]), float(field["high"])
    if field.get("log"):
        margin = (high / low) ** 0.04
        return low / margin, high * margin
    margin = 0.04 * (high - low)
    return low - margin, high + margin


def _dots(axes: Any, places: Sequence[tuple[float, SearchTrial]], seen: Window) -> None:
    for x, trial in places:
        y = seen.edge(trial.rank)
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
