"""Pages from templates: one look for all of them, nothing in them that stands elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from conservtl.extras import require
from conservtl.files import write_text
from conservtl.report.figures.canvas import Picture
from conservtl.report.text.html_table import Grid
from conservtl.report.text.metrics import Verdict
from conservtl.report.text.report_json import plain

__all__ = ["render", "render_many", "settings"]


def render(template: str, path: Path, **content: Any) -> None:
    """Fill a template and write the page.

    Args:
        template: file beside this one.
        path: the file to write or replace.
        content: what the template names; ``sentence`` stands on top.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    jinja2 = require("jinja2", "report")
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(_read),
    )
    environment.filters.update(unbroken=_unbroken, breakable=_breakable)
    write_text(environment.get_template(template).render(**content), path)


def render_many(
    path: Path,
    *,
    over: str,
    title: str,
    sentence: str,
    parts: Sequence[Picture | Grid | None],
    spec: Any,
    tone: Verdict = "unknown",
    more: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> None:
    """Write the page of a question that took many runs.

    Args:
        path: the file to write or replace.
        over: what kind of page it is.
        title: of the browser's tab.
        sentence: the answer.
        parts: pictures and tables from the top down; None is left out.
        spec: the settings.
        tone: what colours the sentence.
        more: further sentences that answer.
        notes: what is to be known beside.
    """
    render(
        "many.html.j2",
        Path(path),
        over=over,
        title=title,
        sentence=sentence,
        tone=tone,
        more=more,
        notes=notes,
        parts=[part for part in parts if part is not None],
        spec=settings(spec),
        environment=[],
        seconds=[],
    )


def settings(spec: Mapping[str, Any] | None) -> str:
    """A spec as YAML; empty where there is none."""
    return yaml.safe_dump(plain(spec), sort_keys=False, allow_unicode=True) if spec else ""


def _unbroken(text: str) -> str:
    """A number and its unit stay on one line."""
    return text.replace(" %", "\u00a0%").replace(" points", "\u00a0points")


def _breakable(name: str) -> str:
    """A dotted name may go on in the next line after each part."""
    return re.sub(r"(?<=\w)([._])(?=\w)", "\\1\u200b", name)


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
