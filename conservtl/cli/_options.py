"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["DryRun", "Executor", "Imports", "Out", "Overrides", "Processes", "SpecFile"]


def _import(modules: list[str] | None) -> list[str] | None:
    """Import the modules of --import before a spec is read."""
    from conservtl.plugins import import_modules

    import_modules(modules or ())
    return modules


SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="YAML or JSON file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Override a field, as in --set data.shots=1. Repeatable."),
]
Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE",
        callback=_import,
        help="Import your own strategies or tasks: package.module or a path. Repeatable.",
    ),
]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results; runs with a result there are not repeated.")]
Processes = Annotated[int, typer.Option("--processes", min=1, help="Number of runs at the same time.")]
Executor = Annotated[
    str,
    typer.Option(
        "--executor",
        metavar="NAME",
        help="Where runs are executed: processes, dask:ADDRESS, submitit:FOLDER?partition=NAME, or module:function of "
        "a module given to --import, which returns a concurrent.futures executor.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only print the number of runs and an estimate of their time.")]
