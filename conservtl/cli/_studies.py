"""Commands for many runs: compare, sweep, tune."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from conservtl.cli._options import DryRun, Executor, Imports, Out, Overrides, Processes, SpecFile
from conservtl.errors import MissingExtraError, agreeing, counted

if TYPE_CHECKING:
    from conservtl.report.text.html_table import HtmlTable

__all__ = ["compare", "sweep", "tune"]


def compare(
    spec: SpecFile,
    out: Out = Path("runs/compare"),
    overrides: Overrides = None,
    _imports: Imports = None,
    processes: Processes = 1,
    executor: Executor = "processes",
    dry_run: DryRun = False,
) -> None:
    """Compare the spec's variants with baselines, over targets, seeds and shots."""
    from conservtl.experiments.results import Comparison
    from conservtl.experiments.spec.spec import load_spec
    from conservtl.experiments.studies.comparison import compare as compare_all

    loaded = load_spec(spec, overrides or ())
    result = compare_all(loaded, out, processes=processes, executor=executor, dry_run=dry_run, say=_progress)
    if dry_run:
        return _print_estimate(result)
    study = Comparison(result)
    return _tell(study.sentences, study.tables(brief=True), study.notes, result, out, study.write)


def sweep(
    spec: SpecFile,
    out: Out = Path("runs/sweep"),
    overrides: Overrides = None,
    _imports: Imports = None,
    processes: Processes = 1,
    executor: Executor = "processes",
    dry_run: DryRun = False,
) -> None:
    """Measure how far layers transfer from either side, and which strength of conservation is best."""
    from conservtl.experiments.results import Sweep
    from conservtl.experiments.spec.spec import load_spec
    from conservtl.experiments.studies.layer_sweep import sweep as sweep_all

    loaded = load_spec(spec, overrides or ())
    result = sweep_all(loaded, out, processes=processes, executor=executor, dry_run=dry_run, say=_progress)
    if dry_run:
        return _print_estimate(result)
    study = Sweep(result)
    return _tell(study.sentences, study.tables(), study.notes, result, out, study.write)


def tune(
    spec: SpecFile,
    out: Out = Path("runs/tune"),
    overrides: Overrides = None,
    _imports: Imports = None,
    processes: Processes = 1,
    executor: Executor = "processes",
    dry_run: DryRun = False,
) -> None:
    """Search the fields that have a range in the spec, as in alpha: {range: [1, 100], log: true}."""
    from conservtl.experiments.spec.spec import read_content
    from conservtl.experiments.studies.tuning import best_files
    from conservtl.experiments.studies.tuning import tune as tune_all
    from conservtl.report import write_tune
    from conservtl.report.pages.tuning_page import best_lines, trials_table, tune_notes, tune_sentence
    from conservtl.report.text.examples import skipped_notes

    content = read_content(spec, overrides or ())
    result = tune_all(content, out, processes=processes, executor=executor, dry_run=dry_run, say=_progress)
    if dry_run:
        return _print_estimate(result)
    table = trials_table(result)
    return _tell(
        [tune_sentence(result), *best_lines(result)],
        [] if table is None else [table],
        [*tune_notes(result), *skipped_notes(result)],
        result,
        out,
        lambda page: write_tune(result, page),
        [out / name for name in best_files(result)],
    )


def _progress(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _print_estimate(estimate: dict[str, Any]) -> None:
    sys.stdout.writelines(f"Left out: {text}\n" for text in estimate.get("left_out", ()))
    minutes = round(estimate["seconds"] / 60)
    duration = f"about {counted(minutes, 'minute')}" if minutes else "less than a minute"
    sources = estimate["sources"]
    sys.stdout.write(
        f"{counted(estimate['runs'], 'run')}, {duration} on this machine, and the training of up to "
        f"{counted(sources, 'source model')}, which {agreeing(sources, 'is')} kept for later runs\n"
    )


def _tell(
    answer: Sequence[str],
    tables: Iterable[HtmlTable],
    notes: Iterable[str],
    result: dict[str, Any],
    out: Path,
    write_page: Callable[[Path], None],
    files: Iterable[Path] = (),
) -> None:
    """Write results as JSON and, if the extra is installed, as a page; print answer, tables, notes and the files."""
    from conservtl.cli._tables import rich_table
    from conservtl.report import write_json

    sys.stdout.writelines(f"{line}\n" for line in answer)
    sys.stdout.flush()
    for table in tables:
        Console().print()
        Console().print(rich_table(table))
    sys.stdout.writelines(f"{line}\n" for line in ("", *notes))
    written, page = out / f"{result['kind']}.json", out / "report.html"
    write_json(result, written)
    try:
        write_page(page)
    except MissingExtraError as error:
        sys.stderr.write(f"report.html was not written: {error}\n")
        page = written
    sys.stdout.writelines(f"{path}\n" for path in (*files, page))
