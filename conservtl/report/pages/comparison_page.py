"""The page of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from conservtl.report.figures.by_target import by_target
from conservtl.report.figures.canvas import Picture
from conservtl.report.figures.frontier import frontier
from conservtl.report.figures.shots import error_by_shots
from conservtl.report.pages.rendering import write_page
from conservtl.report.text.examples import shots_of
from conservtl.report.text.html_table import Cell, HtmlTable, TableRow, interval_cell
from conservtl.report.text.metrics import Metric, Verdict, headline
from conservtl.report.text.summary import duration, left_out_notes, study_notes
from conservtl.report.text.variants import VariantResult, best_method, main_table, variants

__all__ = ["comparison_parts", "comparison_table", "write_compare"]


def write_compare(result: Mapping[str, Any], path: Path) -> None:
    """Write a comparison as a page.

    The verdict, the frontier and the table of the spec's own number of shots (else of the most) come first.
    """
    tables, verdicts = result["tables"], list(result["verdict"])
    metric, first = headline(result), main_table(result)
    others = [place for place in range(len(tables)) if place != first]
    write_page(
        path,
        result,
        over="Comparison",
        title="Which method",
        sentence=verdicts[first] if tables else "There are no runs to compare.",
        tone=_tone(tables[first], metric) if tables else "unknown",
        more=[verdicts[place] for place in others],
        notes=left_out_notes(result) + study_notes(result),
        parts=comparison_parts(result),
    )


def comparison_parts(result: Mapping[str, Any]) -> list[Picture | HtmlTable | None]:
    """Return pictures and tables of a comparison from the top down, those of the main number of shots first."""
    tables, metric, classes = result["tables"], headline(result), bool(result.get("classes", True))
    if not tables:
        return []
    first = main_table(result)
    parts: list[Picture | HtmlTable | None] = [
        frontier(tables[first], "frontier", metric, classes=classes),
        comparison_table(tables[first], metric, classes=classes),
        error_by_shots(tables, tables[first], metric, classes=classes),
        by_target(tables[first], metric),
        _trained_as(result.get("variants") or {}),
    ]
    for place in (place for place in range(len(tables)) if place != first):
        parts.append(frontier(tables[place], f"frontier{place}", metric, classes=classes))
        parts.append(comparison_table(tables[place], metric, classes=classes))
    return parts


def _trained_as(variants: Mapping[str, str]) -> HtmlTable:
    """Return how each variant is trained."""
    rows = [TableRow([Cell(name), Cell(how)]) for name, how in variants.items()]
    return HtmlTable("What is compared", "", ["", "trained"], rows, frozenset({0, 1}))


def _tone(table: Mapping[str, Any], metric: Metric) -> Verdict:
    best = best_method(variants(table, metric))
    return "unknown" if best is None or best.difference is None else _against_baseline(best) or "same"


def _against_baseline(row: VariantResult) -> Literal["", "better", "worse"]:
    """Return whether a variant wins, or loses beyond chance."""
    if row.wins:
        return "better"
    gap = row.difference
    return "worse" if gap is not None and gap.certain and gap.high < 0 else ""


def comparison_table(table: Mapping[str, Any], metric: Metric, *, classes: bool, brief: bool = False) -> HtmlTable:
    """Return one row a variant, the best first, without the columns that no variant fills.

    ``brief``: without constrained score, time and number of runs too.
    """
    rows = sorted(variants(table, metric), key=lambda row: -row.rank)
    sourced = any(row.source is not None for row in rows)
    scored = not brief and any(row.constrained is not None for row in rows)
    compared = any(row.difference is not None for row in rows)
    columns: list[tuple[str, Callable[[VariantResult], Cell]]] = [
        ("", lambda row: Cell(row.name, row.note, colour=row.colour, mark=row.sign)),
        (metric.with_unit("target"), lambda row: interval_cell(row.target)),
    ]
    if sourced:
        columns.append((metric.kept, lambda row: interval_cell(row.source)))
        columns.append((metric.with_unit(metric.combination), _combined))
    if scored:
        columns.append(("constrained score", lambda row: _number(row.constrained, "{:.2f}".format)))
    if compared:
        columns.append((f"against the best baseline{' (points)' if metric.share else ''}", _difference))
    if not brief:
        columns.append(("time a run", _time))
        columns.append(("runs", lambda row: Cell(str(row.target.count))))
    notes = [] if metric.key == "accuracy" else [f"{metric.direction}."]
    if any(row.target.certain for row in rows):
        notes.append("Beneath each mean its 95 % interval.")
    if compared:
        positive = "" if metric.better != "lower" else ", positive if better"
        notes.append(f"Differences are paired: same target, same seed{positive}.")
    if scored:
        notes.append(
            "Constrained score: the share of target errors corrected, scaled down by the source's loss "
            "(to 0 at a loss of 3 points)."
        )
    lines = [TableRow([cell(row) for _, cell in columns], "quiet" if row.baseline else "strong") for row in rows]
    where = shots_of(table, classes=classes)
    return HtmlTable(f"In numbers, {where}", " ".join(notes), [name for name, _ in columns], lines)


def _combined(row: VariantResult) -> Cell:
    return interval_cell(row.combined, "" if row.baseline else "strong")


def _time(row: VariantResult) -> Cell:
    return _number(None if row.seconds is None or row.untrained else row.seconds.mean, duration)


def _number(value: float | None, shown: Callable[[float], str]) -> Cell:
    return Cell("–" if value is None else shown(value))


def _difference(row: VariantResult) -> Cell:
    if row.difference is None:
        return Cell("" if row.best else "–")
    kind = "" if row.baseline else _against_baseline(row)
    return Cell(row.difference.signed(), row.difference.signed_ends(), kind)
