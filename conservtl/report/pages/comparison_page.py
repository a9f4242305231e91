"""The page of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from conservtl.report.figures.by_target import by_target
from conservtl.report.figures.frontier import frontier, shots_text
from conservtl.report.figures.shots import error_by_shots
from conservtl.report.pages.rendering import render_many
from conservtl.report.text.html_table import Cell, Grid, Line
from conservtl.report.text.intervals import Span
from conservtl.report.text.metrics import Verdict
from conservtl.report.text.summary import duration
from conservtl.report.text.variants import Variant, best_own, main_table, variants

__all__ = ["write_compare"]

_NOTHING = Cell("–")


def write_compare(result: Mapping[str, Any], path: Path) -> None:
    """Write a comparison as one page that needs nothing else: no script, no font, no address on the network.

    The verdict, the frontier and the table of the spec's own number of shots (else the most) stand first.

    Args:
        result: what ``compare.json`` holds.
        path: the file to write or replace.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    tables, verdicts = result["tables"], list(result["verdict"])
    first = main_table(result)
    others = [place for place in range(len(tables)) if place != first]
    render_many(
        path,
        over="Comparison",
        title="Which method",
        sentence=verdicts[first] if tables else "There are no runs to compare.",
        tone=_tone(tables[first]) if tables else "unknown",
        more=[verdicts[place] for place in others],
        notes=[f"Not measured: {text}." for text in result.get("left_out") or []],
        parts=[
            *([frontier(tables[first], "frontier"), _grid(tables[first])] if tables else []),
            error_by_shots(tables, tables[first]) if tables else None,
            by_target(tables[first]) if tables else None,
            *(part for place in others for part in (frontier(tables[place], f"frontier{place}"), _grid(tables[place]))),
        ],
        spec=result.get("spec"),
    )


def _tone(table: Mapping[str, Any]) -> Verdict:
    own = best_own(variants(table))
    return "unknown" if own is None or own.difference is None else _against(own) or "same"


def _against(row: Variant) -> Literal["", "better", "worse"]:
    """A win, a loss beyond chance, or neither."""
    if row.wins:
        return "better"
    gap = row.difference
    return "worse" if gap is not None and gap.certain and gap.high < 0 else ""


def _grid(table: Mapping[str, Any]) -> Grid:
    """A row a variant, the best harmonic mean first; columns that nothing has are left out."""
    rows = sorted(variants(table), key=lambda row: -row.score.mean)
    sourced = any(row.source is not None for row in rows)
    compared = any(row.difference is not None for row in rows)
    header = ["", "target (%)"]
    header += ["source kept (%)", "harmonic mean (%)", "constrained score"] if sourced else []
    header += ["against the best baseline (points)"] if compared else []
    header += ["time a run", "runs"]
    note = "Beneath each mean its 95 % interval." if any(row.target.certain for row in rows) else ""
    if compared:
        note += " Differences are paired: same target, same seed."
    if sourced:
        note += (
            " Constrained score: the share of target errors mended, scaled down by what the source lost "
            "(nothing is left of it at a loss of 3 points)."
        )
    lines = [Line(_cells(row, sourced, compared), "quiet" if row.baseline else "strong") for row in rows]
    return Grid(f"In numbers, {shots_text(table['shots'])}", note.strip(), header, lines)


def _cells(row: Variant, sourced: bool, compared: bool) -> list[Cell]:
    cells = [Cell(row.name, row.note, colour=row.colour, mark=row.sign), _cell(row.target)]
    if sourced:
        score = _NOTHING if row.constrained is None else Cell(f"{row.constrained:.2f}")
        cells += [_cell(row.source), _cell(row.harmonic, strong=not row.baseline), score]
    if compared:
        cells.append(_difference(row))
    time = _NOTHING if row.seconds is None else Cell(duration(row.seconds.mean))
    return [*cells, time, Cell(str(row.target.count))]


def _cell(span: Span | None, *, strong: bool = False) -> Cell:
    return _NOTHING if span is None else Cell(span.text(), span.ends(), "strong" if strong else "")


def _difference(row: Variant) -> Cell:
    if row.difference is None:
        return Cell("" if row.best else "–")
    kind = "" if row.baseline else _against(row)
    return Cell(row.difference.signed(), row.difference.signed_ends(), kind)
