"""The page of a sweep over layers and strengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from conservtl.errors import agreeing, counted, joined
from conservtl.report.figures.canvas import Picture
from conservtl.report.figures.depths import FORMS, Points, by_depth, curve
from conservtl.report.figures.strengths import (
    StrengthStep,
    best_step,
    path_of,
    strength_curve,
    strengths_of,
    swept_method,
)
from conservtl.report.pages.rendering import write_page
from conservtl.report.text.examples import shots_of
from conservtl.report.text.html_table import Cell, HtmlTable, TableRow, interval_cell
from conservtl.report.text.intervals import MeanInterval, single
from conservtl.report.text.metrics import ACCURACY, Metric, headline
from conservtl.report.text.summary import study_notes

__all__ = ["free_layers", "layers_table", "strengths_table", "sweep_parts", "sweep_sentences", "write_sweep"]

_POINT = 1.0  # percentage points that a difference must have to count
_RELATIVE = 0.01  # of the better value, if the metric is no share
_SIDES = ("input", "output")


def write_sweep(result: Mapping[str, Any], path: Path) -> None:
    """Write a sweep as a page."""
    sentences = sweep_sentences(result)
    unmeasured = (result.get("before") or {}).get("source") is None
    write_page(
        path,
        result,
        over="Sweep over layers and strengths",
        title="How many layers, how strong",
        sentence=sentences[0] if sentences else "There are no runs to summarise.",
        more=sentences[1:],
        notes=[
            *_shots(result),
            *(["Not measured: what the source keeps, because it has no data."] if unmeasured else []),
            *study_notes(result),
        ],
        parts=sweep_parts(result),
    )


def sweep_parts(result: Mapping[str, Any]) -> list[Picture | HtmlTable | None]:
    """Return pictures and tables of a sweep from the top down; None where there is nothing to show."""
    return [
        by_depth(result, "target"),
        layers_table(result),
        by_depth(result, "source"),
        strength_curve(result),
        strengths_table(result),
    ]


def _shots(result: Mapping[str, Any]) -> list[str]:
    if result.get("shots") is None:
        return []
    text = shots_of(result, classes=bool(result.get("classes")))
    return [f"Every run adapts to {text}."]


def sweep_sentences(result: Mapping[str, Any]) -> list[str]:
    """Return which side transfers better, how many layers can be held, and which strength is best."""
    return [text for text in (_better_side(result), _holding(result), _best_strength(result)) if text]


def _better_side(result: Mapping[str, Any]) -> str:
    """Compare the sides by their held layers, at the numbers where the sides differ: neither none nor all."""
    metric = headline(result)
    held = {side: curve(result, side, "AnB", "target") for side in _SIDES}
    common = [n for n in held["input"] if n in held["output"] and 0 < n < len(result["layers"])]
    if not common:
        return ""
    means = {side: sum(points[n].mean for n in common) / len(common) for side, points in held.items()}
    over = counted(common[0], "layer") if len(common) == 1 else f"{common[0]} to {common[-1]} layers"
    good, poor = sorted(_SIDES, key=lambda side: -metric.rank(means[side]))
    shown = {side: metric.show_scaled(mean) for side, mean in means.items()}
    if metric.rank(means[good]) - metric.rank(means[poor]) < _least(means[good], metric):
        return (
            f"Both sides transfer alike: held, target {metric.name} is {shown['input']} from the input side and "
            f"{shown['output']} from the output side, over {over}."
        )
    return (
        f"The {good} side transfers better: held, target {metric.name} is {shown[good]} against {shown[poor]} "
        f"from the {poor} side, over {over}."
    )


def _holding(result: Mapping[str, Any]) -> str:
    """Return the number of layers that can be held at little cost to the target, compared with fine-tuning them."""
    metric, free, bound = headline(result), [], []
    cost = "a point" if metric.share else f"{100 * _RELATIVE:g} %"
    for side in _SIDES:
        held, tuned = (curve(result, side, form, "target") for form in ("AnB", "AnB+"))
        up_to, costly = free_layers(held, tuned, metric)
        if up_to:
            free.append(f"up to {counted(up_to, 'layer', of=len(result['layers']))} from the {side} side")
        elif costly:
            bound.append(f"the first {f'{costly} ' if costly > 1 else ''}from the {side} side")
    if free:
        more = f"; {bound[0]} more" if bound else ""
        return f"Held instead of fine-tuned, {' and '.join(free)} cost the target less than {cost}{more}."
    return f"Held instead of fine-tuned, even {' or '.join(bound)} costs the target {cost} or more." if bound else ""


def free_layers(held: Points, tuned: Points, metric: Metric = ACCURACY) -> tuple[int, int]:
    """Return up to how many layers can be held at a cost of less than a point, and the first number that costs more.

    A number of layers that gains nothing over none even if fine-tuned says nothing about holding and is passed over.
    0 if there is no such number.
    """
    free, nothing = 0, tuned.get(0)
    for n in sorted(set(held) & set(tuned) - {0}):
        least = _least(tuned[n].mean, metric)
        if nothing is not None and metric.rank(tuned[n].mean) - metric.rank(nothing.mean) < least:
            continue
        if metric.rank(tuned[n].mean) - metric.rank(held[n].mean) >= least:
            return free, n
        free = n
    return free, 0


def _least(value: float, metric: Metric) -> float:
    """Return the least difference from a value that counts, in the shown unit."""
    return _POINT if metric.share else _RELATIVE * abs(value)


def _best_strength(result: Mapping[str, Any]) -> str:
    metric = headline(result)
    best, path = best_step(strengths_of(result)), best_step(path_of(result))
    if best is None:
        return ""
    what = f"target {metric.name}" if best.source is None else metric.combination
    alike = [f"{step.at:g}" for step in strengths_of(result) if step.score == best.score]
    text = (
        f"Of the strengths of {swept_method(result)}, {joined(alike)} {agreeing(len(alike), 'has')} the best {what}, "
    )
    text += metric.show_scaled(best.score)
    if best.source is not None:
        target, source = (metric.show_scaled(span.mean) for span in (best.target, best.source))
        text += f" (target {target}, source {source})"
    if path is not None:
        text += f"; the path to fine-tuned weights reaches {metric.show_scaled(path.score)}, at t = {path.at:g}"
    return f"{text}."


def layers_table(result: Mapping[str, Any]) -> HtmlTable | None:
    """Return the target's metric over the number of layers; None if no layers were swept."""
    metric = headline(result)
    columns = [
        (f"{FORMS[form]}, {side}", points)
        for side in _SIDES
        for form in ("AnB", "AnB+")
        if (points := curve(result, side, form, "target"))
    ]
    if not columns:
        return None
    numbers = sorted({n for _, points in columns for n in points})
    rows = [TableRow([Cell(str(n)), *(interval_cell(points.get(n)) for _, points in columns)]) for n in numbers]
    header = ["layers transferred", *(f"{name} side" for name, _ in columns)]
    note = _note([span for _, points in columns for span in points.values()])
    return HtmlTable(f"In numbers, {metric.with_unit(f'target {metric.name}')}", note, header, rows)


def strengths_table(result: Mapping[str, Any]) -> HtmlTable | None:
    """Return both domains' metric over the strengths; None if none was run."""
    metric = headline(result)
    steps = strengths_of(result)
    if not steps:
        return None
    best = best_step(steps)
    columns: list[tuple[str, Callable[[StrengthStep], Cell]]] = [
        ("strength", lambda step: Cell(f"{step.at:g}", "the best" if step == best else "")),
        (metric.with_unit("target"), lambda step: interval_cell(step.target)),
    ]
    if any(step.source is not None for step in steps):
        both = metric.with_unit(f"{metric.combination} of both")
        columns.append((metric.kept, lambda step: interval_cell(step.source)))
        columns.append((both, lambda step: interval_cell(single(step.score, metric), "strong" if step == best else "")))
    rows = [TableRow([cell(step) for _, cell in columns], "strong" if step == best else "") for step in steps]
    note = _note([step.target for step in steps])
    return HtmlTable(f"Strengths of {swept_method(result)}", note, [name for name, _ in columns], rows)


def _note(spans: list[MeanInterval]) -> str:
    if any(span.certain for span in spans):
        return "Beneath each mean its 95 % interval."
    return "One run each." if all(span.count == 1 for span in spans) else "All runs of a row agree: no intervals."
