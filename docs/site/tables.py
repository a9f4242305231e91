"""Tables of the pages that the code decides: ``python docs/site/tables.py`` writes them anew, between their marks."""

from __future__ import annotations

import re
from pathlib import Path

from advice_table import advice_table, amount_table, distance_table

from conservtl import errors

DOCS = Path(__file__).parents[1]
PAGES = ("choosing.md", "errors.md")


def error_table() -> str:
    """Return each exception with its bases and the first line of its docstring."""
    classes = ((name, getattr(errors, name)) for name in errors.__all__ if name[0].isupper())
    rows = [
        f"| `{name}` | {', '.join(f'`{base.__name__}`' for base in cls.__bases__)} | {cls.__doc__.splitlines()[0]} |"
        for name, cls in classes
    ]
    return "\n".join(["| class | is also | raised when |", "| --- | --- | --- |", *rows])


TABLES = {"advice": advice_table, "amounts": amount_table, "distances": distance_table, "errors": error_table}


def filled(text: str) -> str:
    """Return a page with its tables written anew."""
    marked = r"<!-- table: (\w+) -->\n.*?<!-- end -->"
    return re.sub(
        marked, lambda name: f"<!-- table: {name[1]} -->\n\n{TABLES[name[1]]()}\n\n<!-- end -->", text, flags=re.DOTALL
    )


if __name__ == "__main__":
    for page in PAGES:
        path = DOCS / page
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
