"""The page of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from conservtl.report.figures.by_target import by_target
from conservtl.report.figures.canvas import Picture
from conservtl.report.figures.frontier import frontier
from conservtl.report.figures.shots import error_by_shots
from conservtl.report.pages.rendering import write_page
from conservtl.report.text.examples import shots_text, taken_of
from conservtl.report.text.html_table import Cell, HtmlTable, TableRow, interval_cell
from conservtl.report.text.metrics import Metric, Verdict, headline
from conservtl.report.text.summary import duration, left_out_notes, rows_notes
from conservtl.report.text.variants import VariantResult, best_method, main_table, variants

__all__ = ["comparison_parts", "comparison_table", "write_compare"]

_MISSING = Cell("–")


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
        notes=left_out_notes(result) + rows_notes(result),
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
    ]
    for place in (place for place in range(len(tables)) if place != first):
        parts.append(frontier(tables[place], f"frontier{place}", metric, classes=classes))
        parts.append(comparison_table(tables[place], metric, classes=classes))
    return parts


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
    header = ["", metric.with_unit("target")]
    header += [metric.kept, metric.with_unit(metric.combination)] if sourced else []
    header += ["constrained score"] if scored else []
    header += [f"against the best baseline{' (points)' if metric.share else ''}"] if compared else []
    header += [] if brief else ["time a run", "runs"]
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
    lines = [
        TableRow(_cells(row, sourced, scored, compared)[: len(header)], "quiet" if row.baseline else "strong")
        for row in rows
    ]
    where = shots_text(table["shots"], classes=classes, taken=taken_of(table))
    return HtmlTable(f"In numbers, {where}", " ".join(notes), header, lines)


def _cells(row: VariantResult, sourced: bool, scored: bool, compared: bool) -> list[Cell]:
    cells = [Cell(row.name, row.note, colour=row.colour, mark=row.sign), interval_cell(row.target)]
    if sourced:
        cells += [interval_cell(row.source), interval_cell(row.combined, "" if row.baseline else "strong")]
    if scored:
        cells.append(_MISSING if row.constrained is None else Cell(f"{row.constrained:.2f}"))
    if compared:
        cells.append(_difference(row))
    time = _MISSING if row.seconds is None else Cell(duration(row.seconds.mean))
    return [*cells, time, Cell(str(row.target.count))]


def _difference(row: VariantResult) -> Cell:
    if row.difference is None:
        return Cell("" if row.best else "–")
    kind = "" if row.baseline else _against_baseline(row)
    return Cell(row.difference.signed(), row.difference.signed_ends(), kind)
