"""The page of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conservtl.report.pages.rendering import as_yaml, render
from conservtl.report.run_report import run_figures
from conservtl.report.text.examples import examples_notes, skipped_rows
from conservtl.report.text.html_table import Cell, HtmlTable, TableRow
from conservtl.report.text.metrics import Verdict, number
from conservtl.report.text.summary import costly, duration, left_out_notes, sentence, verdict
from conservtl.report.text.tables import agreement_rows, metric_rows, plan_table

__all__ = ["write_html"]

_NAMES = {"conservtl": "conservtl", "torch": "PyTorch", "python": "Python", "cuda": "CUDA", "os": "system"}


def write_html(report: Mapping[str, Any], history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a report as one self-contained page: no script, no font, no link to the network.

    Parts that the report lacks are left out of the page.
    """
    render(
        "run.html.j2",
        path,
        over="Adaptation report",
        title=f"Adapted to {report.get('target') or 'the target'}",
        sentence=str(report.get("sentence") or sentence(report)),
        tone=_tone(report),
        numbers=metric_rows(report),
        pictures=run_figures(report, history),
        plan=plan_table(report),
        agreement=agreement_rows(report),
        details=_details(report),
        examples=(report.get("details") or {}).get("examples") or [],
        left_out=[*examples_notes(report), *left_out_notes(report)],
        **skipped_rows(report),
        spec=as_yaml(report.get("spec")),
        environment=_environment(report),
        seconds=_seconds(report),
    )


def _tone(report: Mapping[str, Any]) -> Verdict:
    """Return the colour of the sentence; a gain that cost the source more counts as worse."""
    return "worse" if costly(report) else verdict(report)


def _details(report: Mapping[str, Any]) -> list[HtmlTable]:
    """Return the tables that the task adds."""
    tables = (report.get("details") or {}).get("tables") or []
    return [
        HtmlTable(
            one["title"],
            one["note"],
            one["header"],
            [TableRow([Cell(str(text)) for text in row]) for row in one["rows"]],
            frozenset(one["text_columns"]),
        )
        for one in tables
        if one["rows"]
    ]


def _environment(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    given = report.get("environment") or {}
    return [(_NAMES.get(str(key), str(key).replace("_", " ")), str(value)) for key, value in given.items()]


def _seconds(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = {"source": "data and source model", "adapt": "adapting", "total": "all together"}
    given = {key: number(value) for key, value in (report.get("seconds") or {}).items()}
    rows = [(names.get(key, str(key)), duration(value)) for key, value in given.items() if value is not None]
    factor = number(report.get("real_time_factor"))
    return rows if factor is None else [*rows, ("real-time factor on the target's test part", f"{factor:.2g}")]
