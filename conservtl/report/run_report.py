"""The report of a run as a dictionary that notebooks show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from conservtl.errors import MissingExtraError
from conservtl.fragments import fragment
from conservtl.report.figures.canvas import Picture
from conservtl.report.figures.classes import class_chart
from conservtl.report.figures.curves import learning_curves, weight_path
from conservtl.report.figures.drift import drift_by_layer
from conservtl.report.text.html_table import Cell, HtmlTable, TableRow
from conservtl.report.text.summary import sentence
from conservtl.report.text.tables import agreement_rows, metric_table

__all__ = ["RunReport", "drawn", "run_figures"]


class RunReport(dict[str, Any]):
    """Content of ``report.json``; a notebook shows its sentence, metrics and figures.

    Args:
        report: the content.
        history: content of ``history.jsonl``, one entry an epoch.
    """

    def __init__(self, report: Mapping[str, Any], history: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__(report)
        self.history = tuple(history)

    def table(self) -> HtmlTable:
        """Return each metric of target and source before and after, and the agreement with the source model."""
        metrics = metric_table(self)
        agreement = [TableRow([Cell(""), *map(Cell, row), Cell("")]) for row in agreement_rows(self)]
        return replace(metrics, rows=[*metrics.rows, *agreement])

    def figures(self) -> list[Picture]:
        """Return the pictures of the report.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        return run_figures(self, self.history)

    def _repr_html_(self) -> str:
        title = str(self.get("sentence") or sentence(self))
        return fragment(self.table()._repr_html_(), *drawn(self.figures), title=title)


def run_figures(report: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Return learning curves, the path between source and trained weights, drift by layer, and classes."""
    pictures = [learning_curves(report, history), weight_path(report), drift_by_layer(report), class_chart(report)]
    return [picture for picture in pictures if picture]


def drawn(figures: Callable[[], Iterable[Picture]]) -> list[str]:
    """Return pictures as HTML; none where matplotlib is not installed."""
    try:
        return [picture._repr_html_() for picture in figures()]
    except MissingExtraError:
        return []
