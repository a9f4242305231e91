"""The command line: plan, run, compare, sweep, tune, predict, schema, and more."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from conservtl.errors import ConservtlError, InputError, MissingExtraError

__all__ = ["app", "main"]

_INTERRUPTED = "interrupted; the same command with --resume goes on from the checkpoint in --out"

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Domain adaptation with regularized transfer.",
)

SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="A YAML or JSON file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Override a field: --set data.shots=1. Repeatable."),
]


def _import(modules: list[str] | None) -> list[str] | None:
    """Import the modules of --import before a spec is read."""
    from conservtl.plugins import import_modules

    import_modules(modules or ())
    return modules


Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE",
        callback=_import,
        help="Import strategies or tasks of your own: package.module or a path. Repeatable.",
    ),
]


@app.command()
def plan(
    spec: SpecFile,
    overrides: Overrides = None,
    _imports: Imports = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON, one row a parameter.")] = False,
) -> None:
    """Show what will happen to every layer; train nothing."""
    from conservtl.experiments.run.runner import plan_of
    from conservtl.experiments.spec.spec import load_spec

    drawn = plan_of(load_spec(spec, overrides or ()))
    if as_json:
        sys.stdout.write(drawn.model_dump_json(indent=2) + "\n")
    else:
        _show(drawn)


@app.command()
def run(
    spec: SpecFile,
    out: Annotated[Path, typer.Option("--out", help="Folder for the report and the adapted model.")] = Path(
        "runs/latest"
    ),
    overrides: Overrides = None,
    _imports: Imports = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write the history for TensorBoard too.")] = False,
) -> None:
    """Adapt the source model to the target domain and report what was gained and lost."""
    from conservtl.experiments.run.runner import run as run_spec
    from conservtl.experiments.spec.spec import load_spec

    given = load_spec(spec, overrides or ())
    shown = Console(stderr=True).is_terminal
    report = run_spec(given, out, resume=resume, progress=shown, tensorboard=tensorboard)
    Console().print(_table(report))
    sys.stdout.write(report["sentence"] + "\n")
    if note := report.get("note"):
        sys.stderr.write(f"report.html was not written: {note}\n")
    page = out / "report.html" if "note" not in report else out / "report.json"
    sys.stdout.write(f"{page}\n")


Out = Annotated[Path, typer.Option("--out", help="Folder for the results; what is in it already is not run again.")]
Processes = Annotated[int, typer.Option("--processes", min=1, help="Runs done at the same time.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only say how many runs there are and about how long they take.")
]


@app.command()
def compare(
    spec: SpecFile,
    out: Out = Path("runs/compare"),
    overrides: Overrides = None,
    _imports: Imports = None,
    processes: Processes = 1,
    dry_run: DryRun = False,
) -> None:
    """Hold the spec's variants against baselines over targets, seeds and shots."""
    from conservtl.experiments.spec.spec import load_spec
    from conservtl.experiments.studies.comparison import compare as compare_all
    from conservtl.report import write_compare

    found = compare_all(load_spec(spec, overrides or ()), out, processes=processes, dry_run=dry_run, say=_progress)
    if dry_run:
        return _estimated(found)
    for table in found["tables"]:
        Console().print(_compared(table))
    sys.stdout.write("\n".join([*found["verdict"], *(f"Left out: {text}" for text in found["left_out"])]) + "\n")
    return _written(found, out, "compare", write_compare)


@app.command()
def sweep(
    spec: SpecFile,
    out: Out = Path("runs/sweep"),
    overrides: Overrides = None,
    _imports: Imports = None,
    processes: Processes = 1,
    dry_run: DryRun = False,
) -> None:
    """How transferable each layer is from either side, and how strong a conservation should be."""
    from conservtl.experiments.spec.spec import load_spec
    from conservtl.experiments.studies.layer_sweep import sweep as sweep_all
    from conservtl.report import write_sweep

    found = sweep_all(load_spec(spec, overrides or ()), out, processes=processes, dry_run=dry_run, say=_progress)
    return _estimated(found) if dry_run else _written(found, out, "sweep", write_sweep)


@app.command()
def tune(
    spec: SpecFile,
    out: Out = Path("runs/tune"),
    overrides: Overrides = None,
    _imports: Imports = None,
    dry_run: DryRun = False,
) -> None:
    """Search the fields that the spec marks with a range: alpha: {range: [1, 100], log: true}."""
    from conservtl.experiments.spec.spec import read_content
    from conservtl.experiments.studies.tuning import tune as tune_all
    from conservtl.report import write_tune

    found = tune_all(read_content(spec, overrides or ()), out, dry_run=dry_run, say=_progress)
    if dry_run:
        return _estimated(found)
    for trial in found["trials"]:
        if trial["number"] in found["best"]:
            sys.stdout.write(f"best: trial {trial['number']}, {trial['values']}, {trial['params']}\n")
    return _written(found, out, "tune", write_tune)


@app.command()
def recommend(
    spec: SpecFile,
    overrides: Overrides = None,
    _imports: Imports = None,
    write: Annotated[Path | None, typer.Option("--write", help="File for the recommended spec.")] = None,
) -> None:
    """Measure which strategies fit this data, and say why."""
    from conservtl.experiments.advice.recommendation import recommend as recommend_for
    from conservtl.experiments.spec.spec import load_spec

    found = recommend_for(load_spec(spec, overrides or ()))
    sys.stdout.write(f"{found}\n")
    if write is not None:
        found.write(write)
        sys.stdout.write(f"{write}\n")


@app.command("lr-find")
def lr_find(
    spec: SpecFile,
    overrides: Overrides = None,
    _imports: Imports = None,
    out: Annotated[Path | None, typer.Option("--out", help="File for the picture: .html or .png.")] = None,
) -> None:
    """Suggest a learning rate: a range test on a copy of the model; nothing is changed."""
    from dataclasses import asdict

    from conservtl.experiments.advice.lr_range_test import lr_find as find
    from conservtl.experiments.spec.spec import load_spec
    from conservtl.report import check_picture, range_test_sentence, write_range_test

    if out is not None:
        check_picture(out)
    given = load_spec(spec, overrides or ())
    result = {**asdict(find(given)), "spec": given.model_dump(mode="json")}
    sys.stdout.write(range_test_sentence(result) + "\n")
    if out is not None:
        write_range_test(result, out)
        sys.stdout.write(f"{out}\n")


@app.command()
def predict(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What run --out wrote.", show_default=False)],
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Recordings or images.", show_default=False)],
    _imports: Imports = None,
) -> None:
    """Say what the adapted model hears or sees: file, label and probability, tab-separated."""
    from conservtl.experiments.run.bundle import load_adapted

    for found in load_adapted(folder).predict(files):
        sys.stdout.write(f"{found.file}\t{found.label}\t{found.probability:.3f}\n")


@app.command()
def schema(_imports: Imports = None) -> None:
    """Print the JSON schema of a spec, for editors."""
    from conservtl.experiments.spec.spec import schema as spec_schema

    sys.stdout.write(spec_schema() + "\n")


def _progress(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _estimated(found: dict[str, Any]) -> None:
    minutes = found["seconds"] / 60
    sys.stdout.write(
        f"{found['runs']} runs, about {minutes:.0f} minutes here, beside training up to {found['sources']} source "
        "models, which are then kept\n"
    )


def _written(found: dict[str, Any], out: Path, name: str, write: Callable[[Any, Path], None]) -> None:
    """The results as JSON and, where the extra is there, as a page."""
    from conservtl.report import write_json

    write_json(found, out / f"{name}.json")
    page = out / "report.html"
    try:
        write(found, page)
    except MissingExtraError as error:
        sys.stderr.write(f"report.html was not written: {error}\n")
        page = out / f"{name}.json"
    sys.stdout.write(f"{page}\n")


def main() -> None:
    """Run the command line; exit codes: 0 done, 2 bad input, 1 anything else, 130 interrupted."""
    sys.exit(_guarded(app))


def _guarded(call: Callable[..., Any]) -> int:
    """Turn what is raised into a message and an exit code."""
    try:
        code = int(call(standalone_mode=False) or 0)
        return _say(_INTERRUPTED, 130) if code == 130 else code  # typer's own answer to Ctrl-C
    except InputError as error:
        return _say(str(error), 2)
    except ConservtlError as error:
        return _say(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        return _say(_INTERRUPTED, 130)
    except Exception as error:
        show = getattr(error, "show", None)  # errors of the command line itself
        if show is None:
            raise
        show()
        return int(getattr(error, "exit_code", 2))


def _say(message: str, code: int) -> int:
    sys.stderr.write(f"conservtl: {message}\n")
    return code


def _show(drawn: Any) -> None:
    """A plan in colour on a terminal; in a pipe or a file as plain text, whatever the width."""
    console = Console()
    if console.is_terminal:
        console.print(drawn)
    else:
        sys.stdout.write(f"{drawn}\n")


def _table(report: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("", "before", "after", "change"):
        table.add_column(name, justify="left" if not name else "right")
    for domain in ("target", "source"):
        before, after = report["before"][domain], report["after"][domain]
        if before is None or after is None:
            continue
        a, b = before["accuracy"], after["accuracy"]
        table.add_row(f"{domain} accuracy", f"{100 * a:.1f} %", f"{100 * b:.1f} %", f"{100 * (b - a):+.1f}")
    if report["agreement"] is not None:
        found = report["agreement"]["after"]
        table.add_row("answers as the source, on the target", "", f"{100 * found['agreement']:.1f} %", "")
        table.add_row("KL divergence from it", "", f"{found['kl']:.3f}", "nats")
    return table


def _compared(found: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False, title=f"{found['shots']} shots a class")
    for name in ("", "target", "source", "harmonic mean", "difference"):
        table.add_column(name, justify="left" if not name else "right")
    for row in found["rows"]:
        cells = [_interval(row[name]) for name in ("target", "source", "harmonic", "difference")]
        table.add_row(row["variant"], *cells, style="dim" if row["baseline"] else "")
    return table


def _interval(found: dict[str, Any] | None) -> str:
    """Mean and ends of an interval, in percent."""
    if found is None:
        return ""
    low, high = max(-100.0, 100 * found["low"]), min(100.0, 100 * found["high"])
    return f"{100 * found['mean']:.1f}\n{low:.1f} to {high:.1f}"


if __name__ == "__main__":
    main()
