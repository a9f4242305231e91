"""A table of a page: cells, rows, columns; printed as text, and shown by notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from conservtl.fragments import fragment, html_table, text_table
from conservtl.report.text.intervals import MeanInterval

__all__ = ["Cell", "HtmlTable", "TableRow", "interval_cell"]


@dataclass(frozen=True)
class Cell:
    """One cell.

    Args:
        text: its content.
        note: small text beneath: an interval, a remark.
        kind: emphasis.
        colour: of the mark before the text, as in the pictures; empty: no mark.
        mark: the mark.
    """

    text: str
    note: str = ""
    kind: Literal["", "better", "worse", "strong"] = ""
    colour: str = ""
    mark: str = "●"


def interval_cell(span: MeanInterval | None, kind: Literal["", "strong"] = "") -> Cell:
    """Return a mean with its interval beneath; a dash if it was not measured."""
    return Cell("–") if span is None else Cell(span.text(), span.ends(), kind)


@dataclass(frozen=True)
class TableRow:
    """One row: ``strong`` for the method in question, ``quiet`` for what it is compared with."""

    cells: Sequence[Cell]
    kind: Literal["", "quiet", "strong"] = ""


@dataclass(frozen=True)
class HtmlTable:
    """A table of the page.

    Args:
        title: above it; empty: none.
        note: how to read it.
        header: names of the columns.
        rows: from the top down.
        text_columns: positions of the columns of text; the others hold numbers, aligned to the right.
        look: style of the page: ``numbers`` is large.
    """

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[TableRow]
    text_columns: frozenset[int] = frozenset({0})
    look: Literal["grid", "numbers"] = "grid"

    @property
    def number_columns(self) -> frozenset[int]:
        """Positions of the columns of numbers."""
        return frozenset(range(len(self.header))) - self.text_columns

    def __str__(self) -> str:
        rows = [[f"{cell.text} ({cell.note})" if cell.note else cell.text for cell in row.cells] for row in self.rows]
        table = text_table(self.header, rows, self.text_columns)
        return "\n".join(part for part in (self.title, table, self.note) if part)

    def _repr_html_(self) -> str:
        rows = [[(cell.text, cell.note) for cell in row.cells] for row in self.rows]
        table = html_table(self.header, rows, self.text_columns, [row.kind for row in self.rows])
        return fragment(table, title=self.title, notes=[self.note])
