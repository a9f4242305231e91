"""Results of studies: tables and figures of a report, printed as text and shown by notebooks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conservtl.fragments import fragment
from conservtl.report.figures.canvas import Picture
from conservtl.report.figures.strengths import best_step, strengths_of
from conservtl.report.pages.comparison_page import comparison_parts, comparison_table, write_compare
from conservtl.report.pages.sweep_page import layers_table, strengths_table, sweep_parts, sweep_sentences, write_sweep
from conservtl.report.run_report import drawn
from conservtl.report.text.examples import skipped_notes
from conservtl.report.text.html_table import HtmlTable
from conservtl.report.text.metrics import headline
from conservtl.report.text.summary import study_notes
from conservtl.report.text.variants import best_method, main_table, variants

__all__ = ["Comparison", "Sweep"]


@dataclass(frozen=True)
class _Study(ABC):
    """What the results of all studies have."""

    result: Mapping[str, Any]

    @property
    def runs(self) -> Sequence[Mapping[str, Any]]:
        """Every run: ``variant``, ``target``, ``seed``, metrics ``before`` and ``after``."""
        runs: Sequence[Mapping[str, Any]] = self.result["runs"]
        return runs

    def figure(self) -> Picture:
        """Return the first picture of the report: the one that answers the study's question.

        Of a comparison, the target's gain against what the source keeps. Of a sweep, the target over the number of
        layers, or else over the strengths.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        return self.figures()[0]

    def figures(self) -> list[Picture]:
        """Return all pictures of the report.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        return [part for part in self._parts() if isinstance(part, Picture)]

    @property
    @abstractmethod
    def sentences(self) -> list[str]:
        """The answer."""

    @abstractmethod
    def tables(self) -> list[HtmlTable]:
        """Return the tables of the report, without its pictures."""

    @property
    def notes(self) -> list[str]:
        """What was left out or could not be measured, rows copied by label, and skipped files."""
        left = [f"Left out: {text}." for text in self.result.get("left_out") or ()]
        return [*left, *study_notes(self.result), *skipped_notes(self.result)]

    def __str__(self) -> str:
        parts = ["\n".join(self.sentences), *map(str, self.tables()), "\n".join(self.notes)]
        return "\n\n".join(part for part in parts if part)

    @abstractmethod
    def _parts(self) -> Iterable[Any]:
        """Return the parts of the report."""

    @abstractmethod
    def write(self, path: str | Path) -> None:
        """Write the report as one self-contained page.

        Raises:
            MissingExtraError: matplotlib or jinja2 is not installed.
        """


@dataclass(frozen=True)
class Comparison(_Study):
    """Result of a comparison; printed, it shows the verdict and the table of each number of shots.

    Args:
        result: content of ``compare.json``: tables of all variants, and all runs.
    """

    @property
    def best(self) -> str:
        """Name of the best of the compared variants, by target and source together if both are scored."""
        rows = variants(self.result["tables"][main_table(self.result)], headline(self.result))
        found = best_method(rows)
        return "" if found is None else found.name

    @property
    def wins(self) -> bool:
        """Whether the best variant beats the best baseline beyond chance."""
        return any(row["wins"] and row["variant"] == self.best for row in self.rows)

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        """One row for each variant and baseline: ``variant``, ``target``, ``source``, ``harmonic``, ``difference``."""
        rows: Sequence[Mapping[str, Any]] = self.result["tables"][main_table(self.result)]["rows"]
        return rows

    @property
    def verdict(self) -> str:
        """One sentence on the best variant against the best baseline."""
        return " ".join(self.result["verdict"])

    @property
    def sentences(self) -> list[str]:
        """The verdict for each number of shots."""
        return list(self.result["verdict"])

    def table(self) -> HtmlTable:
        """Return the means with their 95 % intervals, the best first."""
        return self.tables()[main_table(self.result)]

    def tables(self, *, brief: bool = False) -> list[HtmlTable]:
        """Return a table for each number of shots; ``brief``: without constrained score, time and number of runs."""
        metric, classes = headline(self.result), bool(self.result.get("classes", True))
        return [comparison_table(table, metric, classes=classes, brief=brief) for table in self.result["tables"]]

    def _parts(self) -> Iterable[Any]:
        return comparison_parts(self.result)

    def write(self, path: str | Path) -> None:  # noqa: D102 - as of all studies
        write_compare(self.result, Path(path))

    def _repr_html_(self) -> str:
        return fragment(self.table()._repr_html_(), *drawn(self.figures), title=self.verdict, notes=self.notes)


@dataclass(frozen=True)
class Sweep(_Study):
    """Result of a sweep; printed, it shows its sentences and tables.

    Args:
        result: content of ``sweep.json``: curves over layers and strengths, and all runs.
    """

    @property
    def best(self) -> float | None:
        """The best strength, by target and source together if both are scored; None: no strength was run."""
        found = best_step(strengths_of(self.result))
        return None if found is None else found.at

    @property
    def sentences(self) -> list[str]:
        """Which side transfers better, how many layers can be held, which strength is best."""
        return sweep_sentences(self.result)

    def table(self) -> HtmlTable | None:
        """Return the target's metric over the number of layers; None: no layers were swept."""
        return layers_table(self.result)

    def strengths(self) -> HtmlTable | None:
        """Return both domains' metric over the strengths; None: no strength was run."""
        return strengths_table(self.result)

    def tables(self) -> list[HtmlTable]:
        """Return the tables over layers and over strengths that were run."""
        return [table for table in (self.table(), self.strengths()) if table is not None]

    def _parts(self) -> Iterable[Any]:
        return sweep_parts(self.result)

    def write(self, path: str | Path) -> None:  # noqa: D102 - as of all studies
        write_sweep(self.result, Path(path))

    def _repr_html_(self) -> str:
        tables = [table._repr_html_() for table in self.tables()]
        return fragment(*tables, *drawn(self.figures), title=" ".join(self.sentences), notes=self.notes)
