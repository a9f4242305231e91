"""Tables of benchmarks/results, read from their Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["RESULTS", "Table", "number", "settings", "tables"]

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@dataclass(frozen=True)
class Table:
    """One table: the headings above it, its columns and rows of text."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def of(self, name: str) -> Table:
        """Return the rows that measure a strategy, whether alone or with another."""
        rows = tuple(row for row in self.rows if re.search(rf"\b{name}\b", row[0]))
        return Table(self.heading, self.columns, rows)

    def markdown(self) -> str:
        """Return the table as Markdown; empty without rows."""
        if not self.rows:
            return ""
        lines = [self.columns, ("---", *["---:"] * (len(self.columns) - 1)), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(name: str) -> Iterator[Table]:
    """Yield the tables of a file in benchmarks/results, from top to bottom."""
    heading, lines = "", []
    for line in [*(RESULTS / name).read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("|"):
            lines.append(tuple(cell.strip() for cell in line.strip("|").split("|")))
            continue
        if lines:
            yield Table(heading, lines[0], tuple(lines[2:]))
            lines = []
        if line.startswith("#"):
            heading = line.lstrip("# ")


def settings() -> list[Table]:
    """Return the methods' accuracy on target and source, a table for each setting of the benchmark's first table."""
    first, *others = tables("methods.md")
    return [next(table for table in others if table.heading == heading) for heading in first.columns[1:]]


def number(cell: str) -> float | None:
    """Return the number that a cell begins with."""
    found = re.match(r"-?\d+(\.\d+)?", cell)
    return None if found is None else float(found[0])
