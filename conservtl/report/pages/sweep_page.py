"""The page of a sweep over layers and strengths."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conservtl.report.figures.depths import FORMS, Points, by_depth, curve
from conservtl.report.figures.strengths import StrengthStep, best_step, method_of, path_of, strength_curve, strengths_of
from conservtl.report.pages.rendering import render_many
from conservtl.report.text.html_table import Cell, Grid, Line
from conservtl.report.text.intervals import Span

__all__ = ["free_layers", "sweep_sentences", "write_sweep"]

_POINT = 1.0  # percentage points that a difference must have to be worth a word
_SIDES = ("input", "output")


def write_sweep(result: Mapping[str, Any], path: Path) -> None:
    """Write a sweep as one page that needs nothing else: no script, no font, no address on the network.

    Args:
        result: what ``sweep.json`` holds.
        path: the file to write or replace.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    said = sweep_sentences(result)
    unmeasured = (result.get("before") or {}).get("source") is None
    render_many(
        path,
        over="Sweep over layers and strengths",
        title="How many layers, how strong",
        sentence=said[0] if said else "There are no runs to sum up.",
        more=said[1:],
        notes=["Not measured: what the source keeps, for it has no data."] if unmeasured else [],
        parts=[
            by_depth(result, "target"),
            _layers(result),
            by_depth(result, "source"),
            strength_curve(result),
            _strengths(result),
        ],
        spec=result.get("spec"),
    )


def sweep_sentences(result: Mapping[str, Any]) -> list[str]:
    """Which side transfers better, how many layers can be held, and which strength is best."""
    return [text for text in (_better_side(result), _holding(result), _strongest(result)) if text]


def _better_side(result: Mapping[str, Any]) -> str:
    """By the layers that are held, where the sides differ: neither none nor all of them."""
    held = {side: curve(result, side, "AnB", "target") for side in _SIDES}
    common = [n for n in held["input"] if n in held["output"] and 0 < n < len(result["layers"])]
    if not common:
        return ""
    means = {side: sum(points[n].mean for n in common) / len(common) for side, points in held.items()}
    over = (
        f"{common[0]} layer{'s' if common[0] > 1 else ''}"
        if len(common) == 1
        else f"{common[0]} to {common[-1]} layers"
    )
    high, low = sorted(_SIDES, key=lambda side: -means[side])
    if means[high] - means[low] < _POINT:
        return (
            f"Both sides transfer alike: held, target accuracy is {means['input']:.1f} % from the input side and "
            f"{means['output']:.1f} % from the output side, over {over}."
        )
    return (
        f"The {high} side transfers better: held, target accuracy is {means[high]:.1f} % against {means[low]:.1f} % "
        f"from the {low} side, over {over}."
    )


def _holding(result: Mapping[str, Any]) -> str:
    """Up to how many layers holding them costs the target less than a point against fine-tuning them too."""
    free, bound = [], []
    for side in _SIDES:
        up_to, costly = free_layers(*(curve(result, side, form, "target") for form in ("AnB", "AnB+")))
        if up_to:
            free.append(f"up to {up_to} of {len(result['layers'])} layers from the {side} side")
        elif costly:
            bound.append(f"the first {f'{costly} ' if costly > 1 else ''}from the {side} side")
    if free:
        more = f"; {bound[0]} more" if bound else ""
        return f"Held instead of fine-tuned, {' and '.join(free)} cost the target less than a point{more}."
    return f"Held instead of fine-tuned, even {' or '.join(bound)} costs the target a point or more." if bound else ""


def free_layers(held: Points, tuned: Points) -> tuple[int, int]:
    """Up to how many layers holding them costs less than a point at every number measured, and where it costs more.

    Numbers that bring nothing even fine-tuned, against no layer at all, say nothing about holding and do not count.
    0 stands for none.
    """
    free, nothing = 0, tuned.get(0)
    for n in sorted(set(held) & set(tuned) - {0}):
        if nothing is not None and tuned[n].mean - nothing.mean < _POINT:
            continue
        if tuned[n].mean - held[n].mean >= _POINT:
            return free, n
        free = n
    return free, 0


def _strongest(result: Mapping[str, Any]) -> str:
    best, path = best_step(strengths_of(result)), best_step(path_of(result))
    if best is None:
        return ""
    what = "target accuracy" if best.source is None else "harmonic mean"
    text = f"Of the strengths of {method_of(result)}, {best.at:g} has the best {what}, {best.score:.1f} %"
    if best.source is not None:
        text += f" (target {best.target.text()} %, source {best.source.text()} %)"
    if path is not None:
        text += f"; the path to fine-tuned weights reaches {path.score:.1f} %, at t = {path.at:g}"
    return f"{text}."


def _layers(result: Mapping[str, Any]) -> Grid | None:
    columns = [
        (f"{FORMS[form]}, {side}", points)
        for side in _SIDES
        for form in ("AnB", "AnB+")
        if (points := curve(result, side, form, "target"))
    ]
    if not columns:
        return None
    numbers = sorted({n for _, points in columns for n in points})
    lines = [Line([Cell(str(n)), *(_cell(points.get(n)) for _, points in columns)]) for n in numbers]
    header = ["layers transferred", *(f"{name} side" for name, _ in columns)]
    return Grid(
        "In numbers, target accuracy (%)", _note([p for _, points in columns for p in points.values()]), header, lines
    )


def _strengths(result: Mapping[str, Any]) -> Grid | None:
    steps = strengths_of(result)
    if not steps:
        return None
    best = best_step(steps)
    sourced = any(step.source is not None for step in steps)
    header = ["strength", "target (%)", *(["source kept (%)", "harmonic mean of both (%)"] if sourced else [])]
    lines = [Line(_row(step, sourced=sourced, best=step == best), "strong" if step == best else "") for step in steps]
    return Grid(f"Strengths of {method_of(result)}", _note([step.target for step in steps]), header, lines)


def _row(step: StrengthStep, *, sourced: bool, best: bool) -> list[Cell]:
    cells = [Cell(f"{step.at:g}", "the best" if best else ""), _cell(step.target)]
    return [*cells, _cell(step.source), Cell(f"{step.score:.1f}", kind="strong" if best else "")] if sourced else cells


def _cell(span: Span | None) -> Cell:
    return Cell("–") if span is None else Cell(span.text(), span.ends())


def _note(spans: list[Span]) -> str:
    return "Beneath each mean its 95 % interval." if any(span.certain for span in spans) else "One run each."
