"""The page of a run or a study: one look for all, complete in itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from conservtl.extras import require
from conservtl.report.figures.canvas import Picture
from conservtl.report.text.html_table import HtmlTable
from conservtl.report.text.metrics import Verdict
from conservtl.report.text.report_json import plain
from conservtl.storage.files import write_text
from conservtl.tasks.bad_files import shown_name

__all__ = ["write_page"]


def write_page(
    path: Path,
    report: Mapping[str, Any],
    *,
    over: str,
    title: str,
    sentence: str,
    parts: Sequence[Picture | HtmlTable | None],
    tone: Verdict = "unknown",
    more: Sequence[str] = (),
    notes: Sequence[str] = (),
    facts: Sequence[Sequence[tuple[str, str]]] = (),
) -> None:
    """Write a report as one self-contained page: no script, no font, no link to the network.

    Args:
        path: file of the page.
        report: content of the JSON file; its skipped files, its examples and its spec are shown below the parts.
        over: kind of page, above the heading.
        title: of the browser's tab.
        sentence: the answer, which is the heading.
        parts: pictures and tables from the top down; None and tables without rows are left out.
        tone: colour of the heading.
        more: further answers.
        notes: remarks.
        facts: lists of name and value beside the spec; empty ones are left out.
    """
    jinja2 = require("jinja2", "report")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(unbroken=_unbroken, breakable=_breakable, shown=shown_name)
    template = resources.files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    spec = report.get("spec")
    page = environment.from_string(template).render(
        over=over,
        title=title,
        sentence=sentence,
        tone=tone,
        more=more,
        notes=notes,
        parts=[part for part in parts if isinstance(part, Picture) or (part is not None and part.rows)],
        skipped=report.get("skipped") or {"files": (), "count": 0},
        examples=(report.get("details") or {}).get("examples") or [],
        facts=[entries for entries in facts if entries],
        spec=yaml.safe_dump(plain(spec), sort_keys=False, allow_unicode=True) if spec else "",
    )
    write_text(page, path)


def _unbroken(text: str) -> str:
    """Keep a number and its unit on one line."""
    return text.replace(" %", "\u00a0%").replace(" points", "\u00a0points")


def _breakable(name: str) -> str:
    """Allow a line break after each part of a dotted name."""
    return re.sub(r"(?<=\w)([._])(?=\w)", "\\1\u200b", name)
