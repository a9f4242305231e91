"""Pages from templates: one look for all of them, each complete in itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from conservtl.extras import require
from conservtl.report.figures.canvas import Picture
from conservtl.report.text.examples import skipped_rows
from conservtl.report.text.html_table import HtmlTable
from conservtl.report.text.metrics import Verdict
from conservtl.report.text.report_json import plain
from conservtl.storage.files import write_text

__all__ = ["as_yaml", "render", "render_study"]


def render(template: str, path: Path, **content: Any) -> None:
    """Fill a template, a file beside this one, and write the page."""
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


def render_study(
    path: Path,
    *,
    over: str,
    title: str,
    sentence: str,
    parts: Sequence[Picture | HtmlTable | None],
    result: Mapping[str, Any],
    tone: Verdict = "unknown",
    more: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> None:
    """Write the page of a study of many runs, with the answer as its heading, coloured by ``tone``.

    ``over`` is the kind of page, above the heading, ``title`` that of the browser's tab. The settings and skipped files
    of ``result`` are shown below the parts.
    """
    render(
        "study.html.j2",
        Path(path),
        over=over,
        title=title,
        sentence=sentence,
        tone=tone,
        more=more,
        notes=notes,
        parts=[part for part in parts if part is not None],
        **skipped_rows(result),
        spec=as_yaml(result.get("spec")),
        environment=[],
        seconds=[],
    )


def as_yaml(spec: Mapping[str, Any] | None) -> str:
    """Return a spec as YAML; empty if there is none."""
    return yaml.safe_dump(plain(spec), sort_keys=False, allow_unicode=True) if spec else ""


def _unbroken(text: str) -> str:
    """Keep a number and its unit on one line."""
    return text.replace(" %", "\u00a0%").replace(" points", "\u00a0points")


def _breakable(name: str) -> str:
    """Allow a line break after each part of a dotted name."""
    return re.sub(r"(?<=\w)([._])(?=\w)", "\\1\u200b", name)


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
