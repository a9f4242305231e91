"""The page of a search."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conservtl.report.figures.trials import SCORES, Try, front, over_fields, over_time, tries
from conservtl.report.pages.rendering import render_many
from conservtl.report.text.html_table import Cell, Grid, Line
from conservtl.report.text.intervals import harmonic
from conservtl.report.text.summary import duration

__all__ = ["tune_sentence", "write_tune"]

_ROWS = 8  # trials in the table, where there is no front
_OWN = 4  # fields that get a column each; more of them share one
_EDGE = 0.03  # of a range: nearer to its end than that is at its end


def write_tune(result: Mapping[str, Any], path: Path) -> None:
    """Write a search as one page that needs nothing else: no script, no font, no address on the network.

    Args:
        result: what ``tune.json`` holds.
        path: the file to write or replace.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    trials = tries(result)
    both = result["objective"] == "both"
    fields, grid = over_fields(result, trials), _grid(result, trials)
    render_many(
        path,
        over="Search over settings",
        title="Which settings",
        sentence=tune_sentence(result),
        notes=_notes(result, trials),
        parts=[*((front(trials), grid, fields) if both else (fields, grid)), over_time(result, trials)],
        spec=result.get("spec"),
    )


def tune_sentence(result: Mapping[str, Any]) -> str:
    """What was found, and among how many."""
    trials = tries(result)
    best = sorted((trial for trial in trials if trial.best and trial.score is not None), key=_order)
    if not trials:
        return "There are no trials yet."
    if not best:
        return f"No trial of {len(trials)} is complete, so there is nothing to choose from."
    first, what = best[0], SCORES[result["objective"]]
    if result["objective"] == "both":
        low, high = min(best, key=lambda trial: trial.target or 0), max(best, key=lambda trial: trial.target or 0)
        text = f"Of {_many(len(trials), 'trial')}, {len(best)} {'is' if len(best) == 1 else 'are'} on the Pareto front"
        if len(best) > 1:
            text += f", from {_pair(low)} to {_pair(high)}"
        return f"{text}; the best harmonic mean, {first.score:.1f} %, is that of trial {first.number}."
    also = f" ({_pair(first)})" if result["objective"] == "harmonic" and first.target is not None else ""
    return f"Of {_many(len(trials), 'trial')}, number {first.number} is the best: {what} {first.score:.1f} %{also}."


def _order(trial: Try) -> float:
    return -(trial.score or 0.0)


def _pair(trial: Try) -> str:
    source = "" if trial.source is None else f", source {trial.source:.1f} %"
    return f"target {trial.target or 0:.1f} %{source}"


def _many(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"


def _notes(result: Mapping[str, Any], trials: Sequence[Try]) -> list[str]:
    """Where the best lies at the end of a range, and what became of trials that are not complete."""
    notes = []
    best = min((trial for trial in trials if trial.best), key=_order, default=None)
    for name, field in result["fields"].items() if best is not None else ():
        if best is not None and name in best.params and at_the_end(best.params[name], field):
            notes.append(
                f"{name} = {_value(best.params[name])} lies at the end of its range ({field['low']:g} to "
                f"{field['high']:g}): a wider one may hold better."
            )
    states = Counter(trial.state for trial in trials if not trial.complete)
    if states:
        said = ", ".join(
            f"{count} {'given up early' if state == 'pruned' else state}" for state, count in states.items()
        )
        notes.append(f"Not complete: {said}.")
    why = Counter(trial.why for trial in trials if trial.state == "failed" and trial.why)
    notes += [f"{_many(count, 'trial')} failed: {reason}" for reason, count in why.most_common(2)]
    if best is None:
        return notes
    return [*notes, "Accuracies are on validation parts, which the search has looked at: expect a little less."]


def at_the_end(value: Any, field: Mapping[str, Any]) -> bool:
    """Whether a value is so near an end of its range that a wider range may hold a better one."""
    if field.get("choices") is not None:
        return False
    low, high, at = float(field["low"]), float(field["high"]), float(value)
    if field.get("log"):
        low, high, at = math.log(low), math.log(high), math.log(at)
    return high > low and min(at - low, high - at) < _EDGE * (high - low)


def _grid(result: Mapping[str, Any], trials: Sequence[Try]) -> Grid | None:
    """Those on the front, or the best few."""
    both = result["objective"] == "both"
    scored = sorted((trial for trial in trials if trial.complete), key=_order)
    shown = [trial for trial in scored if trial.best] if both else scored[:_ROWS]
    if not shown:
        return None
    fields = list(result["fields"])
    apart = len(fields) <= _OWN
    sourced = any(trial.source is not None for trial in shown)
    measured = ["target (%)", *(["source kept (%)", "harmonic mean (%)"] if sourced else [])]
    header = ["trial", *measured, *(fields if apart else ["settings"]), "time"]
    lines = [
        Line(_cells(trial, fields, sourced=sourced, apart=apart), "strong" if trial.best and not both else "")
        for trial in shown
    ]
    title = "On the Pareto front" if both else "The best trials"
    return Grid(title, "", header, lines, frozenset({0} if apart else {0, len(header) - 2}))


def _cells(trial: Try, fields: Sequence[str], *, sourced: bool, apart: bool) -> list[Cell]:
    cells = [Cell(f"#{trial.number}"), _percent(trial.target)]
    if sourced:
        known = trial.target is not None and trial.source is not None
        cells += [
            _percent(trial.source),
            _percent(harmonic(trial.target or 0, trial.source or 0) if known else None),
        ]
    values = [_value(trial.params[name]) if name in trial.params else "–" for name in fields]
    if apart:
        cells += [Cell(value) for value in values]
    else:
        cells.append(Cell(", ".join(f"{name} = {value}" for name, value in zip(fields, values, strict=True))))
    return [*cells, Cell("–" if trial.seconds is None else duration(trial.seconds))]


def _percent(value: float | None) -> Cell:
    return Cell("–" if value is None else f"{value:.1f}")


def _value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
