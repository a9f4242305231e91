"""Commands for one run: plan, run, predict; and schema."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from conservtl.cli._options import Imports, Overrides, SpecFile

__all__ = ["plan", "predict", "run", "schema"]


def plan(
    spec: SpecFile,
    overrides: Overrides = None,
    _imports: Imports = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one row a parameter.")] = False,
) -> None:
    """Print what will happen to every layer, without training."""
    from conservtl.experiments.run.runner import plan_of
    from conservtl.experiments.spec.spec import load_spec

    drawn = plan_of(load_spec(spec, overrides or ()))
    if as_json:
        sys.stdout.write(drawn.model_dump_json(indent=2) + "\n")
    else:
        _print_plan(drawn)


def run(
    spec: SpecFile,
    out: Annotated[Path, typer.Option("--out", help="Folder for the report and the adapted model.")] = Path(
        "runs/latest"
    ),
    overrides: Overrides = None,
    _imports: Imports = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint in --out.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write the history for TensorBoard too.")] = False,
) -> None:
    """Adapt the source model to the target domain and report gains and losses."""
    from conservtl.cli._tables import rich_table
    from conservtl.engine.processes import is_main_process
    from conservtl.experiments.run.runner import run as run_spec
    from conservtl.experiments.spec.spec import load_spec
    from conservtl.report.text.examples import skipped_notes
    from conservtl.report.text.metrics import headline
    from conservtl.report.text.summary import left_out_notes, rows_notes
    from conservtl.report.text.tables import gain_table

    loaded = load_spec(spec, overrides or ())
    progress = Console(stderr=True).is_terminal
    shown: dict[str, None] = {}

    def show(notes: Sequence[str]) -> None:
        new = [note for note in notes if note not in shown]
        shown.update(dict.fromkeys(new))
        if is_main_process():
            sys.stdout.writelines(f"data  {note}\n" for note in new)
            sys.stdout.flush()

    report = run_spec(loaded, out, resume=resume, progress=progress, tensorboard=tensorboard, show=show)
    if not is_main_process():
        return
    gained = gain_table(report, {domain: [headline(report)] for domain in ("target", "source")})
    Console().print(rich_table(gained))
    sys.stdout.write(
        "\n".join([report["sentence"], *left_out_notes(report), *rows_notes(report), *skipped_notes(report)]) + "\n"
    )
    if note := report.get("note"):
        sys.stderr.write(f"report.html was not written: {note}\n")
    page = out / "report.html" if "note" not in report else out / "report.json"
    sys.stdout.write(f"{page}\n")


def predict(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Output folder of a run.", show_default=False)],
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Recordings, images or other inputs.", show_default=False)
    ],
    _imports: Imports = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Files predicted at a time: fewer need less memory.")
    ] = 32,
    on_bad: Annotated[
        str, typer.Option("--on-bad", help="error, or skip: leave files that cannot be used out, and list them.")
    ] = "error",
    decoding: Annotated[
        str | None,
        typer.Option(
            "--decoding",
            metavar="FIELDS",
            help="How outputs become a text, as data.decoding of a spec: '{kind: beam, lm: words.arpa}'.",
        ),
    ] = None,
) -> None:
    """Print the adapted model's answers: file, label and probability, separated by tabs."""
    from conservtl.experiments.run.adapted import speed_text
    from conservtl.experiments.run.bundle import load_adapted
    from conservtl.experiments.spec.reading import read_fields
    from conservtl.tasks.bad_files import skipped_text

    skipped: dict[str, str] = {}
    choice: Any = on_bad  # predictions() checks it
    adapted = load_adapted(folder, decoding=None if decoding is None else read_fields(decoding, "--decoding"))
    begun, predicted = time.perf_counter(), []
    for prediction in adapted.predictions(files, batch_size, on_bad=choice, skipped=skipped):
        sys.stdout.write(f"{prediction}\n")
        predicted.append(prediction.file)
    if speed := speed_text(adapted.preprocessing, predicted, time.perf_counter() - begun):
        sys.stderr.write(f"{speed}\n")
    if skipped:
        sys.stderr.write(f"{skipped_text(skipped)}.\n")


def schema(_imports: Imports = None) -> None:
    """Print the JSON schema of a spec, for editors."""
    from conservtl.experiments.spec.spec import schema as spec_schema

    sys.stdout.write(spec_schema() + "\n")


def _print_plan(drawn: Any) -> None:
    """Print in colour on a terminal; into a pipe or a file as plain text, independent of the width."""
    console = Console()
    if console.is_terminal:
        console.print(drawn)
    else:
        sys.stdout.write(f"{drawn}\n")
