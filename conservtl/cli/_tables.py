"""Tables of a report on a terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from conservtl.report.text.html_table import HtmlTable

__all__ = ["rich_table"]


def rich_table(table: HtmlTable) -> Table:
    """Return a table of a page; beneath each cell stands its interval or remark."""
    shown = Table(box=None, header_style="bold", pad_edge=False, title_justify="left", caption_justify="left")
    shown.title, shown.caption = Text(table.title), Text(table.note) if table.note else None
    for place, name in enumerate(table.header):
        shown.add_column(Text(name), justify="right" if place in table.number_columns else "left")
    for row in table.rows:
        cells = [Text(f"{cell.text}\n{cell.note}" if cell.note else cell.text) for cell in row.cells]
        shown.add_row(*cells, style={"quiet": "dim", "strong": "bold"}.get(row.kind, ""))
    return shown
