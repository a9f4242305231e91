"""Commands for many runs: compare, sweep, tune."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from conservtl.cli._options import DryRun, Executor, Imports, Out, Overrides, Processes, SpecFile
from conservtl.errors import MissingExtraError, agreeing, counted

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
    from conservtl.cli._tables import comparison_tables
    from conservtl.experiments.spec.spec import load_spec
    from conservtl.experiments.studies.comparison import compare as compare_all
    from conservtl.report import write_compare

    loaded = load_spec(spec, overrides or ())
    result = compare_all(loaded, out, processes=processes, executor=executor, dry_run=dry_run, say=_progress)
    if dry_run:
        return _print_estimate(result)
    for table in comparison_tables(result):
        Console().print(table)
    sys.stdout.write("\n".join([*result["verdict"], *(f"Left out: {text}" for text in result["left_out"])]) + "\n")
    return _write(result, out, "compare", write_compare)


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
    from conservtl.experiments.spec.spec import load_spec
    from conservtl.experiments.studies.layer_sweep import sweep as sweep_all
    from conservtl.report import write_sweep

    loaded = load_spec(spec, overrides or ())
    result = sweep_all(loaded, out, processes=processes, executor=executor, dry_run=dry_run, say=_progress)
    return _print_estimate(result) if dry_run else _write(result, out, "sweep", write_sweep)


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
    from conservtl.cli._tables import trial_line
    from conservtl.experiments.spec.spec import read_content
    from conservtl.experiments.studies.tuning import tune as tune_all
    from conservtl.report import write_tune

    content = read_content(spec, overrides or ())
    result = tune_all(content, out, processes=processes, executor=executor, dry_run=dry_run, say=_progress)
    if dry_run:
        return _print_estimate(result)
    for trial in result["trials"]:
        if trial["number"] in result["best"]:
            sys.stdout.write(f"best: {trial_line(trial, result)}\n")
    return _write(result, out, "tune", write_tune)


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


def _write(result: dict[str, Any], out: Path, name: str, write_page: Callable[[Any, Path], None]) -> None:
    """Write the results as JSON and, if the extra is installed, as a page; print the path."""
    from conservtl.report import write_json
    from conservtl.report.text.examples import skipped_notes
    from conservtl.report.text.summary import rows_notes

    sys.stdout.writelines(f"{note}\n" for note in [*rows_notes(result), *skipped_notes(result)])
    write_json(result, out / f"{name}.json")
    page = out / "report.html"
    try:
        write_page(result, page)
    except MissingExtraError as error:
        sys.stderr.write(f"report.html was not written: {error}\n")
        page = out / f"{name}.json"
    sys.stdout.write(f"{page}\n")
