"""Results as tables and lines of a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from conservtl.report.text.examples import shots_text, taken_of
from conservtl.report.text.gains import GAINS, gain_rows
from conservtl.report.text.intervals import MeanInterval, difference_span, metric_span
from conservtl.report.text.metrics import headline

__all__ = ["comparison_tables", "run_table", "trial_line"]


def run_table(report: Mapping[str, Any]) -> Table:
    """Return the headline metric of both domains before and after, and the agreement with the source model."""
    table, metric = _table(*GAINS[1:]), headline(report)
    for row in gain_rows(report, {domain: [metric] for domain in ("target", "source")}):
        table.add_row(*row)
    return table


def comparison_tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """Return one table for each number of shots, a row for each variant, with 95 % intervals."""
    metric = headline(result)
    for shots in result["tables"]:
        title = shots_text(shots["shots"], classes=bool(result["classes"]), taken=taken_of(shots))
        table = _table("target", "source", metric.combination, "difference", title=title)
        for row in shots["rows"]:
            cells = [_interval(metric_span(row[key], metric)) for key in ("target", "source", "harmonic")]
            difference = difference_span(row["difference"], metric)
            cells.append("" if difference is None else f"{difference.signed()}\n{difference.signed_ends()}")
            table.add_row(Text(row["variant"]), *cells, style="dim" if row["baseline"] else "")
        yield table


def trial_line(trial: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Return number, scores and settings of a trial of a search."""
    metric = headline(result)
    scores = ", ".join(metric.show(value) for value in trial["values"])
    settings = ", ".join(f"{name} = {value}" for name, value in trial["params"].items())
    return f"trial {trial['number']}, {scores}: {settings}"


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, title=title)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _interval(span: MeanInterval | None) -> str:
    """Return the mean and, beneath it, the ends of its interval."""
    return "" if span is None else f"{span.text()}\n{span.ends()}"
