"""The page of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conservtl.report.pages.rendering import write_page
from conservtl.report.run_report import run_figures
from conservtl.report.text.chance import turned_notes
from conservtl.report.text.examples import examples_notes
from conservtl.report.text.metrics import number
from conservtl.report.text.summary import costly, duration, left_out_notes, sentence, verdict
from conservtl.report.text.tables import agreement_table, detail_tables, metric_table, plan_tables

__all__ = ["write_html"]

_NAMES = {"torch": "PyTorch", "python": "Python", "cuda": "CUDA", "os": "system"}


def write_html(report: Mapping[str, Any], history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a report as a page; parts that the report lacks are left out."""
    write_page(
        path,
        report,
        over="Adaptation report",
        title=f"Adapted to {report.get('target') or 'the target'}",
        sentence=str(report.get("sentence") or sentence(report)),
        tone="worse" if costly(report) else verdict(report),  # a gain that cost the source more counts as worse
        notes=[*examples_notes(report), *turned_notes(report), *left_out_notes(report)],
        parts=[
            metric_table(report),
            *run_figures(report, history),
            *plan_tables(report),
            *detail_tables(report),
            agreement_table(report),
        ],
        facts=[_environment(report), _seconds(report)],
    )


def _environment(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    given = report.get("environment") or {}
    return [(_NAMES.get(str(key), str(key).replace("_", " ")), str(value)) for key, value in given.items()]


def _seconds(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = {"source": "data and source model", "adapt": "adapting", "total": "all together"}
    given = {key: number(value) for key, value in (report.get("seconds") or {}).items()}
    rows = [(names.get(key, str(key)), duration(value)) for key, value in given.items() if value is not None]
    factor = number(report.get("real_time_factor"))
    return rows if factor is None else [*rows, ("real-time factor on the target's test part", f"{factor:.2g}")]
