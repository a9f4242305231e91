"""The command line: plan, run, predict, schema."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from conservtl.errors import ConservtlError, InputError

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


@app.command()
def plan(
    spec: SpecFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON, one row a parameter.")] = False,
) -> None:
    """Show what will happen to every layer; train nothing."""
    from conservtl.experiments.run import plan_of
    from conservtl.experiments.spec import load_spec

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
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
) -> None:
    """Adapt the source model to the target domain and report what was gained and lost."""
    from conservtl.experiments.run import run as run_spec
    from conservtl.experiments.spec import load_spec

    report = run_spec(load_spec(spec, overrides or ()), out, resume=resume, progress=Console(stderr=True).is_terminal)
    Console().print(_table(report))
    sys.stdout.write(report["sentence"] + "\n")
    if note := report.get("note"):
        sys.stderr.write(f"report.html was not written: {note}\n")
    page = out / "report.html" if "note" not in report else out / "report.json"
    sys.stdout.write(f"{page}\n")


@app.command()
def predict(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What run --out wrote.", show_default=False)],
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Recordings or images.", show_default=False)],
) -> None:
    """Say what the adapted model hears or sees: file, label and probability, tab-separated."""
    from conservtl.experiments.bundle import load

    for found in load(folder).predict(files):
        sys.stdout.write(f"{found.file}\t{found.label}\t{found.probability:.3f}\n")


@app.command()
def schema() -> None:
    """Print the JSON schema of a spec, for editors."""
    from conservtl.experiments.spec import schema as spec_schema

    sys.stdout.write(spec_schema() + "\n")


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
        table.add_row("agreement with the source model", "", f"{100 * found['agreement']:.1f} %", "")
        table.add_row("KL from the source model", "", f"{found['kl']:.3f}", "nats")
    return table


if __name__ == "__main__":
    main()
