"""Pieces of HTML for notebooks: complete in themselves, escaped, and in the colours of the page around them.

A notebook may be light or dark, and some viewers drop style sheets: every style is inline, text and lines have the
colour of the text around, and pictures, whose ink is dark, have a light card.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape

__all__ = ["figure_html", "fragment", "html_table", "text_table"]

_TABLE = "border-collapse:collapse;color:inherit;background:transparent;font-size:0.9em;margin:0.3em 0"
_CELL = "padding:0.15em 0.7em;border:0;vertical-align:top;background:transparent;color:inherit"
_CARD = "background:#fff;color:#222;padding:0.8em;border-radius:6px;max-width:960px;margin:0.5em 0"
_MARKS = {"": "", "strong": "font-weight:bold", "quiet": "opacity:0.8"}


def fragment(*parts: str, title: str = "", notes: Sequence[str] = ()) -> str:
    """Return pieces of HTML under a title, with notes beneath, of which empty ones are left out."""
    head = [f'<div style="font-weight:bold">{escape(title)}</div>'] if title else []
    foot = [f'<div style="font-size:0.85em;opacity:0.8">{escape(note)}</div>' for note in notes if note]
    return f'<div style="color:inherit;margin:0.4em 0">{"".join([*head, *parts, *foot])}</div>'


def html_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str | tuple[str, str]]],
    text_columns: Collection[int] = (0,),
    marks: Sequence[str] = (),
) -> str:
    """Return a table; a cell is text, or text with a note beneath, and a row may be marked "strong" or "quiet"."""

    def cell(tag: str, place: int, content: str | tuple[str, str], style: str = "") -> str:
        text, note = content if isinstance(content, tuple) else (content, "")
        beneath = f'<div style="font-size:0.8em;opacity:0.75">{escape(note)}</div>' if note else ""
        align = "left" if place in text_columns else "right"
        return f'<{tag} style="{_CELL};text-align:{align};{style}">{escape(text)}{beneath}</{tag}>'

    rule = "border-bottom:1px solid currentColor"
    head = "".join(cell("th", place, name, rule) for place, name in enumerate(header))
    body = []
    for number, row in enumerate(rows):
        mark = _MARKS[marks[number]] if marks else ""
        cells = "".join(cell("td", place, content) for place, content in enumerate(row))
        body.append(f'<tr style="background:transparent;{mark}">{cells}</tr>')
    return (
        f'<table style="{_TABLE}"><thead><tr style="background:transparent">{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def figure_html(title: str, caption: str, svg: str) -> str:
    """Return a drawing, an ``<svg>`` element that is escaped already, with title and caption on a light card."""
    return (
        f'<figure style="{_CARD}"><div style="font-weight:bold;color:#222">{escape(title)}</div>{svg}'
        f'<figcaption style="font-size:0.85em;color:#555">{escape(caption)}</figcaption></figure>'
    )


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Collection[int] = (0,)) -> str:
    """Return a table in plain characters.

    >>> print(text_table(["layer", "rate"], [["conv", "0.1"], ["fc", "1"]]))
    layer  rate
    conv    0.1
    fc        1
    """
    widths = [max(len(row[place]) for row in (header, *rows)) for place in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [
            text.ljust(width) if place in text_columns else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
