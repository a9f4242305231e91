"""A table as plain text: what stands in which cell, and how it is meant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Cell", "Grid", "Line"]


@dataclass(frozen=True)
class Cell:
    """One cell.

    Args:
        text: what it says.
        small: said beneath, smaller: an interval, a remark.
        kind: how it is meant.
        colour: of the mark before it, as in the pictures; empty: none.
        mark: the mark.
    """

    text: str
    small: str = ""
    kind: Literal["", "better", "worse", "strong"] = ""
    colour: str = ""
    mark: str = "●"


@dataclass(frozen=True)
class Line:
    """One row: ``quiet`` for what is only held against, ``strong`` for what is asked about."""

    cells: Sequence[Cell]
    kind: Literal["", "quiet", "strong"] = ""


@dataclass(frozen=True)
class Grid:
    """A table of the page.

    Args:
        title: above it; empty: none.
        note: how to read it.
        header: names of the columns.
        lines: rows.
        words: places of the columns that hold words; the others hold numbers and stand to the right.
    """

    title: str
    note: str
    header: Sequence[str]
    lines: Sequence[Line]
    words: frozenset[int] = field(default=frozenset({0}))

    @property
    def numbers(self) -> frozenset[int]:
        """Places of the columns that hold numbers."""
        return frozenset(range(len(self.header))) - self.words
