"""A table of a page as plain text: cells, rows, columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Cell", "HtmlTable", "TableRow"]


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
    """

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[TableRow]
    text_columns: frozenset[int] = field(default=frozenset({0}))

    @property
    def number_columns(self) -> frozenset[int]:
        """Positions of the columns of numbers."""
        return frozenset(range(len(self.header))) - self.text_columns
