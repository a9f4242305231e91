"""The page of a search."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from conservtl.errors import agreeing, counted, joined
from conservtl.report.figures.trials import SearchTrial, against_fields, front, over_time, score_name, trials_of
from conservtl.report.pages.rendering import write_page
from conservtl.report.text.html_table import Cell, HtmlTable, TableRow, interval_cell
from conservtl.report.text.intervals import single
from conservtl.report.text.metrics import Metric, headline
from conservtl.report.text.summary import duration

__all__ = ["best_lines", "trials_table", "tune_notes", "tune_sentence", "write_tune"]

_ROWS = 8  # number of trials in the table if there is no front
_COLUMNS = 4  # number of fields up to which each gets a column; more share one
_EDGE = 0.03  # of a range: a value nearer to its end than that is at the end


def write_tune(result: Mapping[str, Any], path: Path) -> None:
    """Write a search as a page."""
    trials, metric = trials_of(result), headline(result)
    both = result["objective"] == "both"
    fields, table = against_fields(result, trials), trials_table(result)
    write_page(
        path,
        result,
        over="Search over settings",
        title="Which settings",
        sentence=tune_sentence(result),
        notes=tune_notes(result),
        parts=[*((front(trials, metric), table, fields) if both else (fields, table)), over_time(result, trials)],
    )


def tune_sentence(result: Mapping[str, Any]) -> str:
    """Return the best trial and the number of trials as a sentence."""
    trials, metric = trials_of(result), headline(result)
    best = sorted((trial for trial in trials if trial.best and trial.score is not None), key=lambda trial: -trial.rank)
    if not trials:
        return "There are no trials yet."
    if not best or best[0].score is None:
        return f"No trial of {len(trials)} is complete, so there is nothing to choose from."
    first, score = best[0], metric.show_scaled(best[0].score)
    if result["objective"] == "both":
        ends = [choose(best, key=lambda trial: trial.target or 0) for choose in (min, max)]
        text = f"Of {counted(len(trials), 'trial')}, {len(best)} {agreeing(len(best), 'is')} on the Pareto front"
        if len(best) > 1:
            text += f", from {_pair(ends[0])} to {_pair(ends[1])}"
        return f"{text}; the best {metric.combination}, {score}, is that of trial {first.number}."
    also = f" ({_pair(first)})" if result["objective"] == "harmonic" and first.target is not None else ""
    return f"Of {counted(len(trials), 'trial')}, number {first.number} is the best: {score_name(result)} {score}{also}."


def _pair(trial: SearchTrial) -> str:
    show = trial.metric.show_scaled
    return f"target {show(trial.target or 0)}" + ("" if trial.source is None else f", source {show(trial.source)}")


def best_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the settings of each best trial."""
    return [
        f"best: trial {trial.number}: {', '.join(f'{name} = {_value(value)}' for name, value in trial.params.items())}"
        for trial in trials_of(result)
        if trial.best
    ]


def tune_notes(result: Mapping[str, Any]) -> list[str]:
    """Return remarks: trials that score alike, a value at the end of its range, trials that are not complete."""
    trials = trials_of(result)
    notes = _uncertainty(result, trials)
    best = max((trial for trial in trials if trial.best), key=lambda trial: trial.rank, default=None)
    for name, field in result["fields"].items() if best is not None else ():
        if best is not None and name in best.params and at_the_end(best.params[name], field):
            notes.append(
                f"{name} = {_value(best.params[name])} lies at the end of its range ({field['low']:g} to "
                f"{field['high']:g}): a wider range may hold a better value."
            )
    states = Counter(trial.state for trial in trials if not trial.complete)
    if states:
        counts = ", ".join(
            f"{count} {'stopped early' if state == 'pruned' else state}" for state, count in states.items()
        )
        notes.append(f"Not complete: {counts}.")
    why = Counter(trial.why for trial in trials if trial.state == "failed" and trial.why)
    notes += [f"{counted(count, 'trial')} failed: {reason}" for reason, count in why.most_common(2)]
    if best is None:
        return notes
    return [*notes, "Results are on validation parts, which the search has used: expect a little less on test data."]


def _uncertainty(result: Mapping[str, Any], trials: Sequence[SearchTrial]) -> list[str]:
    """Return by how much one validation example changes the target's metric, and which trials score as the best."""
    notes, metric = [], headline(result)
    if (count := result.get("validation")) and metric.key == "accuracy":
        one = metric.show_difference(100 / count).removeprefix("+")
        notes.append(f"The target is judged on {counted(count, 'validation example')}: one changes it by {one}.")
    best = next((trial for trial in trials if trial.best and trial.score is not None), None)
    alike = [str(trial.number) for trial in trials if best and trial.complete and trial.score == best.score]
    if len(alike) > 1 and result["objective"] != "both":
        notes.append(f"Trials {joined(alike)} have the same score: the search does not tell them apart.")
    return notes


def at_the_end(value: Any, field: Mapping[str, Any]) -> bool:
    """Return whether a value is so near an end of its range that a wider range may hold a better one."""
    if field.get("choices") is not None:
        return False
    low, high, number = float(field["low"]), float(field["high"]), float(value)
    if field.get("log"):
        low, high, number = math.log(low), math.log(high), math.log(number)
    return high > low and min(number - low, high - number) < _EDGE * (high - low)


def trials_table(result: Mapping[str, Any]) -> HtmlTable | None:
    """Return the trials on the Pareto front, or the best few; None if none is complete."""
    trials = trials_of(result)
    metric, both = headline(result), result["objective"] == "both"
    complete = sorted((trial for trial in trials if trial.complete), key=lambda trial: -trial.rank)
    shown = [trial for trial in complete if trial.best] if both else complete[:_ROWS]
    if not shown:
        return None
    fields = list(result["fields"])
    columns: list[tuple[str, Callable[[SearchTrial], Cell]]] = [
        ("trial", lambda trial: Cell(f"#{trial.number}")),
        (metric.with_unit("target"), lambda trial: _cell(trial.target, metric)),
    ]
    if any(trial.source is not None for trial in shown):
        columns.append((metric.kept, lambda trial: _cell(trial.source, metric)))
        columns.append((metric.with_unit(metric.combination), _combined))
    if apart := len(fields) <= _COLUMNS:
        columns += [(name, partial(_setting, name)) for name in fields]
    else:
        columns.append(("settings", lambda trial: Cell(", ".join(f"{n} = {_setting(n, trial).text}" for n in fields))))
    columns.append(("time", lambda trial: Cell("–" if trial.seconds is None else duration(trial.seconds))))
    rows = [
        TableRow([cell(trial) for _, cell in columns], "strong" if trial.best and not both else "") for trial in shown
    ]
    title = "On the Pareto front" if both else "The best trials"
    text_columns = frozenset({0} if apart else {0, len(columns) - 2})
    return HtmlTable(title, "", [name for name, _ in columns], rows, text_columns)


def _cell(value: float | None, metric: Metric) -> Cell:
    return interval_cell(None if value is None else single(value, metric))


def _combined(trial: SearchTrial) -> Cell:
    known = trial.target is not None and trial.source is not None
    return _cell(trial.metric.combined(trial.target or 0, trial.source or 0) if known else None, trial.metric)


def _setting(name: str, trial: SearchTrial) -> Cell:
    return Cell(_value(trial.params[name]) if name in trial.params else "–")


def _value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
